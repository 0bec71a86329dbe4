"""Settings of the optimizer and of its learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from buffer.settings import Settings


class OptimizerSettings(Settings):
    """AdamW with warm-up, and a cosine or constant schedule."""

    learning_rate: PositiveFloat = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: PositiveFloat = 1.0
    warmup_steps: int = Field(default=50, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="learning rate at the end, as a share of the peak (cosine; null = 0.05)",
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if self.final_fraction is not None and self.schedule != "cosine":
            raise ValueError("final_fraction has no effect with schedule=constant; leave it out")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1)")
        return self
