"""How long something takes, as displays write it."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """`1:23`, in minutes and seconds; from an hour on `2:05:09`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
