"""A run made visible while it goes on. The live view is for the terminal, the run log has an event per line. One table
of metrics feeds Prometheus and its documentation.
"""
