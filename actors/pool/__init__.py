"""All rollout actors of a run. The controller decides how many there should be, which one is replaced and which one
drains; it is pure, and Ray's side carries its decisions out. The autoscaler changes the wanted number by how long draws
and inserts wait.
"""
