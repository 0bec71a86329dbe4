"""What passes between processes: trajectories, their replay store, experts and the weight format.

trajectory/  the schema of a rollout, its replay and its validation: the contract of all processes
experts/     action logs made from data, with noise and backspace
store/       one shard: rows in Arrow segments, a catalog of what happened to them, sampling, limits
service/     the shards of a run as processes, their one client, draws over all of them, the Flight endpoint
remote_call  a call to another process: its value, or an error that names the process
reading/     views from outside: snapshots, history, audit
"""
