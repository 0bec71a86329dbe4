"""A run made visible while it goes on: live display, structured log, metrics for Prometheus."""
