"""Ray as a run meets it: the capacity that its processes need and reserve, and the connection to a Ray that is started
here or joined, whose head is watched.
"""
