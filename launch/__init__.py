"""Configuration, command line, the driver on Ray, evaluation and benchmarks."""
