"""Expert trajectories. A task loads its examples and says how an answer is checked; a stream turns them into
trajectories, with injected errors that backspace takes back."""
