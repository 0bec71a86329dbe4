"""Objectives side by side: the same start, an equal budget, several seeds, and one table (docs/compare.md)."""
