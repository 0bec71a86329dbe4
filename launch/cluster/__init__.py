"""Ray as a run meets it. The placement is the plan of the run's processes and one check of the sums; the capacity
reserves it as placement groups. The connection starts a Ray here or joins one, and watches its head.
"""
