"""The two number formats of a model in training.

It computes in `model.dtype`, which its config keeps, and is published and saved in it. `learner.param_dtype` is the
format of its trained parameters and of the optimizer's moments: most steps of a usual learning rate are too small to
change a weight in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def hold_trained_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert what is trained, in place, so that the optimizer's moments follow; frozen weights stay as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """What the model computes in, whatever its trained parameters are held in."""
    dtype: torch.dtype = model.config.dtype or model.dtype
    return dtype


def published_dtype(model: PreTrainedModel, parameter: Tensor) -> torch.dtype:
    """What readers get a parameter in: a trained one rounded to what the model computes in, any other as it is."""
    is_rounded = parameter.requires_grad and parameter.dtype == torch.float32
    return compute_dtype(model) if is_rounded else parameter.dtype


def autocast_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The format of products where the model holds parameters in float32 and computes in another; else None."""
    dtype = compute_dtype(model)
    is_mixed = any(parameter.dtype == torch.float32 for parameter in model.parameters())
    return dtype if is_mixed and dtype != torch.float32 else None
