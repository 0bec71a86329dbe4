"""Benchmarks: each measures a bar of the project by ratio in one run and returns one JSON object."""
