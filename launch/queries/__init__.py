"""`sequencematch query` and `sequencematch audit`, over a snapshot of a run's replay buffer."""
