"""Submitted runs, for a person."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.table import Table

from launch.durations import clock
from launch.jobs.server import Job


def job_table(jobs: Sequence[Job]) -> Table:
    """One line per job."""
    table = Table("run", "job", "state", "exit", "started", "for", box=None, padding=(0, 2, 0, 0))
    for job in jobs:
        table.add_row(
            job.run,
            "" if job.submission_id == job.run else job.submission_id,
            str(job.state),
            "" if job.exit_code is None else str(job.exit_code),
            _moment(job.started_at),
            _duration(job),
        )
    return table


def describe_job(job: Job) -> str:
    """One line; where nothing of ours ran that could have said it, with Ray's reason."""
    parts = [f"run {job.run}: {job.state}"]
    if job.started_at is not None:
        parts.append(f"{'took' if job.ended else 'for'} {_duration(job)}")
    if job.exit_code is not None:
        parts.append(f"exit code {job.exit_code}")
    if job.ended and job.exit_code is None and job.message:
        parts.append(" ".join(job.message.split()))
    return ", ".join(parts)


def _moment(at: float | None) -> str:
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _duration(job: Job) -> str:
    if job.started_at is None:
        return ""
    return clock((job.ended_at or time.time()) - job.started_at)
