"""Read-only views of a live or finished buffer: snapshots, history, audit."""
