"""The status of a run as Ray metrics, which the driver sets and Ray's agent on its node exports to Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from ray.util.metrics import Counter, Gauge

from actors.pool.controller import MemberStatus
from buffer.service.shard import ShardStatus
from launch.monitoring.live_view import RunView


class Metric(NamedTuple):
    """labels: in addition to `run`. help: one line, with the unit if the name has none."""

    name: str
    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    help: str

    @property
    def exported_name(self) -> str:
        """The name in Prometheus: Ray adds `ray_` before each name, and `_total` after that of a counter."""
        return f"ray_sequencematch_{self.name}{'_total' if self.kind == 'counter' else ''}"


METRICS = (
    Metric("learner_step", "gauge", ("stage",), "optimizer steps done in the stage"),
    Metric("learner_stage_steps", "gauge", ("stage",), "steps the stage will have"),
    Metric("learner_step_seconds", "gauge", ("stage",), "duration of a step, running mean"),
    Metric("learner_policy_version", "gauge", (), "newest published weights, -1 = none"),
    Metric("learner_metric", "gauge", ("stage", "metric"), "metric of the newest step, as in docs/metrics.md"),
    Metric("actors_desired", "gauge", (), "rollout actors wanted"),
    Metric("actor_running", "gauge", ("actor",), "1 = running, 0 = starting or ended"),
    Metric("actor_failures", "gauge", ("actor",), "failures in a row"),
    Metric("actor_join_seconds", "gauge", ("actor",), "from its creation to its first rollouts, unless it had to wait"),
    Metric("actor_policy_version", "gauge", ("actor",), "loaded weights, -1 = none"),
    Metric("actor_actions_per_second", "gauge", ("actor",), "over the last seconds"),
    Metric("actor_in_flight_rollouts", "gauge", ("actor",), "rollouts in progress"),
    Metric("actor_actions", "counter", ("actor",), "actions sampled"),
    Metric("actor_backspaces", "counter", ("actor",), "backspaces sampled"),
    Metric("actor_trajectories", "counter", ("actor",), "rollouts inserted into the buffer"),
    Metric("actor_rejected", "counter", ("actor",), "rollouts that the buffer refused"),
    Metric("actor_dropped", "counter", ("actor",), "rollouts without a finite reward or feature"),
    Metric("buffer_answers", "gauge", ("shard",), "1 = the shard answers, 0 = it does not"),
    Metric("buffer_capacity_rows", "gauge", ("shard",), "live rows per source, at most"),
    Metric("buffer_live_rows", "gauge", ("shard", "source"), "rows that can be sampled"),
    Metric("buffer_inserted_rows", "counter", ("shard", "source"), "rows inserted"),
    Metric("buffer_sampled_rows", "counter", ("shard", "source"), "rows sampled, with repetitions"),
    Metric("buffer_removed_rows", "counter", ("shard", "source", "reason"), "rows evicted or dropped"),
    Metric("buffer_rejected_rows", "counter", ("shard",), "rows refused on insert"),
    Metric("buffer_size_bytes", "gauge", ("shard",), "segment files"),
    Metric("buffer_waiting_samples", "gauge", ("shard",), "samples that wait for rows"),
    Metric("buffer_actors_paused", "gauge", ("shard",), "1 = ahead of the learner"),
    Metric("buffer_quarantined_files", "gauge", ("shard",), "damaged files, moved aside"),
    Metric("buffer_sample_staleness_versions", "gauge", ("shard", "source"), "mean over the newest sample"),
    Metric("buffer_sample_age_seconds", "gauge", ("shard", "source"), "mean over the newest sample"),
)

Sample = tuple[str, tuple[str, ...], float]
"""Name of the metric, values of its labels without `run`, value; a counter's value is its total."""


class MetricExporter:
    """Sets the Ray metrics of one run. Create it after this process has joined Ray."""

    def __init__(self, run: str) -> None:
        """run: value of the label `run`."""
        self._metrics = {metric.name: metric for metric in METRICS}
        self._instruments = {
            metric.name: (Gauge if metric.kind == "gauge" else Counter)(
                f"sequencematch_{metric.name}", metric.help, ("run", *metric.labels)
            ).set_default_tags({"run": run})
            for metric in METRICS
        }
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}
        self._actors: set[str] = set()

    def export(self, view: RunView) -> None:
        """Set every gauge and advance every counter to the values of the view."""
        for name, labels, value in samples(view):
            self._record(name, labels, value)
        if view.pool is not None:
            present = {member.name for member in view.pool.members}
            for gone in self._actors - present:  # a gauge would keep its last value
                for name in ("actor_running", "actor_actions_per_second", "actor_in_flight_rollouts"):
                    self._record(name, (gone,), 0.0)
            self._actors = present

    def _record(self, name: str, labels: tuple[str, ...], value: float) -> None:
        tags = dict(zip(self._metrics[name].labels, labels, strict=True))
        instrument = self._instruments[name]
        if isinstance(instrument, Gauge):
            instrument.set(value, tags=tags)
            return
        grown = growth(self._counted.get((name, labels), 0.0), value)
        self._counted[name, labels] = value
        if grown > 0.0:
            instrument.inc(grown, tags=tags)


def growth(before: float, now: float) -> float:
    """The increase of a counter; a counter that fell belongs to a new process and began at 0."""
    return now - before if now >= before else now


def samples(view: RunView) -> Iterator[Sample]:
    """Every value that the view holds."""
    if (learner := view.learner) is not None:
        yield from _with_labels((), learner_policy_version=learner.policy_version)
        if learner.stage:
            yield from _with_labels(
                (learner.stage,),
                learner_step=learner.step,
                learner_stage_steps=learner.stage_steps,
                learner_step_seconds=learner.seconds_per_step,
            )
            for name, value in {**learner.metrics, **learner.held_out}.items():
                yield from _with_labels((learner.stage, name), learner_metric=value)
    if view.pool is not None:
        yield from _with_labels((), actors_desired=view.pool.desired)
    for member in view.pool.members if view.pool else ():
        yield from _of_member(member)
    for index, shard in enumerate(view.buffer.shards if view.buffer else ()):
        yield from _with_labels((str(index),), buffer_answers=shard is not None)
        if shard is not None:
            yield from _of_shard(str(index), shard)


def _with_labels(labels: tuple[str, ...], **values: float) -> Iterator[Sample]:
    yield from ((name, labels, float(value)) for name, value in values.items())


def _of_member(member: MemberStatus) -> Iterator[Sample]:
    actor, status = (member.name,), member.status
    yield from _with_labels(actor, actor_running=member.state == "running", actor_failures=member.restarts)
    if member.join_s is not None:
        yield from _with_labels(actor, actor_join_seconds=member.join_s)
    if status is not None:
        yield from _with_labels(
            actor,
            actor_policy_version=status.policy_version,
            actor_actions_per_second=status.actions_per_s,
            actor_in_flight_rollouts=status.in_flight,
            actor_actions=status.actions,
            actor_backspaces=status.backspaces,
            actor_trajectories=status.trajectories,
            actor_rejected=status.rejected,
            actor_dropped=status.dropped,
        )


def _of_shard(name: str, shard: ShardStatus) -> Iterator[Sample]:
    yield from _with_labels(
        (name,),
        buffer_capacity_rows=shard.capacity,
        buffer_rejected_rows=shard.store.rejected,
        buffer_size_bytes=shard.store.size_bytes,
        buffer_waiting_samples=shard.waiting_samples,
        buffer_actors_paused=shard.actors_paused,
        buffer_quarantined_files=len(shard.store.quarantined),
    )
    for source, counters in shard.store.sources.items():
        yield from _with_labels(
            (name, source),
            buffer_live_rows=counters.live,
            buffer_inserted_rows=counters.inserted,
            buffer_sampled_rows=counters.sampled,
        )
        for reason, count in counters.removed.items():
            yield from _with_labels((name, source, reason), buffer_removed_rows=count)
        if (last := counters.last_sample) is not None:
            yield from _with_labels(
                (name, source),
                buffer_sample_staleness_versions=last.staleness_mean,
                buffer_sample_age_seconds=last.age_mean_s,
            )
