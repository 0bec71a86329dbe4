"""Action logs as a tree of distinct texts, and the values of all actions in it from one forward pass."""
