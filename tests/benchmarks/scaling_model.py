"""A run as a discrete-event model: actors, shards of the buffer, the way of the weights, and a learner.

The limiter, the staleness of a row and the autoscaler are those of the product; rollouts are rows of numbers: the
oldest version of their weights and how often they were drawn. What takes time is told by `StepTimes`. Each process has
hardware of its own; the shards share one limiter and one capacity, and each works on one call at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

import numpy as np
import simpy

from actors.pool.autoscaler import Autoscaler, Observation
from buffer.service.client import SampleTimeoutError
from buffer.store.limiter import Limiter
from buffer.store.shard import SourceCounters
from buffer.trajectory.staleness import Bool, Int32, Int64, stale_rows, staleness
from tests.benchmarks.scaling_plan import Plan

SUPERVISION_INTERVAL_S = 0.5
IDLE_WAIT_S = 0.2
MAX_INSERTS_IN_FLIGHT = 4

STARTING, GENERATING, LOADING = "starting", "generating", "loading"
THROTTLED, INSERTING, WAITING = "throttled", "inserting", "waiting"

ROW = [("oldest", np.int32), ("times_sampled", np.int32), ("created_s", np.float64)]
"""oldest: version of the weights behind a rollout's first action."""

REMOVED = ("capacity", "age", "sampled", "stale")
LEARNER_PARTS = ("training", "publishing", "waiting")

T = TypeVar("T")
Process: TypeAlias = Generator[simpy.Event, Any, T]
Point = dict[str, Any]
Counts = defaultdict[str, float]
"""Rows, actions, steps and removed rows by reason; the seconds of every activity."""


def simulate(plan: Plan, num_actors: int, num_ranks: int) -> Point:
    """What one number of actors and ranks does. Equal arguments give equal points.

    Returns:
        Rates and shares of the measured steps. virtual_s: how long these took. actions_per_s: of all engines;
        samples_per_s: rows sampled. staleness_*: in published versions. dropped_fraction: of the inserted rows, dropped
        as stale. actors_*: share of the actors' time; learner_*: of the learner's; buffer_busy: of the busiest shard's.
        join_s: when every actor was at work. actors_at_end: other than `actors` where `actors.autoscale` changes their
        number. inserted, sampled, live, removed: rows of the whole simulation. failure: why a real run would have
        ended; the rates are those before that.
    """
    return _Run(plan, num_actors, num_ranks).point()


class _Buffer:
    def __init__(self, env: simpy.Environment, plan: Plan, counts: Counts) -> None:
        self._env, self._settings, self._times, self._counts = env, plan.buffer, plan.times, counts
        self._timeout_s = plan.learner.data_timeout_s
        self._limiter = Limiter(plan.buffer)
        self._shards = [simpy.Resource(env) for _ in range(plan.buffer.shards)]
        self._generator = np.random.default_rng(plan.seed)
        self._rows = np.zeros(0, ROW)
        self._changed = env.event()
        self.demand = env.event()  # of actors that pause: when rows are wanted again
        self.waiting_samples = 0

    @property
    def num_live(self) -> int:
        return len(self._rows)

    def insert(self, turn: int, oldest: Int32) -> Process[bool]:
        """Store rows, in the shard that is in turn; whether the actor is to pause."""
        times, count = self._times, len(oldest)
        yield self._env.timeout(times.call_s)
        yield from self._work(turn % len(self._shards), times.insert_s + count * times.insert_row_s)
        rows = np.zeros(count, ROW)
        rows["oldest"], rows["created_s"] = oldest, self._env.now
        self._rows = np.append(self._rows, rows)
        self._counts["inserted"] += count
        self._remove(np.arange(self.num_live) < self.num_live - self._settings.capacity, "capacity")
        self._notify()
        return not self._has_demand()

    def sample(self, count: int, version: int) -> Process[Int64]:
        """The staleness of `count` rows, once so many may be drawn.

        Raises:
            SampleTimeoutError: they did not come in time.
        """
        env, times, deadline_s = self._env, self._times, self._env.now + self._timeout_s
        self.waiting_samples += 1
        yield env.timeout(times.call_s * min(len(self._shards), 2))  # several shards are asked before they give
        while (shortage := self._shortage(count, version)) is not None:
            self._notify()  # a waiting draw is demand
            if env.now >= deadline_s:
                raise SampleTimeoutError(f"waited {self._timeout_s:g} s for {count} policy trajectories: {shortage}")
            yield self._changed | env.timeout(deadline_s - env.now)
        self.waiting_samples -= 1
        chosen = self._choose(count)
        self._rows["times_sampled"][chosen] += 1
        self._counts["samples"] += count
        behind = staleness(version, self._rows["oldest"][chosen])
        if self._settings.max_times_sampled is not None:
            self._remove(self._rows["times_sampled"] >= self._settings.max_times_sampled, "sampled")
        self._notify()
        part_s = times.draw_s + -(-count // len(self._shards)) * times.draw_row_s
        yield env.all_of([env.process(self._work(shard, part_s)) for shard in range(len(self._shards))])
        return behind

    def _shortage(self, count: int, version: int) -> str | None:
        """Why `count` rows may not be drawn; drops what is too stale or too old."""
        settings = self._settings
        if settings.max_staleness is not None:
            self._remove(stale_rows(self._rows["oldest"], version - settings.max_staleness), "stale")
        if settings.max_age_s is not None:
            self._remove(self._rows["created_s"] < self._env.now - settings.max_age_s, "age")
        needed = count if self._counts["samples"] else max(count, settings.min_size)
        if self.num_live < needed:
            return f"{self.num_live} are live and {needed} are needed"
        if self._limiter.allowance(self._traffic()) < count:
            more = self._limiter.inserts_needed(count, self._traffic())
            return f"samples_per_insert={settings.samples_per_insert} asks for {more} more inserts first"
        return None

    def _choose(self, count: int) -> Int64:
        """Positions of distinct rows. Priorities are not simulated, and there is one task."""
        if self._settings.sampler == "fifo":
            return np.arange(count)
        given = self._settings.recency_exponent
        exponent = 0.0 if self._settings.sampler != "recency" else 1.0 if given is None else given
        weights = np.arange(self.num_live, 0, -1.0) ** -exponent
        return self._generator.choice(self.num_live, count, replace=False, p=weights / weights.sum())

    def _remove(self, gone: Bool, reason: str) -> None:
        if gone.any():
            self._counts[reason] += int(gone.sum())
            self._rows = self._rows[~gone]

    def _traffic(self) -> SourceCounters:
        return SourceCounters(int(self._counts["inserted"]), self.num_live, sampled=int(self._counts["samples"]))

    def _has_demand(self) -> bool:
        return self.waiting_samples > 0 or self._limiter.wants_inserts(self._traffic())

    def _notify(self) -> None:
        self._changed.succeed()
        self._changed = self._env.event()
        if self._has_demand():
            self.demand.succeed()
            self.demand = self._env.event()

    def _work(self, shard: int, seconds: float) -> Process[None]:
        yield from _hold(self._env, self._shards[shard], seconds)
        self._counts[f"shard {shard}"] += seconds


def _hold(env: simpy.Environment, resource: simpy.Resource, seconds: float) -> Process[None]:
    with resource.request() as turn:
        yield turn
        yield env.timeout(seconds)


class _Actor:
    def __init__(self, run: _Run, number: int) -> None:
        self._run, self._env, self._number = run, run.env, number
        self._settings, self._times = run.plan.actors, run.plan.times
        self._lengths = np.array(self._times.actions_per_rollout)
        self._generator = np.random.default_rng((run.plan.seed, number))
        self._inserts = simpy.Resource(run.env, MAX_INSERTS_IN_FLIGHT)
        self._turn = number
        self._version = -1
        self._demand: simpy.Event | None = None
        self._finished: list[int] = []
        self.activity, self.draining = STARTING, False

    def work(self) -> Process[None]:
        """Generate until drained, as `actors.rollout_actor` does."""
        yield self._env.timeout(self._times.start_actor_s)
        step, started, ends = 0, np.zeros(0, np.int32), np.zeros(0, np.int64)  # version at the start, last step
        while True:
            finishing = self._settings.weight_update == "drain" and self._run.version > self._version and len(ends) > 0
            if self._run.version > self._version and not finishing:
                yield from self._load_weights()
            throttled = self._demand is not None and not self._demand.triggered
            idle = finishing or self.draining or self._version < 0
            self.activity = WAITING if idle else THROTTLED if throttled else GENERATING
            num_new = self._settings.max_concurrent - len(ends) if self.activity == GENERATING else 0
            started = np.append(started, np.full(num_new, self._version, np.int32))
            ends = np.append(ends, step + self._generator.choice(self._lengths, num_new))
            if len(ends):
                yield from self._spend(GENERATING, self._env.timeout(self._times.decode_s(len(ends), num_new)))
                step += 1
                self._run.counts["actions"] += len(ends)
                self._finished += started[ends == step].tolist()
                started, ends = started[ends > step], ends[ends > step]
            elif self.draining:
                break
            else:
                yield from self._spend(self.activity, self._env.timeout(IDLE_WAIT_S))
            if len(self._finished) >= self._settings.insert_batch_size or len(ends) == 0:
                yield from self._flush()

    def _load_weights(self) -> Process[None]:
        yield from self._flush()
        version = self._run.version
        yield from self._spend(LOADING, self._run.sent(version, self._number // self._times.actors_per_node))
        yield from self._spend(LOADING, self._env.timeout(self._times.load_weights_s))
        self._version = version

    def _flush(self) -> Process[None]:
        if self._finished:
            oldest, self._finished = np.array(self._finished, np.int32), []
            room = self._inserts.request()
            yield from self._spend(INSERTING, room)
            self._env.process(self._insert(oldest, room))

    def _insert(self, oldest: Int32, room: simpy.resources.resource.Request) -> Process[None]:
        self._turn += 1
        pause = yield from self._run.buffer.insert(self._turn, oldest)
        self._inserts.release(room)
        if pause and (self._demand is None or self._demand.triggered):
            self._demand = self._run.buffer.demand

    def _spend(self, activity: str, event: simpy.Event) -> Process[None]:
        began_s = self._env.now
        yield event
        self._run.counts[activity] += self._env.now - began_s


class _Run:
    def __init__(self, plan: Plan, num_actors: int, num_ranks: int) -> None:
        self.plan, self._num_actors, self._num_ranks = plan, num_actors, num_ranks
        self.env = simpy.Environment()
        self.counts: Counts = defaultdict(float)
        self.buffer = _Buffer(self.env, plan, self.counts)
        self.version = -1
        self._link = simpy.Resource(self.env)
        self._sent: dict[tuple[int, int], simpy.Event] = {}
        self._actors: list[_Actor] = []
        self._failure: str | None = None
        self._begin = self._end = (0.0, self.counts.copy())
        self._staleness: list[Int64] = []

    def point(self) -> Point:
        self._scale(self._num_actors)
        if self.plan.actors.autoscale is not None:
            self.env.process(self._autoscale(Autoscaler(self.plan.actors.autoscale)))
        joined = self.env.process(self._join())
        self.env.run(until=self.env.process(self._learn(joined)))
        return self._point(joined.value if joined.triggered else None)

    def sent(self, version: int, node: int) -> simpy.Event:
        """When the weights are on a node: one node after the other, once for all its actors."""
        if (version, node) not in self._sent:
            sending = _hold(self.env, self._link, self.plan.times.send_weights_s)
            self._sent[version, node] = self.env.process(sending)
        return self._sent[version, node]

    def _join(self) -> Process[float]:
        while any(actor.activity == STARTING for actor in self._actors):
            yield self.env.timeout(0.1)
        return self.env.now

    def _scale(self, count: int) -> None:
        for actor in self._actors[count:]:
            actor.draining = True
        del self._actors[count:]
        for number in range(len(self._actors), count):
            self._actors.append(_Actor(self, number))
            self.env.process(self._actors[-1].work())

    def _autoscale(self, autoscaler: Autoscaler) -> Process[None]:
        while True:
            yield self.env.timeout(SUPERVISION_INTERVAL_S)
            activities = [actor.activity for actor in self._actors]
            seen = Observation(
                now_s=self.env.now,
                desired=len(activities),
                working=sum(activity not in (STARTING, WAITING) for activity in activities),
                throttled=activities.count(THROTTLED),
                sample_waits=self.buffer.waiting_samples > 0,
            )
            self._scale(autoscaler.observe(seen) or len(activities))

    def _learn(self, joined: simpy.Event) -> Process[None]:
        steps = self.counts
        yield from self._publish()
        try:
            yield from self._train_until(lambda: joined.triggered and steps["steps"] >= self.plan.warmup)
            self._begin, self._staleness = (self.env.now, self.counts.copy()), []
            yield from self._train_until(lambda: steps["steps"] >= self._begin[1]["steps"] + self.plan.steps)
        except SampleTimeoutError as error:
            self._failure = str(error)
        self._end = (self.env.now, self.counts.copy())

    def _train_until(self, done: Callable[[], bool]) -> Process[None]:
        stage, counts = self.plan.stage, self.counts
        step_s = self.plan.times.step_s(stage.batch_size + stage.rollout_batch_size, self._num_ranks)
        while not done():
            began_s = self.env.now
            self._staleness.append((yield from self.buffer.sample(stage.rollout_batch_size, self.version)))
            counts["learner waiting"] += self.env.now - began_s
            yield self.env.timeout(step_s)
            counts["learner training"] += step_s
            counts["steps"] += 1
            if counts["steps"] % stage.publish_every_steps == 0:
                yield from self._publish()

    def _publish(self) -> Process[None]:
        yield self.env.timeout(self.plan.times.publish_s)
        self.counts["learner publishing"] += self.plan.times.publish_s
        self.version += 1

    def _point(self, join_s: float | None) -> Point:
        (begin_s, before), (end_s, after) = self._begin, self._end
        elapsed_s = end_s - begin_s
        count: Counts = defaultdict(float, {name: after[name] - before[name] for name in after})
        working = (GENERATING, LOADING, THROTTLED, INSERTING)
        actors_s = sum(count[activity] for activity in (*working, WAITING)) or 1.0
        behind = np.concatenate([np.zeros(0, np.int64), *self._staleness])
        return {
            "actors": self._num_actors,
            "ranks": self._num_ranks,
            "virtual_s": elapsed_s,
            "steps_per_s": count["steps"] / elapsed_s,
            "actions_per_s": count["actions"] / elapsed_s,
            "inserts_per_s": count["inserted"] / elapsed_s,
            "samples_per_s": count["samples"] / elapsed_s,
            "samples_per_insert": count["samples"] / count["inserted"] if count["inserted"] else None,
            "staleness_mean": float(behind.mean()) if len(behind) else 0.0,
            "staleness_max": int(behind.max(initial=0)),
            "dropped_fraction": count["stale"] / count["inserted"] if count["inserted"] else 0.0,
            **{f"actors_{activity}": count[activity] / actors_s for activity in working},
            **{f"learner_{part}": count[f"learner {part}"] / elapsed_s for part in LEARNER_PARTS},
            "buffer_busy": max(count[f"shard {shard}"] for shard in range(self.plan.buffer.shards)) / elapsed_s,
            "join_s": join_s,
            "actors_at_end": len(self._actors),
            "inserted": int(self.counts["inserted"]),
            "sampled": int(self.counts["samples"]),
            "live": self.buffer.num_live,
            "removed": {reason: int(self.counts[reason]) for reason in REMOVED if self.counts[reason]},
            "failure": self._failure,
        }
