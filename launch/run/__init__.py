"""A run on Ray: the driver starts and supervises its processes; control looks at them from another shell."""
