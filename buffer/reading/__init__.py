"""Read-only views of a live or a finished buffer. A snapshot is one transaction of the catalog over the mapped
segments. The audit proves on it, in SQL, that every trajectory is accounted for.
"""
