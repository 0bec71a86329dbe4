"""How the result of `sequencematch query` is written; apart from the writers, so that `--help` needs no Arrow."""

from __future__ import annotations

from enum import StrEnum


class QueryFormat(StrEnum):
    """A table for people; JSON (an array of objects), CSV and Arrow (an IPC stream) for programs."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    ARROW = "arrow"
