"""Objectives, one file a family: pure functions of action values."""
