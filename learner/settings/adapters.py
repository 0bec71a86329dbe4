"""Settings of low-rank adapters on a frozen, optionally quantised, base model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from buffer.settings import Settings

ALL_LINEAR = "all-linear"

Quantization = Literal["nf4"]

PublishMode = Literal["full", "adapter"]
"""What a weight push carries: see `learner.publish`."""


class AdapterSettings(Settings):
    """LoRA (arXiv 2106.09685): W + (alpha / rank) B A with W frozen. Defaults: the paper's text task.

    There is no dropout: values and stored log-probabilities are of the model, not of a random sub-network.
    """

    rank: PositiveInt = Field(default=64, description="columns of B and rows of A")
    alpha: PositiveFloat = Field(default=16.0, description="the update B A is scaled by alpha / rank")
    target_modules: tuple[str, ...] = Field(
        default=(ALL_LINEAR,),
        description="linear layers to adapt: names as `q_proj`, or `all-linear` for all but the unembedding",
    )
    train_unembedding: bool = Field(
        default=True,
        description="train the whole output embedding too, where backspace has its row; where it is tied to the input "
        "embedding, it becomes a matrix of its own",
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _take_one_name(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("target_modules")
    @classmethod
    def _check_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError(f"target_modules is empty: name linear layers, or say `{ALL_LINEAR}`")
        if ALL_LINEAR in value and len(value) > 1:
            raise ValueError(f"target_modules: `{ALL_LINEAR}` stands alone, it includes the other layers")
        return value
