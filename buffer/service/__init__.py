"""The shards of a run as processes: service, routing of draws and inserts, Flight endpoint."""
