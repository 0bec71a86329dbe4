"""The learner: Ray actors that train one model stage by stage, one actor for each rank.

All ranks get the same calls. Rank 0 leads (see `learner.ranks`): it alone samples, publishes, logs and writes. The
other ranks take part in these calls if rank 0 needs their parts of the model.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
import torch
from ray.actor import ActorHandle

from buffer.experts.stream import ExpertStream
from buffer.experts.tasks import Task, load_task
from buffer.processes import ignore_stop_signals
from buffer.service.client import BufferClient, Shard
from buffer.settings import NoiseSettings
from buffer.trajectory.schema import TokenContract
from learner.batches import BufferSource, Float32, SharedBatchSource, StopRequestedError
from learner.checkpoints.checkpoint import check_can_be_saved, load_weights, read_training_state
from learner.checkpoints.store import (
    CheckpointStore,
    Progress,
    check_writable,
    note_durable,
    open_checkpoints,
    read_progress,
)
from learner.checkpoints.writer import StageCheckpoints
from learner.demonstrations import teach_backspace_row
from learner.held_out import StageEvaluation, evaluation_of
from learner.messages import LearnerSpec, LearnerStatus, PreparedRun, StageResult
from learner.metrics.alarms import MetricAlarms
from learner.metrics.log import Int64, MetricsLog, check_trackers, distribution_metrics
from learner.model.loading import checkpoint_activations
from learner.model.policy import Policy, load_policy
from learner.objectives import make_objective
from learner.objectives.base import OutsideDomainError
from learner.publication import WeightPublisher, make_probe
from learner.ranks import Ranks, join_ranks, open_rendezvous, shard
from learner.settings.model import ScratchModelSettings
from learner.settings.stages import StageSettings
from learner.state_tree.batch import TreeSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer

RECENT_STEPS = 20


class LearnerWorker:
    """A Ray actor with two concurrency groups: `training` (one thread) and `control`."""

    def __init__(self, spec: LearnerSpec, rank: int = 0) -> None:
        ignore_stop_signals()
        self._spec = spec
        self._rank = rank
        self._ranks = Ranks()
        self._folder = Path(spec.run_folder)
        self._stop = threading.Event()
        self._status = LearnerStatus("", 0, 0, 0.0, -1, "starting", {})
        self._policy: TreePolicy
        self._task: Task
        self._contract: TokenContract
        self._evaluation: StageEvaluation
        self._buffer: BufferClient | None = None
        self._publisher: WeightPublisher | None = None
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    # Control group

    def status(self) -> LearnerStatus:
        return self._status

    def request_stop(self) -> None:
        """End the running stage after its current step, with a checkpoint; the learner trains no further one."""
        self._stop.set()

    def report_answers(self, version: int, metrics: dict[str, float]) -> None:
        """See `StageEvaluation.report_answers`."""
        self._evaluation.report_answers(version, metrics)

    # Training group

    def open_rendezvous(self) -> tuple[str, int]:
        """At rank 0 of several: host and port where the ranks find each other."""
        settings = self._spec.settings
        host = ray.util.get_node_ip_address()
        self._rendezvous = open_rendezvous(host, settings.num_ranks, settings.collective_timeout_s)
        return host, self._rendezvous.port

    def join(self, rendezvous: tuple[str, int]) -> None:
        """Become one of several ranks; returns once all have joined. RankLostError: not all joined in time."""
        settings = self._spec.settings
        where = self._rendezvous if self._rank == 0 else rendezvous
        self._ranks = join_ranks(self._rank, settings.num_ranks, where, settings.collective_timeout_s)

    def prepare(self) -> PreparedRun | None:
        """Load model and task; returns None at ranks other than 0.

        Raises:
            ValueError, OSError, ImportError: the settings ask for a model, task or tracker that cannot be loaded, or a
            checkpoint could not be saved.
        """
        check_trackers(self._spec.trackers)
        torch.manual_seed(self._spec.seed)
        model_settings, task_settings = self._spec.model, self._spec.task
        param_dtype = self._spec.settings.param_dtype
        if isinstance(model_settings, ScratchModelSettings):
            self._task = load_task(task_settings, max_length=model_settings.max_positions)
            policy = load_policy(model_settings, self._task.tokenizer, param_dtype)
            max_length = model_settings.max_positions
        else:
            policy = load_policy(model_settings, param_dtype=param_dtype)
            max_length = int(policy.model.config.max_position_embeddings)
            self._task = load_task(
                task_settings, policy.tokenizer, backspace_id=policy.backspace_id, max_length=max_length
            )
        self._contract = self._task.contract(policy.model.config.vocab_size, policy.other_eos_ids)
        if self._ranks.leads:
            check_can_be_saved(policy.model, self._task.tokenizer, self._contract)
            check_writable(self._spec.settings.checkpoint_dir, self._folder)
        self._status = replace(self._status, notes=policy.notes)
        if self._spec.settings.activation_checkpointing:
            checkpoint_activations(policy.model)
        self._policy = self._placed(policy)
        self._is_row_new = policy.is_row_new
        self._trees = TreeSettings(
            backspace_id=self._contract.backspace_id,
            eos_id=self._contract.eos_id,
            max_tokens_per_micro_batch=self._spec.settings.max_tokens_per_micro_batch,
            max_positions=max_length,
            offers_backspace=self._spec.offers_backspace,
            other_eos_ids=self._contract.other_eos_ids,
        )
        if not self._ranks.leads:
            return None
        config_json = policy.model.config.to_json_string(use_diff=False)
        return PreparedRun(config_json, self._contract, self._task, max_length)

    def connect(self, shards: Sequence[Shard], pool: ActorHandle, first_version: int) -> None:
        """Publish the initial weights to `pool`, so that every actor verifies its engine early. shards: of the replay
        buffer. first_version: of this publication; beyond 0 when a run resumes."""
        if self._ranks.leads:
            self._buffer = BufferClient(shards)
        probe = make_probe(self._contract, self._spec.seed)
        self._publisher = WeightPublisher(pool, probe, first_version, self._spec.settings.publish, self._ranks)
        self._publish()

    def run_stage(self, stage: StageSettings, introduces_backspace: bool = False) -> StageResult | None:
        """Train one stage to its end, or until a stop is requested, from its newest checkpoint if it has one. Returns
        None at ranks other than 0.

        introduces_backspace: the stage is the first with backspaces, so a new row for backspace is fitted before it.

        Raises:
            TimeoutError: rollouts did not arrive in time, or a checkpoint was not written in time.
            CheckpointWriteError: it could not be written. FloatingPointError, OutsideDomainError: training diverged;
            the last good step has a checkpoint. RankLostError: another rank failed.
        """
        torch.set_num_threads(stage.num_threads)
        started = time.monotonic()
        needs_rollouts = stage.objective.needs_rollouts
        objective = make_objective(
            stage.objective, self._ranks, partial(self._frozen_start, stage), self._spec.features
        )
        noise = self._spec.noise if stage.objective.uses_noise else NoiseSettings(kind="none", rate=0.0)
        stream = self._expert_stream(stage, noise)
        experts = self._buffer_source(stage, "expert") if stream is None else stream
        rollouts = self._buffer_source(stage, "policy") if needs_rollouts else None
        self._evaluation = evaluation_of(self._spec, self._task, self._contract, self._trees, self._ranks)
        trainer = Trainer(
            self._policy,
            objective,
            stage,
            self._trees,
            # All ranks check for a stop before each sample, and rank 0 also while it waits for rollouts.
            SharedBatchSource(self._ranks, experts, self._is_to_stop),
            SharedBatchSource(self._ranks, rollouts, self._is_to_stop) if needs_rollouts else None,
            self._ranks,
            partial(_report_priorities, rollouts) if self._spec.prioritized_replay and needs_rollouts else None,
        )
        store = self._checkpoints(stage.name)
        resumed = self._restore(stage, store, trainer, stream)
        if introduces_backspace and self._is_row_new and resumed is None:
            with self._ranks.exchange("the fit of the backspace row"):
                taught = teach_backspace_row(
                    self._policy, self._task, noise, self._contract, self._trees, self._ranks, self._spec.seed
                )
            self._note(taught)
        uses_actors = needs_rollouts or noise.kind == "policy"
        first_version = self._start_rollouts(resumed) if uses_actors else -1
        for source in (experts, rollouts):
            if isinstance(source, BufferSource):
                source.seek(trainer.step, first_version)
        position = {} if stream is None else stream.state()
        alarms = MetricAlarms(stage, self._spec.settings.alarms)
        self._step_seconds.clear()
        with (
            self._ranks.exchange(f"stage {stage.name}"),
            MetricsLog(self._folder, self._spec.trackers) if self._ranks.leads else nullcontext() as log,
            StageCheckpoints(
                self._ranks,
                store,
                self._spec.settings,
                Progress(stage.name, 0, stage.steps, -1, first_version, {}, self._contract),
                self._policy.model,
                self._task.tokenizer,
                self._release_samples,
            ) as checkpoints,
        ):

            def save() -> None:
                checkpoints.save(trainer.step, trainer.state, position, self._newest_version(), self._evaluation.state)

            while not trainer.finished:
                try:
                    metrics = trainer.train_step()
                except (FloatingPointError, OutsideDomainError):  # at every rank; the step changed no weights
                    save()
                    raise
                except StopRequestedError:
                    break  # maybe after a step has sampled experts, but not rollouts: `position` is from before it
                position = {} if stream is None else stream.state()
                if uses_actors:
                    metrics["policy_version"] = self._newest_version()
                self._report(
                    stage, trainer.step, metrics, None if rollouts is None else rollouts.staleness, alarms, log
                )
                checkpoints.after_step(metrics)
                if uses_actors and trainer.step % stage.publish_every_steps == 0 and objective.should_publish():
                    self._evaluation.published(trainer.step, self._publish().newest_version, stage.publish_every_steps)
                if trainer.step % self._spec.settings.checkpoint_every_steps == 0 and not trainer.finished:
                    save()
            save()
            checkpoints.wait()
        self._note(self._evaluation.early_stop(stage.name, trainer.step))
        if not self._ranks.leads:
            return None
        finished = trainer.finished or self._evaluation.stops_early
        return StageResult(stage.name, trainer.step, finished, store.location(trainer.step), time.monotonic() - started)

    def _report(
        self,
        stage: StageSettings,
        step: int,
        metrics: dict[str, float],
        staleness: Int64 | None,
        alarms: MetricAlarms,
        log: MetricsLog | None,
    ) -> None:
        """Evaluate and log a step and update the status; adds alarms and `staleness` [n] of the rollouts to `metrics`.
        All ranks call this together."""
        held_out = self._evaluation.after_step(self._policy, step, stage.steps)
        histograms = {} if staleness is None else {"staleness": staleness}
        metrics |= {} if staleness is None else distribution_metrics("staleness", staleness)
        raised, warnings = alarms.check(step, metrics)
        metrics |= raised
        if log is not None:
            log.write(stage.name, step, metrics | held_out, histograms)
        self._step_seconds.append(metrics["step_s"])
        self._status = replace(
            self._status,
            stage=stage.name,
            step=step,
            stage_steps=stage.steps,
            seconds_per_step=sum(self._step_seconds) / len(self._step_seconds),
            policy_version=self._newest_version(),
            activity="training",
            metrics=metrics,
            held_out=dict(self._evaluation.state),
            questions_version=self._evaluation.questions_version,
            warnings=(*self._status.warnings, *warnings),
        )

    def _expert_stream(self, stage: StageSettings, noise: NoiseSettings) -> ExpertStream | None:
        """None at ranks other than 0, and with noise from the policy: then actors make the expert trajectories."""
        if noise.kind == "policy" or not self._ranks.leads:
            return None
        # Stages that start from the same one see the same examples in the same order.
        seed = (self._spec.seed << 32) + zlib.crc32((stage.start_from or "").encode())
        return self._task.expert_stream(noise, self._contract, seed)

    def _note(self, note: object) -> None:
        """Add a note for the user about something that the learner did by itself; None adds nothing."""
        if note is not None:
            self._status = replace(self._status, notes=(*self._status.notes, str(note)))

    def _buffer_source(self, stage: StageSettings, source: str) -> BufferSource | None:
        if not self._ranks.leads:
            return None
        assert self._buffer is not None, "connect() comes before a stage that needs the buffer"
        timeout_s = self._spec.settings.data_timeout_s
        return BufferSource(self._buffer, stage.name, source, timeout_s, self._newest_version, self._stop.is_set)

    def _newest_version(self) -> int:
        return -1 if self._publisher is None else self._publisher.newest_version

    def _publish(self) -> WeightPublisher:
        assert self._publisher is not None, "connect() comes before a stage that needs actors"
        self._publisher.publish(self._policy)
        return self._publisher

    def _is_to_stop(self) -> bool:
        """Whether the stage has to end before its last step."""
        return self._stop.is_set() or self._evaluation.stops_early

    def _start_rollouts(self, resumed: Progress | None) -> int:
        """Let the actors resume with the current weights; returns the first version of the stage's rollouts."""
        publisher = self._publish()
        publisher.resume_rollouts(publisher.newest_version)
        # A resumed stage uses the rollouts since its start, unless it was finished and gets more steps: then later
        # rollouts may be those of another stage.
        return publisher.newest_version if resumed is None or resumed.finished else resumed.first_policy_version

    def _restore(
        self, stage: StageSettings, store: CheckpointStore, trainer: Trainer, stream: ExpertStream | None
    ) -> Progress | None:
        """Load the stage's newest checkpoint and return its progress, or else the weights of the stage it starts
        from."""
        if store.steps():
            folder = self._newest_checkpoint(store)
            load_weights(self._policy.model, folder)
            self._note(trainer.load_state(read_training_state(folder)))
            progress = read_progress(folder)
            self._evaluation.load_state(progress.held_out)
            if stream is not None:
                stream.load_state(progress.expert_stream)
            return progress
        self._load_start(self._policy, stage)
        return None

    def _load_start(self, policy: Policy | TreePolicy, stage: StageSettings) -> None:
        """Load the final weights of the stage that `stage` starts from, if any."""
        if stage.start_from is not None:
            start = self._checkpoints(stage.start_from)
            if not start.steps():
                raise ValueError(
                    f"stage {stage.name!r} starts from {stage.start_from!r}, which has no checkpoint in {self._folder}"
                )
            load_weights(policy.model, self._newest_checkpoint(start))

    def _frozen_start(self, stage: StageSettings) -> TreePolicy:
        """A frozen copy of the policy at the start of `stage`."""
        settings = self._spec.model
        tokenizer = self._task.tokenizer if isinstance(settings, ScratchModelSettings) else None
        with torch.random.fork_rng(devices=[]):
            made = load_policy(settings, tokenizer, self._spec.settings.param_dtype)
        self._load_start(made, stage)
        made.model.requires_grad_(False)
        return self._placed(made)

    def _placed(self, loaded: Policy) -> TreePolicy:
        """Shard the policy among the ranks, then move it to the device, which need not hold all of it."""
        policy = TreePolicy(loaded.model, loaded.backspace_id, self._contract.ids_without_token)
        shard(policy, self._ranks)
        policy.to("cuda" if torch.cuda.is_available() else "cpu")
        return policy

    def _checkpoints(self, stage: str) -> CheckpointStore:
        return open_checkpoints(self._spec.settings.checkpoint_dir, self._folder, stage)

    def _newest_checkpoint(self, store: CheckpointStore) -> Path:
        """Its folder. Rank 0 downloads it, if necessary, before the others use it."""
        step = store.steps()[-1]
        if self._ranks.leads:
            store.folder(step)
        self._ranks.maximum(step)
        return store.folder(step)

    def _release_samples(self, progress: Progress) -> None:
        """Let the buffer forget samples before a durable checkpoint: no step before it is repeated."""
        note_durable(self._folder, progress)
        if self._buffer is not None:
            self._buffer.checkpointed(progress.stage, progress.step)


def _report_priorities(rollouts: BufferSource | None, priorities: Float32) -> None:
    """Send priorities to the buffer, from rank 0: the others have no source."""
    if rollouts is not None:
        rollouts.report_priorities(priorities)
