"""What the driver knows of a run, as Ray metrics: each node's agent offers them to Prometheus.

The driver asks everyone for their status anyway, so the numbers leave from one place, and a process that hangs is
seen as such. They appear on the node of the driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge

from actors.status import PoolStatus
from buffer.service.status import BufferStatus, ShardStatus
from launch.monitoring import metric_names as names
from launch.monitoring.live_view import RunView
from launch.monitoring.metric_names import METRIC_NAMES, MetricName
from learner.messages import LearnerStatus


@dataclass(frozen=True)
class Sample:
    """One value. labels: beside `run`. A counter's value is its count so far."""

    metric: MetricName
    value: float
    labels: tuple[str, ...] = ()


class MetricExporter:
    """Hands the samples of one run to Ray. Made when this process has joined Ray."""

    def __init__(self, run: str) -> None:
        """run: value of the label `run`."""
        self._instruments = {
            metric: (Gauge if metric.kind == "gauge" else Counter)(
                metric.name, metric.help, ("run", *metric.labels)
            ).set_default_tags({"run": run})
            for metric in METRIC_NAMES
        }
        self._counted: dict[tuple[MetricName, tuple[str, ...]], float] = {}
        self._actors: set[str] = set()

    def export(self, view: RunView) -> None:
        """Set every gauge and move every counter to what the view says."""
        for sample in samples(view):
            self._record(sample)
        if view.pool is not None:
            present = {member.name for member in view.pool.members}
            for gone in self._actors - present:  # a gauge would keep its last value
                for metric in (names.ACTOR_RUNNING, names.ACTOR_RATE, names.ACTOR_IN_FLIGHT):
                    self._record(Sample(metric, 0.0, (gone,)))
            self._actors = present

    def _record(self, sample: Sample) -> None:
        tags = dict(zip(sample.metric.labels, sample.labels, strict=True))
        instrument = self._instruments[sample.metric]
        if isinstance(instrument, Gauge):
            instrument.set(sample.value, tags=tags)
            return
        key = (sample.metric, sample.labels)
        grown = growth(self._counted.get(key, 0.0), sample.value)
        self._counted[key] = sample.value
        if grown > 0.0:
            instrument.inc(grown, tags=tags)


def growth(before: float, now: float) -> float:
    """By how much a counter went on; one that fell belongs to a new process and began at 0."""
    return now - before if now >= before else now


def samples(view: RunView) -> Iterator[Sample]:
    """Every value that the view holds."""
    if view.learner is not None:
        yield from _of_learner(view.learner)
    if view.pool is not None:
        yield from _of_pool(view.pool)
    if view.buffer is not None:
        yield from _of_buffer(view.buffer)


def _of_learner(learner: LearnerStatus) -> Iterator[Sample]:
    yield Sample(names.LEARNER_VERSION, learner.policy_version)
    if not learner.stage:
        return
    stage = (learner.stage,)
    yield Sample(names.LEARNER_STEP, learner.step, stage)
    yield Sample(names.LEARNER_STAGE_STEPS, learner.stage_steps, stage)
    yield Sample(names.LEARNER_STEP_SECONDS, learner.seconds_per_step, stage)
    for name, value in learner.metrics.items():
        yield Sample(names.LEARNER_METRIC, value, (learner.stage, name))


def _of_pool(pool: PoolStatus) -> Iterator[Sample]:
    yield Sample(names.ACTORS_DESIRED, pool.desired)
    for member in pool.members:
        actor, status = (member.name,), member.status
        yield Sample(names.ACTOR_RUNNING, float(member.state == "running"), actor)
        yield Sample(names.ACTOR_FAILURES, member.restarts, actor)
        if member.join_s is not None:
            yield Sample(names.ACTOR_JOIN, member.join_s, actor)
        if status is None:
            continue
        yield Sample(names.ACTOR_VERSION, status.policy_version, actor)
        yield Sample(names.ACTOR_RATE, status.actions_per_s, actor)
        yield Sample(names.ACTOR_IN_FLIGHT, status.in_flight, actor)
        yield Sample(names.ACTOR_ACTIONS, status.actions, actor)
        yield Sample(names.ACTOR_BACKSPACES, status.backspaces, actor)
        yield Sample(names.ACTOR_TRAJECTORIES, status.trajectories, actor)
        yield Sample(names.ACTOR_REJECTED, status.rejected, actor)
        yield Sample(names.ACTOR_DROPPED, status.dropped, actor)


def _of_buffer(buffer: BufferStatus) -> Iterator[Sample]:
    for index, shard in enumerate(buffer.shards):
        yield Sample(names.SHARD_ANSWERS, float(shard is not None), (str(index),))
        if shard is not None:
            yield from _of_shard(str(index), shard)


def _of_shard(name: str, shard: ShardStatus) -> Iterator[Sample]:
    yield Sample(names.SHARD_CAPACITY, shard.capacity, (name,))
    yield Sample(names.SHARD_REJECTED, shard.store.rejected, (name,))
    yield Sample(names.SHARD_SIZE, shard.store.size_bytes, (name,))
    yield Sample(names.SHARD_WAITING, shard.waiting_draws, (name,))
    yield Sample(names.SHARD_PAUSED, float(shard.actors_paused), (name,))
    yield Sample(names.SHARD_QUARANTINED, len(shard.store.quarantined), (name,))
    for source, counters in shard.store.sources.items():
        labels = (name, source)
        yield Sample(names.SHARD_LIVE, counters.live, labels)
        yield Sample(names.SHARD_INSERTED, counters.inserted, labels)
        yield Sample(names.SHARD_DRAWN, counters.drawn, labels)
        for reason, count in counters.removed.items():
            yield Sample(names.SHARD_REMOVED, count, (*labels, reason))
        if counters.last_draw is not None:
            yield Sample(names.SHARD_STALENESS, counters.last_draw.staleness_mean, labels)
            yield Sample(names.SHARD_AGE, counters.last_draw.age_mean_s, labels)
