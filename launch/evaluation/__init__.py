"""Evaluation of checkpoints: what is generated, what is measured of it, and how it is shown."""
