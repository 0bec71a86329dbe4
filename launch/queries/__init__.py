"""`sequencematch query` and `sequencematch audit`. A query is one SELECT of DuckDB over a snapshot of the buffer, with
columns of decoded text. An audit is shown as a table of accounts and the findings with their ids.
"""
