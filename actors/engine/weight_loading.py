"""New weights into a running engine, in place.

On CPU vLLM packs each linear layer into a GEMM handle and drops the plain weight, so a model can't simply be
loaded
again: vLLM's layerwise reload restores the plain layout, loads, and packs again. It misses one layer: a
language model head that is tied to the embedding keeps its own packed copy of the *old* weights, silently.
`load_in_place` packs that one too. Nothing of this is visible in the bytes that were sent; only
log-probabilities prove it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpectedTensors:
    """Tensors of a checkpoint in Hugging Face naming.

    required: name -> shape of every parameter. optional: names that may come along because they repeat a
        required one (tied weights) or are buffers.
    """

    required: Mapping[str, Shape]
    optional: frozenset[str]

    @classmethod
    def of_model(cls, model_dir: str) -> ExpectedTensors:
        """Read the names from config.json alone: the model is built without storage."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir, trust_remote_code=False))
        # A tied pair is one parameter; the first name stands for it, as in the model's own checkpoints.
        required = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        every |= {name for name, _ in model.named_buffers()}
        return cls(required, frozenset(every - required.keys()))

    def check(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Refuse an incomplete or foreign set of tensors.

        Raises:
            ValueError: names the tensor that is missing, unknown, repeated or of the wrong shape.
        """
        received: dict[str, Shape] = {}
        for name, tensor in tensors:
            if name in received:
                raise ValueError(f"tensor {name} came twice in one update")
            if name not in self.required and name not in self.optional:
                raise ValueError(f"tensor {name} does not belong to this model")
            received[name] = tuple(tensor.shape)
            if name in self.required and received[name] != self.required[name]:
                raise ValueError(f"tensor {name} has shape {received[name]}, the model needs {self.required[name]}")
        missing = sorted(self.required.keys() - received.keys())
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"the update lacks {', '.join(missing[:3])}{more}: an engine must receive every tensor of a version"
            )


def load_in_place(model: nn.Module, config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace all weights of vLLM's `model` by `tensors` (Hugging Face names, checked by `ExpectedTensors`).

    The tensors are only read and not kept. If this raises, the model is half new: don't use it any more.

    Raises:
        RuntimeError: vLLM left a parameter of the model unloaded.
    """
    with torch.no_grad():
        parameters = {name for name, _ in model.named_parameters()}
        initialize_layerwise_reload(model)
        loaded: set[str] | None = model.load_weights(tensors)
        finalize_layerwise_reload(model, config)
        _repack_tied_head(model)
    unloaded = parameters - loaded if loaded is not None else set()
    if unloaded:
        raise RuntimeError(f"vLLM did not load {', '.join(sorted(unloaded)[:3])} of the update")


def _repack_tied_head(model: nn.Module) -> None:
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear") and head.weight.numel() > 0:
        # Only a head that shares the embedding still has its plain weight after packing.
        head.quant_method.process_weights_after_loading(head)
