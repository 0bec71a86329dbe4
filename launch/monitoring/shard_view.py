"""The shards of a replay buffer in the live display and in `sequencematch status`."""

from __future__ import annotations

from rich.table import Table

from buffer.service.status import BufferStatus
from launch.run_folder.flight_token import TOKEN_FILE, TOKEN_VARIABLE


def shard_table(buffer: BufferStatus) -> Table:
    """One row for each shard: what it does, and how full it is, by source."""
    has_experts = any(shard.store.sources["expert"].inserted for shard in buffer.answering)
    columns = ["live", "fill", "inserted", "drawn", *(["experts"] if has_experts else []), "on disk"]
    table = Table(box=None, header_style="dim", padding=(0, 1), pad_edge=False)
    table.add_column("shard", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for index, shard in enumerate(buffer.shards):
        if shard is None:
            table.add_row(str(index), "no answer")
            continue
        policy, expert = shard.store.sources["policy"], shard.store.sources["expert"]
        table.add_row(
            str(index),
            "in trouble" if shard.troubles else shard.state,
            f"{policy.live:,}",
            f"{100 * policy.live / shard.capacity:.0f} %",
            f"{policy.inserted:,}",
            f"{policy.drawn:,}",
            *([f"{expert.live:,}"] if has_experts else []),
            f"{shard.store.size_bytes / 2**20:,.1f} MiB",
        )
    return table


def flight_lines(buffer: BufferStatus) -> list[str]:
    """Where other programs can read the live rows, one line for each shard that has an endpoint."""
    locations = [
        f"shard {index} over Arrow Flight: {shard.flight}"
        for index, shard in enumerate(buffer.shards)
        if shard is not None and shard.flight is not None
    ]
    return [*locations, f"with the token in {TOKEN_FILE} of the run folder, or {TOKEN_VARIABLE}"] if locations else []
