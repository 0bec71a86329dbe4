"""Trajectories as a tree of distinct texts. One forward pass with attention along the paths of the tree gives the
values of all actions in it. Sums over the vocabulary are taken piece by piece, so that no logits of the whole tree
exist.
"""
