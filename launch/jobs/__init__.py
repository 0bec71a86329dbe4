"""`sequencematch submit` and `jobs`: recipes as jobs of a Ray cluster."""
