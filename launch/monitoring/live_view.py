"""The live display of a run: stages, learner, actors and buffer; plain lines if the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from buffer.service.shard import BufferStatus
from launch.run_folder.folder import TOKEN_FILE, TOKEN_VARIABLE
from learner.messages import LearnerStatus, StageResult
from learner.settings.held_out import ANSWERS_STEP, HELD_OUT_ACCURACY, HELD_OUT_LOSS
from learner.settings.stages import StageSettings

if TYPE_CHECKING:  # imports Ray
    from actors.pool.controller import PoolStatus

PLAIN_INTERVAL_S = 10.0
BAR_WIDTH = 14


@dataclass
class RunView:
    """The status of a run at one moment."""

    title: str
    stages: Sequence[StageSettings]
    results: dict[str, StageResult] = field(default_factory=dict)
    note: str = ""
    learner: LearnerStatus | None = None
    pool: PoolStatus | None = None
    buffer: BufferStatus | None = None
    elapsed_s: float = 0.0

    def seconds_left(self) -> float | None:
        """Estimate from the seconds per step of the running stage, which it uses for later stages too."""
        learner = self.learner
        if learner is None or learner.seconds_per_step == 0.0:
            return None
        left = {stage.name: stage.steps for stage in self.stages if stage.name not in self.results}
        done = learner.step if learner.stage in left else 0
        return (sum(left.values()) - done) * learner.seconds_per_step


class LiveView:
    """Shows a `RunView`; as a context manager it restores the terminal after any error."""

    def __init__(self, console: Console, view: RunView) -> None:
        self.view = view
        self._console = console
        self._started_at = time.monotonic()
        self._printed_at = -PLAIN_INTERVAL_S
        self._notes = self._warnings = 0
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self.refresh()
            self._live.stop()

    def refresh(self) -> None:
        """Show the current view, below new notes and warnings of the learner."""
        if (learner := self.view.learner) is not None:
            for note in learner.notes[self._notes :]:
                self.say(note)
            for warning in learner.warnings[self._warnings :]:
                self.say(warning, "yellow")
            self._notes, self._warnings = len(learner.notes), len(learner.warnings)
        self.view.elapsed_s = time.monotonic() - self._started_at
        if self._live is not None:
            self._live.update(render(self.view), refresh=True)
        elif time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S:
            self._printed_at = time.monotonic()
            self._console.print(plain_line(self.view), markup=False, highlight=False, soft_wrap=True)

    def say(self, message: str, style: str | None = None) -> None:
        """Print a line that stays above the display."""
        self._console.print(message, style=style, markup=False, highlight=False)


def render(view: RunView) -> RenderableType:
    """The whole display."""
    left = view.seconds_left()
    time_left = "" if left is None else f"   about {clock(left)} left"
    head = Text.assemble((view.title, "bold"), f"   elapsed {clock(view.elapsed_s)}{time_left}")
    parts: list[RenderableType] = [head, _stage_table(view)]
    if view.learner is not None:
        parts += [Text(line) for line in _held_out(view.learner.held_out)]
    if view.pool is not None:
        parts.append(_actor_table(view.pool))
    if view.buffer is not None:
        parts += [_shard_table(view.buffer), Text(view.buffer.summary(), "cyan"), *_flight_lines(view.buffer)]
    if view.note:
        parts.append(Text(view.note, "yellow"))
    return Group(*parts)


def plain_line(view: RunView) -> str:
    """The display in one line, for logs; the actors are summed."""
    parts = [f"[{clock(view.elapsed_s)}]"]
    if (learner := view.learner) is not None and learner.stage:
        parts.append(f"{learner.stage} {learner.step}/{learner.stage_steps} {_loss(learner)}")
        parts += _held_out(learner.held_out)
    if view.pool is not None:
        parts.append(_actors_line(view.pool))
    if view.buffer is not None:
        parts.append(view.buffer.summary())
    if view.note:
        parts.append(view.note)
    if (left := view.seconds_left()) is not None:
        parts.append(f"about {clock(left)} left")
    return " | ".join(parts)


def _actors_line(pool: PoolStatus) -> str:
    statuses = [member.status for member in pool.members if member.status is not None]
    parts = [f"{len(statuses)} of {pool.desired} actors"]
    if statuses:
        version = min(status.policy_version for status in statuses)
        rate = sum(status.backspaces for status in statuses) / max(1, sum(status.actions for status in statuses))
        parts.append("no weights yet" if version < 0 else f"v{version}")
        parts.append(f"{sum(status.actions_per_s for status in statuses):,.0f} actions/s")
        parts.append(f"{100 * rate:.1f} % backspaces")
    if any(status.dropped for status in statuses):
        parts.append(pool.losses())
    return ", ".join(parts)


def _shard_table(buffer: BufferStatus) -> Table:
    table = _table(("shard", "state"), ("live", "fill", "inserted", "sampled", "experts", "on disk"))
    for index, shard in enumerate(buffer.shards):
        if shard is None:
            table.add_row(str(index), "no answer")
            continue
        policy, expert = shard.store.sources["policy"], shard.store.sources["expert"]
        table.add_row(
            str(index),
            "damaged" if shard.troubles else shard.state,
            f"{policy.live:,}",
            f"{100 * policy.live / shard.capacity:.0f} %",
            f"{policy.inserted:,}",
            f"{policy.sampled:,}",
            f"{expert.live:,}",
            f"{shard.store.size_bytes / 2**20:,.1f} MiB",
        )
    return table


def clock(seconds: float) -> str:
    """`1:23`, in minutes and seconds; from an hour on `2:05:09`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _stage_table(view: RunView) -> Table:
    table = Table.grid(padding=(0, 1))
    for stage in view.stages:
        mark, style, step, details = Text("·", "dim"), "", 0, ""
        if (result := view.results.get(stage.name)) is not None:
            mark = Text("✓", "green") if result.finished else mark
            step, details = result.step, clock(result.seconds)
            details += "  stopped early" if result.finished and step < stage.steps else ""
        elif (learner := view.learner) is not None and learner.stage == stage.name:
            mark, style, step = Text("▸", "bold"), "bold", learner.step
            details = f"{_loss(learner)}  {1e3 * learner.seconds_per_step:.0f} ms/step"
        bar = ProgressBar(total=stage.steps, completed=step, width=BAR_WIDTH)
        objective = Text(stage.objective.name, "dim")
        table.add_row(mark, Text(stage.name, style), objective, bar, f"{step}/{stage.steps}", details)
    return table


def _actor_table(pool: PoolStatus) -> Table:
    table = _table(("actor", "state"), ("weights", "actions/s", "backsp.", "in flight", "rollouts"))
    for member in pool.members:
        status = member.status
        if status is None:
            table.add_row(member.name, member.state)
            continue
        table.add_row(
            member.name,
            status.activity if status.dropped == 0 else f"{status.activity}, {status.dropped:,} dropped",
            "none yet" if status.policy_version < 0 else f"v{status.policy_version}",
            f"{status.actions_per_s:,.0f}",
            f"{100 * status.backspaces / max(1, status.actions):.1f} %",
            str(status.in_flight),
            f"{status.trajectories:,}",
        )
    return table


def _table(names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1), pad_edge=False)
    for name in (*names, *numbers):
        table.add_column(name, justify="left" if name in names else "right", no_wrap=True)
    return table


def _loss(learner: LearnerStatus) -> str:
    return f"loss {learner.metrics.get('loss', float('nan')):.4f}"


def _held_out(found: Mapping[str, float]) -> Iterator[str]:
    """The newest numbers of evaluations during a stage, with their steps."""
    if HELD_OUT_LOSS in found:
        loss, step, best, best_step = (found[HELD_OUT_LOSS + end] for end in ("", "_step", "_best", "_best_step"))
        yield f"held-out loss {loss:.4f} at step {step:.0f} (best {best:.4f} at step {best_step:.0f})"
    if ANSWERS_STEP in found:
        right = f"{100 * found[HELD_OUT_ACCURACY]:.1f} % right, " if HELD_OUT_ACCURACY in found else ""
        deletions = f"{found['held_out_deletions_per_answer']:.2f} deletions each"
        yield f"held-out answers at step {found[ANSWERS_STEP]:.0f}: {right}{deletions}"


def _flight_lines(buffer: BufferStatus) -> list[Text]:
    """Addresses where other programs can read the live rows, one line for each shard that has one."""
    lines = [
        f"shard {index} over Arrow Flight: {shard.flight}"
        for index, shard in enumerate(buffer.shards)
        if shard is not None and shard.flight is not None
    ]
    token = [f"with the token in {TOKEN_FILE} of the run folder, or {TOKEN_VARIABLE}"] if lines else []
    return [Text(line, "dim") for line in (*lines, *token)]
