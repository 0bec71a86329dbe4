"""Trajectories as a tree of distinct texts: one forward pass with attention along its paths gives the values of all
actions, and sums over the vocabulary are taken piece by piece."""
