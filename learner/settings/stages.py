"""Settings of the training loop: what a stage does, and how the learner does it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from buffer.settings import OutputPath, Settings
from learner.settings.model import Dtype
from learner.settings.objectives import ObjectiveSettings

DEFAULT_RANK_TIMEOUT_S = 300.0

PublishMode = Literal["full", "adapter"]
"""What a weight push carries: see `learner.publish`."""


class OptimizerSettings(Settings):
    """AdamW with warm-up, and a cosine or constant schedule."""

    learning_rate: PositiveFloat = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: PositiveFloat = 1.0
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float | None = Field(
        None, ge=0.0, le=1.0, description="learning rate at the end, as a share of the peak (cosine; null = 0.05)"
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if self.schedule != "cosine":
            self._refuse_without_effect(f"schedule={self.schedule}", "final_fraction")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1)")
        return self


class StageSettings(Settings):
    """Training with one objective for a number of steps. Several stages of a recipe may start from the same one."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    start_from: str | None = Field(
        None, description="earlier stage whose final weights this one starts from; null = the stage before it"
    )
    objective: ObjectiveSettings
    steps: PositiveInt
    batch_size: PositiveInt = Field(64, description="expert trajectories per step")
    rollout_batch_size: PositiveInt = Field(64, description="policy trajectories per step, where rollouts are needed")
    optimizer: OptimizerSettings = OptimizerSettings()
    publish_every_steps: PositiveInt = Field(
        10, description="weights are pushed to the actors each time this many steps are done (with rollouts)"
    )
    num_threads: PositiveInt = Field(1, description="CPU threads of the learner; more only where the actors idle")


class AlarmSettings(Settings):
    """Bounds beyond which a metric is an alarm: a line on the display, once a stage, and a metric of its own."""

    max_backspace_rate: float = Field(
        0.35,
        gt=0.0,
        lt=0.5,
        description="share of backspaces among the rollouts' actions, at most 0.5. A policy beyond the bound types and "
        "deletes without end",
    )
    max_log_prob_mismatch: PositiveFloat = Field(
        2.0,
        description="mean difference, in nats, between the log-probabilities stored with actions of the newest weights "
        "and the learner's own; an alarm where it stays beyond the bound for two intervals of publish_every_steps, so "
        "that weights do not arrive or an engine computes something else",
    )
    max_unsatisfied_fraction: float = Field(
        0.99,
        gt=0.0,
        lt=1.0,
        description="share of a step's rollouts that break a pointwise constraint (dpg, gdc, gdc_pp, f_dpg): from "
        "those alone nothing is learned",
    )


class LearnerSettings(Settings):
    """The learner process."""

    num_ranks: PositiveInt = Field(
        1, description="processes that share the model and each step's batch (FSDP); all see the run folder"
    )
    num_cpus: float = Field(1.0, gt=0.0, description="CPUs that Ray sets aside for each rank")
    num_gpus: float = Field(0.0, ge=0.0, description="GPUs that Ray sets aside for each rank")
    resources: dict[str, PositiveFloat] = Field(
        {}, description="custom Ray resources for each rank: only nodes that were started with them take it"
    )
    placement: Literal["pack", "spread"] = Field(
        "pack", description="pack: the ranks on as few nodes as hold them; spread: over as many as there are"
    )
    rank_timeout_s: PositiveFloat | None = Field(
        None, description="longest wait of a rank for the others, beyond rollouts and storage (null = 300)"
    )
    max_tokens_per_micro_batch: PositiveInt = Field(
        2048, description="state-tree nodes per forward pass: bounds the memory of activations, not what is learned"
    )
    param_dtype: Dtype = Field(
        "float32",
        description="number format of the trained parameters and of the optimizer's moments; bfloat16 (with "
        "model.dtype=bfloat16) halves their memory, and loses most steps of a small learning rate",
    )
    activation_checkpointing: bool = Field(
        False,
        description="run each decoder layer again in the backward pass instead of keeping what it computed: less "
        "memory for about a third more time",
    )
    publish: PublishMode = Field(
        "full",
        description="what a weight push carries: every tensor, or (with model.adapter) the frozen ones once and then "
        "what is trained, which the actors merge",
    )
    checkpoint_every_steps: PositiveInt = 500
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept per stage")
    checkpoint_best_metric: str | None = Field(
        None,
        description="metric of the steps, e.g. loss_behavior_cloning: the checkpoint before which its mean was least "
        "is kept too; held_out_loss (with evaluation.every_steps): the one with the least loss on held-out examples",
    )
    checkpoint_dir: OutputPath | None = Field(
        None,
        description="folder or fsspec URL (s3://BUCKET/PATH, ...) below which checkpoints are kept, in a folder that "
        "RUN/run_id names; null = in the run folder",
    )
    checkpoint_timeout_s: PositiveFloat = Field(600.0, description="longest wait for a checkpoint to be written")
    data_timeout_s: PositiveFloat = Field(300.0, description="longest wait for rollouts before the run is ended")
    health_timeout_s: PositiveFloat = Field(300.0, description="silence of the learner after which the run is ended")
    alarms: AlarmSettings = AlarmSettings()

    @property
    def collective_timeout_s(self) -> float:
        """Longest wait of a rank for the others: while rank 0 waits for rollouts or storage, they wait for rank 0."""
        rank_timeout_s = DEFAULT_RANK_TIMEOUT_S if self.rank_timeout_s is None else self.rank_timeout_s
        return rank_timeout_s + self.data_timeout_s + self.checkpoint_timeout_s

    @model_validator(mode="after")
    def _check(self) -> LearnerSettings:
        if self.num_ranks == 1:
            self._refuse_without_effect("num_ranks=1", "rank_timeout_s")
        if self.num_ranks > 1 and self.num_gpus % 1.0:
            raise ValueError(f"num_gpus={self.num_gpus}: several ranks cannot share a GPU; give each a whole one")
        return self


def check_stages(stages: tuple[StageSettings, ...]) -> None:
    """ValueError: two stages of a recipe share a name, or one starts from a stage that does not come before it."""
    seen: list[str] = []
    for stage in stages:
        if stage.name in seen:
            raise ValueError(f"two stages are called {stage.name!r}; a stage's name is its checkpoint folder")
        if stage.start_from is not None and stage.start_from not in seen:
            raise ValueError(
                f"stage {stage.name!r} starts from {stage.start_from!r}, which is not an earlier stage "
                f"(earlier: {', '.join(seen) or 'none'})"
            )
        seen.append(stage.name)


def with_explicit_starts(stages: tuple[StageSettings, ...]) -> tuple[StageSettings, ...]:
    """Stages that say of themselves where they start: a stage without `start_from` follows the one before it."""
    explicit: list[StageSettings] = []
    for stage in stages:
        start = stage.start_from or (explicit[-1].name if explicit else None)
        explicit.append(stage.model_copy(update={"start_from": start}))
    return tuple(explicit)


def stages_before(stages: tuple[StageSettings, ...], stage: str) -> tuple[StageSettings, ...]:
    """The stages of a recipe that `stage` builds upon, each of which starts from the one before it."""
    by_name = {each.name: each for each in with_explicit_starts(stages)}
    chain: list[StageSettings] = []
    ancestor = by_name[stage].start_from
    while ancestor is not None:
        chain.insert(0, by_name[ancestor])
        ancestor = by_name[ancestor].start_from
    return tuple(chain)
