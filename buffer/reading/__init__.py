"""Read-only views of a live or a finished buffer: snapshots, and an audit that accounts for every row."""
