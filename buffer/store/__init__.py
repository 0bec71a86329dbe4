"""One shard of the replay buffer: rows in Arrow segments, and one SQLite catalog that says what happened to them."""
