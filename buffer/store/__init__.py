"""One shard on disk: rows in Arrow segments, and one SQLite catalog that says where they are and what happened to them.
Everything in memory is rebuilt from the catalog when the shard is opened."""
