"""A run on Ray. The driver places and starts the buffer's shards, the learner's ranks and the pool of actors, runs the
stages and supervises all of them. The control looks at a live run from another process, and scales it.
"""
