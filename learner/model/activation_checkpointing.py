"""Activation checkpointing: keep the inputs of the decoder layers only, and run each layer again in the backward pass.

The library's own checkpointing works in training mode only, and the policy is trained in evaluation mode.
"""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from learner.ranks.sharding import decoder_layers


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Switch it on, in place, before the model is shared among ranks. Names of parameters stay, and gradients are the
    same bit for bit; a backward pass costs one more forward pass."""
    for layer in decoder_layers(model):
        # No random numbers are drawn in evaluation mode, so their state needs no restoring.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
