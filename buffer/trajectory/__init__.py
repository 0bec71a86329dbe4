"""A trajectory, the wire contract of all processes: its schema, what its actions replay to, when a row is refused."""
