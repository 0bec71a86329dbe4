"""The settings of a run: one recipe, made of the settings of every room."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from actors.settings import (
    ActorsSettings,
    ExactAnswerSettings,
    ScorerSettings,
    ScoringSettings,
    check_division,
    is_binary,
)
from buffer.settings import BufferSettings, CustomSettings, NoiseSettings, OutputPath, Settings, TaskSettings
from buffer.store.limiter import Limiter
from launch.settings.evaluation import EvaluationSettings, check_forced_prefix
from learner.metrics.log import TrackerName
from learner.settings.held_out import HELD_OUT_ACCURACY, HELD_OUT_LOSS
from learner.settings.model import ModelSettings, PretrainedModelSettings, ScratchModelSettings
from learner.settings.objectives import AdversarialJsSettings, ConstraintSettings, TargetSettings
from learner.settings.stages import LearnerSettings, StageSettings, check_stages, stages_before


class ClusterSettings(Settings):
    """Where the run's processes live."""

    address: str | None = Field(
        None,
        description="address of a running Ray cluster (`auto` or HOST:PORT), or `local`, which starts Ray here for the "
        "run; null: RAY_ADDRESS names it, and without that Ray starts here",
    )
    num_cpus: PositiveInt | None = Field(
        None, description="CPUs that a Ray started here offers; null = twice the cores, or more if the plan needs it"
    )
    object_store_gib: float = Field(1.0, gt=0.0, description="shared memory of a Ray started here, in GiB")
    connect_timeout_s: float = Field(10.0, gt=0.0, description="longest wait for the cluster at `address`")
    grow_timeout_s: float | None = Field(
        None,
        gt=0.0,
        description="longest wait for nodes that Ray's autoscaler is asked to add for the plan; null = the cluster "
        "stays as it is, and a plan that does not fit is refused",
    )


class RunSettings(Settings):
    """One run. `sequencematch train RECIPE --dry-run` prints it with every default filled in."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="first part of the run folder's name")
    seed: NonNegativeInt = 0
    runs_folder: OutputPath = "runs"
    task: Annotated[TaskSettings, Field(discriminator="name")]
    noise: NoiseSettings = NoiseSettings()
    model: ModelSettings
    stages: tuple[StageSettings, ...] = Field(min_length=1)
    result: str | None = Field(
        None,
        description="stage whose model the run is for: `export` and `generate` take it when they are given the run; "
        "null = the last stage. Where that is a control, name the stage it is compared with",
    )
    learner: LearnerSettings = LearnerSettings()
    actors: ActorsSettings = ActorsSettings()
    scoring: ScoringSettings = ScoringSettings()
    buffer: BufferSettings = BufferSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    cluster: ClusterSettings = ClusterSettings()
    trackers: tuple[TrackerName, ...] = Field(
        ("tensorboard",),
        description="where metrics are shown beside metrics.jsonl: tensorboard, wandb, trackio (two extras)",
    )

    @property
    def result_stage(self) -> str:
        """Name of the stage whose model the run is for."""
        return self.stages[-1].name if self.result is None else self.result

    @model_validator(mode="after")
    def _check(self) -> RunSettings:
        check_stages(self.stages)
        names = [stage.name for stage in self.stages]
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers names one twice: {', '.join(self.trackers)}")
        if unknown := [name for name in self.evaluation.stages if name not in names]:
            raise ValueError(f"evaluation.stages names {unknown[0]!r}, the stages are: {', '.join(names)}")
        if self.result_stage not in names:
            raise ValueError(f"result names {self.result!r}, the stages are: {', '.join(names)}")
        self._check_rollouts()
        if self.evaluation.mauve is not None and self.task.name not in ("text", "custom"):
            raise ValueError(
                f"evaluation.mauve compares free texts; answers of task {self.task.name} are right or wrong: leave it "
                "out"
            )
        self._check_held_out()
        check_forced_prefix(self.evaluation.decodings, self.actors.rollout.max_new_tokens)
        self._check_model()
        for stage in self.stages:
            self._check_stage(stage)
        return self

    def _check_held_out(self) -> None:
        evaluation, best = self.evaluation, self.learner.checkpoint_best_metric
        has_actors = any(needs_actors(stage, self.noise) for stage in self.stages)
        if evaluation.stop_metric == HELD_OUT_ACCURACY and (self.task.name == "text" or not has_actors):
            raise ValueError(
                "evaluation.stop_metric=held_out_accuracy needs a stage with rollout actors and a task with right "
                "answers: choose held_out_loss"
            )
        steps = self.learner.checkpoint_every_steps
        if best == HELD_OUT_LOSS and (evaluation.every_steps is None or steps % evaluation.every_steps):
            raise ValueError(
                "learner.checkpoint_best_metric=held_out_loss compares checkpoints by the loss of their weights: set "
                f"evaluation.every_steps to {steps} (learner.checkpoint_every_steps) or to a divisor of it"
            )
        if best is not None and best != HELD_OUT_LOSS and best.startswith("held_out_"):
            raise ValueError(
                f"learner.checkpoint_best_metric={best} is known only some steps after the checkpoint of its weights "
                "is written, and training does not wait for it: choose held_out_loss, or a metric of the steps"
            )

    def _check_rollouts(self) -> None:
        """Actors, buffer and scoring against what the stages do with rollouts."""
        having = [stage.name for stage in self.stages if needs_actors(stage, self.noise)]
        if having and self.actors.count == 0:
            raise ValueError(
                f"stage {having[0]!r} needs rollouts, but actors.count is 0: set actors.count to 1 or more"
            )
        largest = max(stage.rollout_batch_size for stage in self.stages)
        if having and self.buffer.capacity < largest * self.buffer.shards:
            shards = "" if self.buffer.shards == 1 else f" times the {self.buffer.shards} shards"
            raise ValueError(
                f"buffer.capacity={self.buffer.capacity} is smaller than a stage's rollout_batch_size={largest}"
                f"{shards}: a shard that alone has rows could not serve a step; raise buffer.capacity"
            )
        drawing = [stage for stage in self.stages if stage.objective.needs_rollouts]
        for stage in drawing:
            Limiter(self.buffer).check(stage.rollout_batch_size)
        if self.buffer.sampler == "prioritized" and not drawing:
            raise ValueError(
                "buffer.sampler=prioritized goes by the soft-Bellman residuals of rollouts that were trained on, and "
                f"no stage draws any ({', '.join(stage.name for stage in self.stages)}): choose another sampler"
            )
        if self.scoring.scorers and not having:
            raise ValueError("scoring has no effect: no stage makes rollouts; leave it out")
        for name, scorer in self.scoring.scorers.items():
            if isinstance(scorer, ExactAnswerSettings) and self.task.name == "text":
                raise ValueError(
                    f"scoring: {name} is exact_answer, but task text has no right answers; choose another kind, or a "
                    "task with right answers (arithmetic)"
                )

    def _check_model(self) -> None:
        model = self.model
        if self.learner.publish == "adapter" and (isinstance(model, ScratchModelSettings) or model.adapter is None):
            raise ValueError(
                "learner.publish=adapter pushes the adapters alone, and the model has none: set model.adapter, or "
                "leave publish out"
            )
        if self.learner.param_dtype == "bfloat16" and model.dtype == "float32":
            raise ValueError(
                "learner.param_dtype=bfloat16 is for a model that computes in bfloat16, and model.dtype is float32: "
                "leave param_dtype out, or set model.dtype=bfloat16"
            )
        if isinstance(model, ScratchModelSettings):  # of another one the config is not here yet
            heads = {"num_attention_heads": model.num_heads, "num_key_value_heads": model.num_key_value_heads}
            check_division(self.actors.tensor_parallel_size, {**heads, "intermediate_size": model.intermediate_size})

    def _check_stage(self, stage: StageSettings) -> None:
        where, objective = f"stage {stage.name!r}: objective {stage.objective.name}", stage.objective
        if objective.uses_noise and self.noise.kind != "none" and not self.actors.rollout.backspace:
            raise ValueError(
                f"{where} teaches to take noise back, and actors.rollout.backspace is off: leave that out, set "
                "noise.kind=none, or choose an objective without noise (mle, kl_control, ...)"
            )
        if objective.needs_reward and self.scoring.reward is None:
            raise ValueError(
                f"{where} raises a reward, and the recipe has none: set scoring.reward, e.g. to {{name: exact_answer}} "
                "(docs/scoring.md)"
            )
        if objective.needs_rollouts_as_sampled:
            self._check_rollouts_as_sampled(where)
        features = self.scoring.features
        for name in objective.needs_features:
            if name not in features:
                raise ValueError(
                    f"{where} needs feature {name!r}, which scoring.features does not have (it has: "
                    f"{', '.join(features) or 'none'})"
                )
        for constraint in objective.constraints if isinstance(objective, TargetSettings) else ():
            _check_constraint(constraint, features[constraint.feature])
        if isinstance(objective, AdversarialJsSettings):
            self._check_adversarial(where, stage, objective)

    def _check_rollouts_as_sampled(self, where: str) -> None:
        if self.actors.rollout.top_p < 1.0:
            raise ValueError(
                f"{where} weighs rollouts by policy over sampler, and with actors.rollout.top_p="
                f"{self.actors.rollout.top_p:g} the sampler never makes most of them: set it to 1"
            )
        if self.buffer.sampler == "prioritized":
            raise ValueError(
                f"{where} is an expectation over rollouts, which buffer.sampler=prioritized would not draw as they "
                "come: choose another sampler"
            )

    def _check_adversarial(self, where: str, stage: StageSettings, objective: AdversarialJsSettings) -> None:
        if stage.rollout_batch_size < 2:
            raise ValueError(
                f"{where} compares each rollout with the others of its step: set rollout_batch_size to 2 or more"
            )
        discriminator = objective.discriminator
        if discriminator.warmup_steps >= stage.steps:
            raise ValueError(
                f"{where} with discriminator.warmup_steps={discriminator.warmup_steps} would never train the policy, "
                f"since the stage has steps={stage.steps}: lower the one or raise the other"
            )
        if discriminator.body == "policy":
            return
        if self.learner.num_ranks > 1:
            raise ValueError(
                f"{where} with discriminator.body=own copies the whole body of the policy, of which each of "
                f"learner.num_ranks={self.learner.num_ranks} has a part: set learner.num_ranks=1 or "
                "discriminator.body=policy"
            )
        if isinstance(self.model, PretrainedModelSettings) and self.model.quantization is not None:
            raise ValueError(
                f"{where} with discriminator.body=own trains a copy of the policy's body, and with model.quantization="
                f"{self.model.quantization} that is frozen: leave quantization out or set discriminator.body=policy"
            )


def _check_constraint(constraint: ConstraintSettings, scorer: ScorerSettings) -> None:
    """What can be said of a constraint before there is a rollout."""
    feature, target = constraint.feature, constraint.target
    if is_binary(scorer):
        if target == 1.0:
            raise ValueError(
                f"a mean of 1 of feature {feature}, which is 0 or 1, takes an infinite weight: leave target out, which "
                "makes it a pointwise constraint"
            )
        if target is not None and not 0.0 < target < 1.0:
            raise ValueError(f"feature {feature} is 0 or 1: its mean cannot be {target:g}; choose one between 0 and 1")
    elif target is None and is_binary(scorer) is not None:
        raise ValueError(f"feature {feature} is not 0 or 1, so it cannot hold in each rollout: set a target, its mean")


def introduces_backspace(settings: RunSettings, stage: StageSettings) -> bool:
    """Whether demonstrations show backspaces in this stage, and in none that it builds upon."""
    if settings.noise.kind == "none" or not settings.actors.rollout.backspace:
        return False
    before = stages_before(settings.stages, stage.name)
    return stage.objective.uses_noise and not any(each.objective.uses_noise for each in before)


def needs_actors(stage: StageSettings, noise: NoiseSettings) -> bool:
    """Whether the stage needs rollout actors: for rollouts, or for noise drawn from the policy."""
    return stage.objective.needs_rollouts or (stage.objective.uses_noise and noise.kind == "policy")


def custom_parts(settings: RunSettings) -> dict[str, CustomSettings]:
    """The classes of the user's own that a run loads, by the key of the setting."""
    parts = {"task": settings.task, "buffer.sampler": settings.buffer.sampler, **settings.scoring.scorers}
    objectives = {f"stages.{stage.name}.objective": stage.objective for stage in settings.stages}
    return {key: part for key, part in (parts | objectives).items() if isinstance(part, CustomSettings)}
