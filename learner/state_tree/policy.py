"""The policy as one module: whatever the learner computes with the model's weights goes through here.

Ranks that share the weights hold only a part of each; FSDP puts the parts together when the *root* module runs. The
root is `TreePolicy`, since `action_values` takes the model apart (transformer, then output embedding) and never calls
the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from transformers import PreTrainedModel

from buffer.trajectory.schema import IdRanges
from learner.precision import autocast_dtype, published_dtype
from learner.state_tree.action_values import ActionValues, Measurement, action_values
from learner.state_tree.batch import TreeBatch
from learner.state_tree.vocabulary_sums import Summation


class TreePolicy(nn.Module):  # type: ignore[misc]
    """A causal language model that is evaluated on state trees, in evaluation mode."""

    def __init__(self, model: PreTrainedModel, backspace_id: int, ids_without_token: IdRanges = ()) -> None:
        super().__init__()
        self.model = model
        self.backspace_id = backspace_id
        self.ids_without_token = ids_without_token
        self.autocast_dtype = autocast_dtype(model)
        # Gradients flow in evaluation mode too. In training mode a model with dropout would be a random sub-network on
        # every step, so log-probabilities, values and the published probe would not be those of the model that acts.
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def autocast(self) -> torch.autocast:
        """The context of every forward pass: where parameters are held in float32, products are of `model.dtype`."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def evaluate(
        self, tree: TreeBatch, measurement: Measurement | None = None, summation: Summation | None = None
    ) -> ActionValues:
        """Values along the logs of `tree` (on the model's device). With several ranks, all call this together."""
        return ActionValues(*self(tree, measurement, summation))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def measure(self, tree: TreeBatch, measurement: Measurement) -> None:
        """Let `measurement` see the states of `tree`, without training. With several ranks, all call this together."""
        self.evaluate(tree, measurement)
        self.release()

    def release(self) -> None:
        """After a forward pass without a backward pass: FSDP's root waits for one, with weights that are a copy."""
        if isinstance(self, FSDPModule):
            self.reshard()

    def forward(
        self, tree: TreeBatch, measurement: Measurement | None = None, summation: Summation | None = None
    ) -> tuple[Tensor | None, ...]:
        """The fields of `ActionValues` in order: FSDP finds the tensors of a tuple, not those of a dataclass."""
        with self.autocast():
            values = action_values(
                self.model,
                tree,
                self.backspace_id,
                ids_without_token=self.ids_without_token,
                measurement=measurement,
                summation=summation,
            )
        return tuple(vars(values).values())

    def sequence_logprobs(self, token_ids: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """See the function, for the weights as they are published; with several ranks, all call this together."""
        logprobs: npt.NDArray[np.float32] = self.gathered_sequence_logprobs(token_ids)
        self.release()
        return logprobs

    def gathered_sequence_logprobs(self, token_ids: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A forward pass to FSDP (`learner.ranks.sharding` registers it): call `sequence_logprobs`."""
        if isinstance(self, FSDPModule):  # it has gathered parameters that are rounded already
            with self.autocast():
                return sequence_logprobs(self.model, token_ids)
        is_float32 = all(parameter.dtype == torch.float32 for parameter in self.model.parameters())
        # Where nothing is frozen in another format, the products are of float32: what is left of a difference between
        # learner and engine is then the engine's rounding alone.
        with nullcontext() if is_float32 else self.autocast():
            return sequence_logprobs(self.model, token_ids, _rounded_parameters(self.model))


def sequence_logprobs(
    model: PreTrainedModel, token_ids: tuple[int, ...], replaced: Mapping[str, Tensor] = MappingProxyType({})
) -> npt.NDArray[np.float32]:
    """[P-1] float32 log-probability of each token after the first given those before it, over all rows of the output
    embedding, as an engine's probe. replaced: tensors in place of the parameters of these names."""
    ids = torch.tensor([token_ids], device=model.device)
    with torch.no_grad():
        logits = functional_call(model, dict(replaced), kwargs={"input_ids": ids}).logits
    logprobs = torch.log_softmax(logits[0, :-1].float(), dim=-1)
    chosen: npt.NDArray[np.float32] = logprobs.gather(1, ids[0, 1:, None]).squeeze(1).cpu().numpy()
    return chosen


@torch.no_grad()  # type: ignore[untyped-decorator]
def _rounded_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Those that are published in another format than they are held in: rounded to that, and held as before."""
    return {
        name: parameter.to(dtype).to(parameter.dtype)
        for name, parameter in model.named_parameters()
        if (dtype := published_dtype(model, parameter)) != parameter.dtype
    }
