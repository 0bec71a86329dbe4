"""The live display of a run: stages, learner, actors and buffer; plain lines where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from actors.status import PoolStatus
from buffer.service.status import BufferStatus
from launch.durations import clock
from launch.monitoring.shard_view import flight_lines, shard_table
from learner.messages import LearnerStatus, StageResult
from learner.settings.stages import StageSettings

PLAIN_INTERVAL_S = 10.0
BAR_WIDTH = 14


@dataclass
class RunView:
    """What is known of a run at one moment."""

    title: str
    stages: Sequence[StageSettings]
    results: dict[str, StageResult] = field(default_factory=dict)
    note: str = ""
    learner: LearnerStatus | None = None
    pool: PoolStatus | None = None
    buffer: BufferStatus | None = None

    def seconds_left(self) -> float | None:
        """Estimate from the seconds per step of the running stage; of later stages nothing better is known."""
        learner = self.learner
        if learner is None or learner.seconds_per_step == 0.0:
            return None
        done = set(self.results)
        steps = sum(
            stage.steps - (learner.step if stage.name == learner.stage else 0)
            for stage in self.stages
            if stage.name not in done
        )
        return steps * learner.seconds_per_step

    def backspace_rate(self) -> float | None:
        """Backspaces per action over all actors since their birth."""
        statuses = [member.status for member in self.pool.members if member.status] if self.pool else []
        actions = sum(status.actions for status in statuses)
        return sum(status.backspaces for status in statuses) / actions if actions else None


class LiveView:
    """Shows a `RunView`; a context manager, so that the terminal is given back whatever happens."""

    def __init__(self, console: Console, view: RunView) -> None:
        self.view = view
        self._console = console
        self._started_at = time.monotonic()
        self._printed_at = -PLAIN_INTERVAL_S
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self.refresh()
            self._live.stop()

    def refresh(self) -> None:
        """Draw the view as it is now."""
        elapsed = time.monotonic() - self._started_at
        if self._live is not None:
            self._live.update(render(self.view, elapsed), refresh=True)
        elif time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S:
            self._printed_at = time.monotonic()
            self._console.print(plain_line(self.view, elapsed), highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """A line that stays."""
        self._console.print(message, highlight=False)


def render(view: RunView, elapsed_s: float) -> RenderableType:
    """The whole display."""
    left = view.seconds_left()
    head = Text.assemble(
        (view.title, "bold"), f"   elapsed {clock(elapsed_s)}", "" if left is None else f"   about {clock(left)} left"
    )
    parts: list[RenderableType] = [head, _stage_table(view)]
    if view.pool is not None:
        parts.append(_actor_table(view.pool))
    if view.buffer is not None:
        if len(view.buffer.shards) > 1:
            parts.append(shard_table(view.buffer))
        parts.append(Text(_buffer_line(view), style="cyan"))
        parts += [Text(line, style="dim") for line in flight_lines(view.buffer)]
    if view.note:
        parts.append(Text(view.note, style="yellow"))
    return Group(*parts)


def plain_line(view: RunView, elapsed_s: float) -> str:
    """The display in one line, for logs."""
    parts = [f"[{clock(elapsed_s)}]"]
    learner = view.learner
    if learner is not None and learner.stage:
        loss = learner.metrics.get("loss", float("nan"))
        parts.append(f"{learner.stage} {learner.step}/{learner.stage_steps} loss {loss:.4f}")
    if view.pool is not None:
        for member in view.pool.members:
            status = member.status
            rate = member.state
            if status is not None:
                weights = "no weights yet" if status.policy_version < 0 else f"v{status.policy_version}"
                rate = f"{weights} {status.actions_per_s:,.0f} actions/s"
                if status.dropped:
                    rate += f", {status.dropped:,} dropped ({status.drop_reason})"
            parts.append(f"{member.name} {rate}")
    if view.buffer is not None:
        parts.append(_buffer_line(view))
    if view.note:
        parts.append(view.note)
    left = view.seconds_left()
    if left is not None:
        parts.append(f"about {clock(left)} left")
    return " | ".join(parts)


def _stage_table(view: RunView) -> Table:
    table = Table.grid(padding=(0, 1))
    for stage in view.stages:
        result = view.results.get(stage.name)
        running = view.learner is not None and view.learner.stage == stage.name and result is None
        step = result.step if result else view.learner.step if running and view.learner else 0
        mark = Text("✓", "green") if result and result.finished else Text("▸", "bold") if running else Text("·", "dim")
        details = ""
        if running and view.learner:
            loss = view.learner.metrics.get("loss", float("nan"))
            details = f"loss {loss:.4f}  {1e3 * view.learner.seconds_per_step:.0f} ms/step"
        elif result:
            details = clock(result.seconds)
        table.add_row(
            mark,
            Text(stage.name, "bold" if running else ""),
            Text(stage.objective.name, "dim"),
            ProgressBar(total=stage.steps, completed=step, width=BAR_WIDTH),
            f"{step}/{stage.steps}",
            details,
        )
    return table


def _actor_table(pool: PoolStatus) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1), pad_edge=False)
    for name in ("actor", "state", "weights", "actions/s", "backsp.", "in flight", "rollouts"):
        table.add_column(name, justify="left" if name in ("actor", "state") else "right", no_wrap=True)
    for member in pool.members:
        status = member.status
        if status is None:
            table.add_row(member.name, member.state)
            continue
        rate = status.backspaces / status.actions if status.actions else 0.0
        table.add_row(
            member.name,
            status.activity if status.dropped == 0 else f"{status.activity}, {status.dropped:,} dropped",
            "none yet" if status.policy_version < 0 else f"v{status.policy_version}",
            f"{status.actions_per_s:,.0f}",
            f"{100 * rate:.1f} %",
            str(status.in_flight),
            f"{status.trajectories:,}",
        )
    return table


def _buffer_line(view: RunView) -> str:
    buffer = view.buffer
    assert buffer is not None
    rate = view.backspace_rate()
    backspaces = "" if rate is None else f" | backspace rate {100 * rate:.1f} %"
    return f"{buffer.summary()}{backspaces}"
