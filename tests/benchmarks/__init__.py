"""Benchmarks of the system against what others use: `make bench NAME=rollouts|buffer|learner|weights|scaling`."""
