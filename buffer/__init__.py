"""What passes between processes: trajectories, their replay store, experts and the weight format.

trajectory/  the schema of a rollout, its replay and its validation: the contract of all processes
experts/     trajectories made from data, with noise and backspace
store/       one shard: rows in Arrow segments, a catalog of events, sampling, limits
service/     the shards of a run as processes, the client that calls them, the Flight endpoint
processes    calls between processes: a value, or an error that names the process; stop signals
weights      the weight format, and its way through Ray's object store
reading/     read-only views: snapshots, history, audit
"""
