"""One shard on disk: rows in Arrow segments, and one SQLite catalog that says where they are and what happened to them.
An insert is a message in the open segment and a row of the catalog; a draw is a row of the catalog before anybody sees
its rows. Everything in memory is rebuilt from the catalog when the shard is opened.
"""
