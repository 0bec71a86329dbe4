"""Every metric that a live run exports for Prometheus: name, kind, unit, labels.

Ray puts `ray_` before each name on its endpoint, and `_total` behind a counter. All carry the label `run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricName:
    """labels: beside `run`. help: one line, with the unit where the name does not hold it."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...] = ()

    @property
    def exported_name(self) -> str:
        """As Prometheus sees it."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


LEARNER_STEP = MetricName("sequencematch_learner_step", "gauge", "optimizer steps done in the stage", ("stage",))
LEARNER_STAGE_STEPS = MetricName("sequencematch_learner_stage_steps", "gauge", "steps the stage will have", ("stage",))
LEARNER_STEP_SECONDS = MetricName(
    "sequencematch_learner_step_seconds", "gauge", "duration of a step, running mean", ("stage",)
)
LEARNER_VERSION = MetricName("sequencematch_learner_policy_version", "gauge", "newest published weights, -1 = none")
LEARNER_METRIC = MetricName(
    "sequencematch_learner_metric", "gauge", "metric of the newest step, as in docs/metrics.md", ("stage", "metric")
)

ACTORS_DESIRED = MetricName("sequencematch_actors_desired", "gauge", "rollout actors wanted")
ACTOR_RUNNING = MetricName("sequencematch_actor_running", "gauge", "1 = takes part, 0 = starts or has gone", ("actor",))
ACTOR_FAILURES = MetricName("sequencematch_actor_failures", "gauge", "failures in a row", ("actor",))
ACTOR_JOIN = MetricName(
    "sequencematch_actor_join_seconds",
    "gauge",
    "from its making to its first rollouts, unless made to wait",
    ("actor",),
)
ACTOR_VERSION = MetricName("sequencematch_actor_policy_version", "gauge", "loaded weights, -1 = none", ("actor",))
ACTOR_RATE = MetricName("sequencematch_actor_actions_per_second", "gauge", "over the last seconds", ("actor",))
ACTOR_IN_FLIGHT = MetricName("sequencematch_actor_in_flight_rollouts", "gauge", "rollouts under way", ("actor",))
ACTOR_ACTIONS = MetricName("sequencematch_actor_actions", "counter", "actions sampled", ("actor",))
ACTOR_BACKSPACES = MetricName("sequencematch_actor_backspaces", "counter", "backspaces sampled", ("actor",))
ACTOR_TRAJECTORIES = MetricName(
    "sequencematch_actor_trajectories", "counter", "rollouts handed to the buffer", ("actor",)
)
ACTOR_REJECTED = MetricName("sequencematch_actor_rejected", "counter", "rollouts that the buffer refused", ("actor",))
ACTOR_DROPPED = MetricName(
    "sequencematch_actor_dropped", "counter", "rollouts without a finite reward or feature", ("actor",)
)

SHARD_ANSWERS = MetricName(
    "sequencematch_buffer_answers", "gauge", "1 = the shard answers, 0 = it restarts", ("shard",)
)
SHARD_CAPACITY = MetricName("sequencematch_buffer_capacity_rows", "gauge", "live rows per source, at most", ("shard",))
SHARD_LIVE = MetricName("sequencematch_buffer_live_rows", "gauge", "rows that can be drawn", ("shard", "source"))
SHARD_INSERTED = MetricName("sequencematch_buffer_inserted_rows", "counter", "rows inserted", ("shard", "source"))
SHARD_DRAWN = MetricName("sequencematch_buffer_drawn_rows", "counter", "rows drawn, each time", ("shard", "source"))
SHARD_REMOVED = MetricName(
    "sequencematch_buffer_removed_rows", "counter", "rows evicted or dropped", ("shard", "source", "reason")
)
SHARD_REJECTED = MetricName("sequencematch_buffer_rejected_rows", "counter", "rows refused at the door", ("shard",))
SHARD_SIZE = MetricName("sequencematch_buffer_size_bytes", "gauge", "segment files", ("shard",))
SHARD_WAITING = MetricName("sequencematch_buffer_waiting_draws", "gauge", "draws that wait for rows", ("shard",))
SHARD_PAUSED = MetricName("sequencematch_buffer_actors_paused", "gauge", "1 = ahead of the learner", ("shard",))
SHARD_QUARANTINED = MetricName("sequencematch_buffer_quarantined_files", "gauge", "damaged, put aside", ("shard",))
SHARD_STALENESS = MetricName(
    "sequencematch_buffer_draw_staleness_versions", "gauge", "mean over the newest draw", ("shard", "source")
)
SHARD_AGE = MetricName(
    "sequencematch_buffer_draw_age_seconds", "gauge", "mean over the newest draw", ("shard", "source")
)

METRIC_NAMES: tuple[MetricName, ...] = tuple(value for value in globals().values() if isinstance(value, MetricName))
"""All of them, in the order above."""
