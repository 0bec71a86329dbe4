"""The actors of a run together: born, watched, replaced, drained, placed; how many there should be."""
