"""Read-only views of a live or a finished buffer: snapshots, and an audit that proves that every row is accounted
for."""
