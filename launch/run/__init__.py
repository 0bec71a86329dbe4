"""A run on Ray: the driver with its learner and buffer shards, and looking at or scaling a live one."""
