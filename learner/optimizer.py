"""AdamW and its learning-rate schedule.

The learning rate of a step is a function of the settings and the number of the step, so a checkpoint holds no schedule,
and a run that is resumed with other settings follows those.
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from learner.settings.stages import OptimizerSettings

DEFAULT_FINAL_FRACTION = 0.05


def make_optimizer(model: PreTrainedModel, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; weight decay spares vectors (norms, biases)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() > 1]
    vectors = [parameter for parameter in trainable if parameter.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def learning_rate_factor(step: int, settings: OptimizerSettings, steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0) of `steps`: linear warm-up, then constant or a cosine down to
    `final_fraction` of the peak at the last step.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    final = DEFAULT_FINAL_FRACTION if settings.final_fraction is None else settings.final_fraction
    done = (step - settings.warmup_steps) / max(steps - 1 - settings.warmup_steps, 1)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
