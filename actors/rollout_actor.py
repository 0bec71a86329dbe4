"""One rollout actor: it keeps a vLLM engine full of prompts and sends finished trajectories to the replay buffer.

`run` is the only code that uses the engine. The control methods (`notify`, `set_paused`, `drain`) set flags that `run`
reads between engine steps. With `weight_update: in_flight` new weights are loaded while rollouts are unfinished: these
continue with the new weights, and each action records its version. With `weight_update: drain` the actor finishes its
rollouts first, so each rollout has one version.
"""

from __future__ import annotations

import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray

from actors.engine.interface import EngineSettings, FinishedRollout, Int32, SamplingSettings, rollouts_to_batch
from actors.engine.rank_group import RankGroup
from actors.scoring import RolloutScoring
from actors.settings import ActorsSettings, ScoringSettings
from buffer.experts.stream import ExpertStream, PromptStream
from buffer.processes import NoAnswerError, ignore_stop_signals
from buffer.service.client import BufferClient, Shard, nearest
from buffer.settings import NoiseSettings
from buffer.trajectory.schema import TokenContract
from buffer.weights import WeightHandle, WeightManifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STARTING = "starting"
WAITING_FOR_WEIGHTS = "waiting for weights"
DRAINING = "draining"
PAUSED = "paused"
FINISHING = "finishing rollouts before new weights"
THROTTLED = "ahead of the learner"
GENERATING = "generating"

NUM_RATE_SAMPLES = 10
"""The pool asks for the status twice a second, so the rate of actions is that of the last 5 s."""

ANSWER_TIMEOUT_S = 300.0
"""Longest wait for the answers of one actor to the held-out questions."""

IDLE_WAIT_S = 0.2
"""Time after which an actor without work checks again for work."""


@dataclass(frozen=True)
class ActorStatus:
    """One rollout actor's counters, since its start.

    policy_version: of the loaded weights; -1 before the first ones. actions_per_s: over the last seconds.
    trajectories: finished and sent to the buffer. rejected: refused by the buffer.
    activity: what it does at the moment: `GENERATING`, "loading weights 3", ...
    dropped: rollouts without a finite reward or feature. drop_reason: of the newest one.
    weights_note: remark on the check of the newest weights, if there is one.
    """

    name: str
    policy_version: int
    actions: int
    actions_per_s: float
    backspaces: int
    trajectories: int
    rejected: int
    in_flight: int
    activity: str
    dropped: int = 0
    drop_reason: str | None = None
    weights_note: str | None = None


@dataclass(frozen=True)
class RolloutSpec:
    """Specification of every actor of a run; the learner sends the weights.

    config_json: the model's config.json. max_length: prompt and text, in tokens.
    noise: of the expert trajectories; with kind `policy` the actors make those too.
    scoring: of the rollouts; None = no scores. tokenizer: of the task; scoring needs it.
    questions: held-out prompts [P] that an actor answers when its pool asks.
    """

    config_json: str
    contract: TokenContract
    task: str
    settings: ActorsSettings
    noise: NoiseSettings
    max_length: int
    scoring: ScoringSettings | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    questions: Sequence[Int32] = ()


class RolloutActor:
    """A Ray actor with three concurrency groups: `generation` (one thread: `run`), `control`, and `evaluation` (one
    thread, which waits for answers to held-out questions)."""

    def __init__(self, name: str, spec: RolloutSpec, examples: pa.Table, shards: Sequence[Shard], number: int) -> None:
        """Build the engine; the first rollouts wait for the first weights.

        examples: `prompt_ids` and `target_ids` of the task's training examples.
        number: of this actor in its pool; it selects the first shard to insert into.

        Raises:
            ValueError: the engine cannot be built, or a scorer cannot be imported.
            EngineRankError: a process of an engine with several ranks did not start, or failed.
        """
        ignore_stop_signals()
        self._name = name
        self._spec = spec
        # A replacement must repeat neither the random draws nor the trajectory ids of the actor before it.
        instance = uuid.uuid4()
        self._id_prefix = f"{name}-{instance.hex[:8]}"
        seed = instance.int % 2**31
        self._prompts = PromptStream(examples, seed)
        self._experts = None
        if spec.noise.kind == "policy":
            self._experts = ExpertStream(
                examples,
                task=spec.task,
                noise=spec.noise,
                contract=spec.contract,
                seed=seed,
                actor=self._id_prefix,
            )
        self._scoring = None
        if spec.scoring is not None:
            assert spec.tokenizer is not None, "scorers read texts"
            self._scoring = RolloutScoring(spec.scoring, spec.tokenizer, spec.contract, examples)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(spec.config_json, encoding="utf-8")
            settings = EngineSettings(folder, spec.max_length, spec.settings, seed=seed, load_format="dummy")
            self._ranks = RankGroup(name, settings, spec.contract)
        self._engine = self._ranks.engine
        self._sampling = SamplingSettings(**spec.settings.rollout.model_dump())
        self._commands = threading.Condition()  # guards what the control methods set for `run`
        self._newest: tuple[WeightManifest, WeightHandle] | None = None
        self._paused = self._draining = False
        self._first_version = 0
        self._asked: int | None = None
        self._answers: pa.RecordBatch | None = None
        self._fingerprint: str | None = None
        self._finished: list[FinishedRollout] = []
        self._buffer = BufferClient(nearest(shards, ray.get_runtime_context().get_node_id()), first=number)
        self._num_requests = 0
        self._actions = self._backspaces = self._trajectories = self._dropped = 0
        self._drop_reason: str | None = None
        self._rate_samples: deque[tuple[float, int]] = deque(maxlen=NUM_RATE_SAMPLES)  # time, actions until then
        self._activity = STARTING

    # Control group ------------------------------------------------------------

    def ready(self) -> str:
        """The actor's name, once its engine is built."""
        return self._name

    def notify(self, manifest: WeightManifest, handle: WeightHandle) -> None:
        """Record new weights; `run` loads the newest ones before its next engine step."""
        with self._commands:
            if self._newest is None or manifest.version > self._newest[0].version:
                self._newest = (manifest, handle)
            self._commands.notify_all()

    def set_paused(self, paused: bool, first_version: int) -> None:
        """Start no rollouts while paused, nor with weights older than `first_version`; unfinished ones continue."""
        with self._commands:
            self._paused = paused
            self._first_version = first_version
            self._commands.notify_all()

    def drain(self) -> None:
        """Finish the rollouts, send them to the buffer, and let `run` return."""
        with self._commands:
            self._draining = True
            self._commands.notify_all()

    def status(self) -> ActorStatus:
        """Counters since the actor started."""
        now_s, actions = time.monotonic(), self._actions
        self._rate_samples.append((now_s, actions))
        start_s, before = self._rate_samples[0]
        return ActorStatus(
            name=self._name,
            policy_version=self._engine.version,
            actions=actions,
            actions_per_s=(actions - before) / max(now_s - start_s, 1e-9),
            backspaces=self._backspaces,
            trajectories=self._trajectories,
            rejected=self._buffer.rejected,
            in_flight=self._engine.num_unfinished,
            activity=self._activity,
            dropped=self._dropped,
            drop_reason=self._drop_reason,
            weights_note=self._ranks.loader.note,
        )

    # Evaluation group ------------------------------------------------------------

    def answer(self, version: int) -> pa.RecordBatch:
        """Answer the held-out questions with weights of `version` or newer, between two steps of the rollouts.

        Gives rows in the order of the questions, all of one version. The buffer does not get them, and no counter
        counts them. NoAnswerError: it takes longer than `ANSWER_TIMEOUT_S`.
        """
        with self._commands:
            self._asked, self._answers = version, None
            self._commands.notify_all()
            self._commands.wait_for(lambda: self._answers is not None, ANSWER_TIMEOUT_S)
            self._asked = None
            if self._answers is None:
                raise NoAnswerError(f"{self._name} did not answer the held-out questions in {ANSWER_TIMEOUT_S:g} s")
            return self._answers

    # Generation group ------------------------------------------------------------

    def run(self) -> None:
        """Generate until drained.

        Raises:
            WeightMismatchError: the engine does not compute with the published weights. The actor is fenced: its
                unfinished rollouts are dropped, and the pool replaces it.
            EngineRankError: a rank of its engine died or failed, or sampled other tokens than rank 0.
            TimeoutError: a shard of the buffer did not store a batch in time. BufferLostError: it is gone for good.
        """
        engine, backspace_id = self._engine, self._spec.contract.backspace_id
        while True:
            finishing = self._load_newest_weights()
            self._activity = rollout_activity(
                engine.version, self._first_version, self._draining, self._paused, self._buffer.throttled, finishing
            )
            if not self._draining:
                self._answer_questions()
            if self._activity == GENERATING:
                self._fill_engine()
            if engine.num_unfinished:
                rollouts = engine.step()
                self._finished += rollouts
                self._actions += sum(len(rollout.actions) for rollout in rollouts)
                self._backspaces += sum(int((rollout.actions == backspace_id).sum()) for rollout in rollouts)
            elif self._draining:
                break
            elif self._activity != GENERATING:
                with self._commands:
                    self._commands.wait(timeout=IDLE_WAIT_S)
            if len(self._finished) >= self._spec.settings.insert_batch_size or not engine.num_unfinished:
                self._flush()
        self._flush()
        self._buffer.settle()
        self._activity = "left"

    def _load_newest_weights(self) -> bool:
        """Load the newest weights, if they are new; True where the actor must finish its rollouts first."""
        with self._commands:
            newest = self._newest
        if newest is None or newest[0].version == self._engine.version:
            return False
        if self._spec.settings.weight_update == "drain" and self._engine.num_unfinished:
            return True
        self._flush()  # finished rollouts carry the fingerprint of the present weights
        manifest, handle = newest
        self._activity = f"loading weights {manifest.version}"
        self._ranks.load_weights(manifest, handle)
        self._fingerprint = manifest.fingerprint
        return False

    def _answer_questions(self) -> None:
        """Answer a pending request if the weights are new enough; greedily, like an evaluation of checkpoints."""
        with self._commands:
            if self._asked is None or self._answers is not None or self._engine.version < self._asked:
                return
        rollout = self._spec.settings.rollout
        greedy = {"temperature": 0.0, "top_p": 1.0, "ban_deleted": rollout.backspace}
        sampling = SamplingSettings(**{**rollout.model_dump(), **greedy})
        finished = self._engine.complete(self._spec.questions, sampling)
        self._ranks.settle()
        contract, task = self._spec.contract, self._spec.task
        answers = rollouts_to_batch(
            finished, contract, task=task, actor=self._name, sampling=sampling, weights_fingerprint=self._fingerprint
        )
        with self._commands:
            self._answers = answers
            self._commands.notify_all()

    def _fill_engine(self) -> None:
        missing = self._spec.settings.max_concurrent - self._engine.num_unfinished
        if missing <= 0:
            return
        for prompt_ids in self._prompts.sample(missing).rows():
            self._engine.add(f"{self._id_prefix}-{self._num_requests}", prompt_ids, self._sampling)
            self._num_requests += 1

    def _flush(self) -> None:
        """Send finished rollouts to the buffer, and as many expert trajectories if the policy makes their noise."""
        if not self._finished:
            return
        self._ranks.settle()  # send nothing before all ranks have sampled the same tokens
        rollouts = rollouts_to_batch(
            self._finished,
            self._spec.contract,
            task=self._spec.task,
            actor=self._name,
            sampling=self._sampling,
            weights_fingerprint=self._fingerprint,
        )
        self._finished = []
        num_finished = rollouts.num_rows
        if self._scoring is not None:
            rollouts, dropped = self._scoring.score(rollouts)
            self._dropped += len(dropped)
            self._drop_reason = next(reversed(dropped.values()), self._drop_reason)
        self._trajectories += num_finished  # after scoring: an actor whose scorer never returns must not look healthy
        if rollouts.num_rows == 0:
            return
        self._buffer.insert(rollouts)
        if self._experts is not None:
            plan = self._experts.plan(rollouts.num_rows)
            sampled = self._engine.sample_next_tokens(plan.prefixes().rows())
            self._ranks.settle()
            # A plan may have no noise.
            tokens = np.fromiter((rollout.actions[0] for rollout in sampled), np.int32, len(sampled))
            self._buffer.insert(self._experts.execute(plan, tokens))


def rollout_activity(
    version: int,
    first_version: int,
    draining: bool,
    paused: bool,
    throttled: Callable[[], bool],
    finishing: bool = False,
) -> str:
    """The activity of an actor; it starts new rollouts only with `GENERATING`.

    version: of the loaded weights. first_version: oldest version that the stage allows. throttled: whether every shard
        asked for a pause; called only if no other reason applies. finishing: the rollouts must end before an update.
    """
    if finishing:
        return FINISHING
    if version < first_version:
        return WAITING_FOR_WEIGHTS
    if draining:
        return DRAINING
    if paused:
        return PAUSED
    return THROTTLED if throttled() else GENERATING
