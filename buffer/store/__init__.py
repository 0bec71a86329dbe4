"""One shard on disk: segments, manifest, consumption log, recovery, compaction."""
