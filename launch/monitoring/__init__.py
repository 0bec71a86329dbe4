"""A run made visible while it goes on: on the terminal, as a log of events, and for Prometheus."""
