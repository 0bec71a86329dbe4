"""Looking after the processes of a run: asks how they are, shows and logs it, and follows the load with actors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeVar

from ray.actor import ActorHandle
from rich.markup import escape

from actors.pool.autoscaler import Autoscaler, Observation
from actors.status import PoolStatus
from buffer.remote_call import NoAnswerError, RemoteCall
from buffer.service.client import BufferClient
from launch.errors import RunFailedError, UserError
from launch.monitoring.live_view import LiveView
from launch.monitoring.metrics import MetricExporter
from launch.monitoring.run_log import RunLog
from launch.run.buffer_shards import STATUS_TIMEOUT_S as SHARD_TIMEOUT_S
from launch.run.buffer_shards import ShardWatch
from launch.run.learner_group import LearnerGroup
from launch.settings.run import RunSettings

STATUS_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 120.0
"""Of silence, where the settings say nothing else."""

POOL = "the actor pool"

T = TypeVar("T")


class Supervisor:
    """Keeps the view of a run up to date. The learner is there from the first call on, pool and buffer may come later.

    learner, pool, buffer: None while the run has none.
    """

    def __init__(self, settings: RunSettings, folder: Path, live: LiveView, log: RunLog) -> None:
        self.learner: LearnerGroup | None = None
        self.pool: ActorHandle | None = None
        self.buffer: BufferClient | None = None
        self._settings = settings
        self._live = live
        self._log = log
        self._metrics = MetricExporter(folder.name)
        autoscale = settings.actors.autoscale
        self._autoscaler = None if autoscale is None else Autoscaler(autoscale)
        self._shards: ShardWatch | None = None
        self._silent_since: dict[str, float] = {}
        self._notes_told = self._warnings_told = 0

    def refresh(self, autoscaling: bool = True) -> None:
        """Ask all processes how they are; who is too busy to answer is shown as last seen, for a while.

        autoscaling: whether the number of actors may change now.

        Raises:
            RunFailedError: a process died, or has been silent for too long. UserError: no actor can work with the
            settings.
        """
        view, settings = self._live.view, self._settings
        if self.learner is not None:
            view.learner = self._ask(self.learner.status(), view.learner, settings.learner.health_timeout_s)
            self._tell_news_of_learner()
        if self.pool is not None and self.buffer is not None:
            view.pool = self._ask(RemoteCall[PoolStatus](POOL, self.pool.status.remote()), view.pool)
            self._watch_shards(self.buffer)
            if autoscaling:
                self._autoscale(self.pool)
        self._metrics.export(view)
        self._log.follow(view)
        if view.pool is not None and view.pool.failure is not None:
            error = UserError if view.pool.refused else RunFailedError
            raise error(f"{POOL} gave up: {view.pool.failure}")
        self._live.refresh()

    def note(self, note: str) -> None:
        """Show what the run is doing beside training."""
        self._live.view.note = note
        self._live.refresh()

    def warn(self, warning: str) -> None:
        """Log and show a line."""
        self._log.write("warning", "driver", "process_warning", warning)
        self._show(warning)

    def _show(self, warning: str) -> None:
        self._live.say(f"[yellow]{escape(warning)}[/yellow]")

    def _tell_news_of_learner(self) -> None:
        """Show its notes and warnings; the log takes both from the status."""
        status = self._live.view.learner
        if status is None:
            return
        for note in status.notes[self._notes_told :]:
            self._live.say(escape(note))
        for warning in status.warnings[self._warnings_told :]:
            self._show(warning)
        self._notes_told, self._warnings_told = len(status.notes), len(status.warnings)

    def _watch_shards(self, buffer: BufferClient) -> None:
        self._shards = self._shards or ShardWatch(buffer.shards, self._settings.buffer.health_timeout_s)
        self._live.view.buffer = buffer.status(SHARD_TIMEOUT_S)
        for line in self._shards.look(self._live.view.buffer):
            self.warn(line)

    def _autoscale(self, pool: ActorHandle) -> None:
        """Follow the limiter's waits with the number of actors, as `sequencematch scale` would."""
        view = self._live.view
        if self._autoscaler is None or view.pool is None or view.buffer is None:
            return
        seen = Observation.of(time.monotonic(), view.pool, draw_waits=view.buffer.waiting_draws > 0)
        wanted = self._autoscaler.observe(seen)
        if wanted is not None:
            message = f"autoscaling asks for {wanted} actors instead of {seen.desired}"
            self._log.write("info", "driver", "autoscaled", message, {"wanted": wanted, "before": seen.desired})
            view.pool = self._ask(RemoteCall[PoolStatus](POOL, pool.scale.remote(wanted)), view.pool)

    def _ask(self, call: RemoteCall[T], last: T | None, health_timeout_s: float = HEALTH_TIMEOUT_S) -> T | None:
        """The answer, or the last one where none comes in time: a process that hangs is told from a busy one by how
        long it has been silent.
        """
        asked_at = time.monotonic()
        try:
            answer = call.result(min(STATUS_TIMEOUT_S, health_timeout_s))
        except NoAnswerError:
            silent_since = self._silent_since.setdefault(call.who, asked_at)
            if time.monotonic() - silent_since >= health_timeout_s:
                raise RunFailedError(
                    f"{call.who} has been silent for {health_timeout_s:.0f} s: its process hangs, or its node is out "
                    "of reach"
                ) from None
            return last
        self._silent_since.pop(call.who, None)
        return answer
