"""Settings of the evaluation during training: when a stage is evaluated, on how much, and when it may end early."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from buffer.settings import Settings

HELD_OUT_LOSS = "held_out_loss"
HELD_OUT_ACCURACY = "held_out_accuracy"
ANSWERS_STEP = "held_out_answers_step"
STOPPED_EARLY = "stopped_early"


class HeldOutSettings(Settings):
    """The part of `evaluation` that the learner needs."""

    every_steps: PositiveInt | None = Field(
        None,
        description="evaluate each time this many steps of a stage are done, and at its last step: the learner "
        "measures held_out_loss, and an actor answers held-out questions; null = no evaluation during training",
    )
    loss_examples: PositiveInt = Field(
        128, description="held-out examples, at most, on which held_out_loss is measured during training"
    )
    patience: PositiveInt | None = Field(
        None,
        description="end a stage early, with its final checkpoint, after this many evaluations in a row without a "
        "better value of stop_metric; null = a stage takes all its steps",
    )
    stop_metric: Literal["held_out_loss", "held_out_accuracy"] = Field(
        "held_out_loss",
        description="number that patience counts: held_out_loss (lower is better), or held_out_accuracy (higher is "
        "better; only in stages with rollout actors, and it arrives some steps after its weights)",
    )

    @model_validator(mode="after")
    def _check_held_out(self) -> HeldOutSettings:
        if self.every_steps is None:
            self._refuse_without_effect("every_steps=null", "loss_examples", "patience")
        if self.patience is None:
            self._refuse_without_effect("patience=null", "stop_metric")
        return self
