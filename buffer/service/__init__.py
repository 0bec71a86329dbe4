"""The shards of a buffer as Ray actors. `BufferClient` is the one way to call them: bounded inserts from the actors,
samples over all shards for the learner. An Arrow Flight endpoint serves the live rows to other programs.
"""
