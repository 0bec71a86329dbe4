"""The policy as one module: whatever the learner computes with the model's weights goes through here.

Q(s, a) is the logit of action a after text s, V(s) = logsumexp_a Q(s, a). At the floor (the end of the prompt)
backspace is masked, as it is in the actors, so V sums over the other actions only; so it does in all states of a
trajectory whose sampler never offered backspace. Ids without a token are never actions. So `log_prob = q - v` is the
log-probability under the policy that acted.

Ranks that share the weights hold only a part of each; FSDP puts the parts together when the *root* module runs. The
root is `TreePolicy`, since `forward` takes the model apart (transformer, then output embedding) and never calls the
model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from transformers import PreTrainedModel

from buffer.trajectory.schema import IdRanges
from learner.precision import autocast_dtype, published_dtype
from learner.state_tree.attention import evaluate_nodes
from learner.state_tree.batch import TreeBatch
from learner.state_tree.vocabulary import (
    CHUNK_ELEMENTS,
    VOCABULARY_CHUNK,
    ActionSums,
    VocabularySum,
    accumulation_dtype,
    chunked_values,
    fill_ids,
)


class ActionValues(NamedTuple):
    """Values along the trajectories of a `TreeBatch` (A actions, L trajectories), float32.

    q: [A] logit of the label. v, v_next: [A] value of the text before and after the action.
    v_start, v_final: [L] value of the first and the last text.
    log_prob_backspace: [A] of backspace before the action, without gradient (-inf where it is masked).
    log_prob_at_temperature: [A] of the label at the temperature that its policy sampled with, without gradient; that of
        temperature 1 where there is none (`behavior_temperature` 0).
    measured: what a `Measurement` found, without gradient, or the [A] sums of a `Summation`, if one was asked for.
    """

    q: Tensor
    v: Tensor
    v_next: Tensor
    v_start: Tensor
    v_final: Tensor
    log_prob_backspace: Tensor
    log_prob_at_temperature: Tensor
    measured: Tensor | None = None

    @property
    def log_prob(self) -> Tensor:
        """[A] log-probability of the label."""
        return self.q - self.v


@dataclass(frozen=True)
class StateLogits:
    """The logits of a tree's M states with a value, as the factors that they are the product of, and their sums.

    hidden: [M, H] states. weight: [V, H] output embedding.
    v_floor: [M] log-sum-exp over all actions but backspace. q_backspace: [M] logit of backspace. ids_without_token:
    rows of the output embedding that make no action.
    """

    hidden: Tensor
    weight: Tensor
    v_floor: Tensor
    q_backspace: Tensor
    backspace_id: int
    ids_without_token: IdRanges = ()

    def v_of_actions(self, tree: TreeBatch) -> Tensor:
        """[A] value of the text before each action."""
        v_all = torch.logaddexp(self.v_floor, self.q_backspace)
        rows = tree.actions.state
        return torch.where(tree.actions.backspace_masked, self.v_floor[rows], v_all[rows])

    def sample_tokens(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """[K] a token drawn after each of the states `rows` [K]; never backspace, which no text holds. By the
        Gumbel-max trick, in chunks of the vocabulary: the largest logit - log(exponential noise) is a draw from the
        softmax."""
        dtype = accumulation_dtype(self.hidden, self.weight)
        width = min(len(self.weight), VOCABULARY_CHUNK)
        drawn: list[Tensor] = []
        for chunk in rows.split(max(1, CHUNK_ELEMENTS // width)):
            hidden = self.hidden[chunk].to(dtype)
            best = hidden.new_full((len(chunk),), -torch.inf)
            token = torch.zeros_like(chunk)
            for number, weight in enumerate(self.weight.split(width)):
                score = hidden @ weight.to(dtype).T
                score -= torch.empty_like(score).exponential_(generator=generator).log_()
                backspace = self.backspace_id - number * width
                if 0 <= backspace < len(weight):
                    score[:, backspace] = -torch.inf
                fill_ids(score, self.ids_without_token, -torch.inf, number * width)
                chunk_best, index = score.max(1)
                token = torch.where(chunk_best > best, index + number * width, token)
                best = torch.maximum(best, chunk_best)
            drawn.append(token)
        return torch.cat(drawn)


Measurement = Callable[[TreeBatch, StateLogits], Tensor]
"""A further measurement of the states for an objective, without gradient. As a `Summation` it runs inside the model's
forward pass, where the ranks have the output embedding whole; a tensor of states x vocabulary is forbidden to it."""

Summation = Callable[[TreeBatch, Tensor], VocabularySum]
"""What an objective sums over the vocabulary for the actions of a tree, given the output embedding [V, H]."""


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
        """Values along the trajectories of `tree` (on the model's device), by one forward pass of the model's
        transformer; at most one of `measurement` and `summation` gives `measured`. With several ranks, all call this
        together.

        The model must pass `learner.model.loading.check_supported`: Q is hidden state times row of the output
        embedding, nothing else.
        """
        assert measurement is None or summation is None, "there is one field for both"
        values: ActionValues = self(tree, measurement, summation)
        return values

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def measure(self, tree: TreeBatch, measurement: Measurement) -> None:
        """Let `measurement` see the states of `tree`, without training. With several ranks, all call this together."""
        self.evaluate(tree, measurement)
        self.release()

    def release(self) -> None:
        """After a forward pass without a backward pass: FSDP's root waits for one, with weights that are a copy."""
        if isinstance(self, FSDPModule):
            self.reshard()

    def forward(self, tree: TreeBatch, measurement: Measurement | None, summation: Summation | None) -> ActionValues:
        """Call `evaluate`: FSDP gathers the weights around this."""
        actions, trajectories = tree.actions, tree.trajectories
        with self.autocast():
            states = _as_computed(evaluate_nodes(self.model, tree).index_select(0, tree.nodes.states))
            weight = _as_computed(self.model.get_output_embeddings().weight)
        with torch.autocast(states.device.type, enabled=False):  # it would round what is multiplied here
            sums = None
            if summation is not None:
                sums = ActionSums(summation(tree, weight.detach()), actions, self.backspace_id)
            values_of = partial(
                chunked_values,
                weight=weight,
                rows=actions.state,
                actions=actions.label,
                backspace_id=self.backspace_id,
                ids_without_token=self.ids_without_token,
            )
            v_floor, q_backspace, q, measured = values_of(states, sums=sums)
            logits = StateLogits(states, weight, v_floor, q_backspace, self.backspace_id, self.ids_without_token)
            if measurement is not None:
                with torch.no_grad():
                    measured = measurement(tree, logits)
            v_all = torch.logaddexp(v_floor, q_backspace)
            v = logits.v_of_actions(tree)
            v_next = torch.where(actions.next_backspace_masked, v_floor[actions.next_state], v_all[actions.next_state])
            v_final = torch.where(
                trajectories.final_backspace_masked, v_floor[trajectories.final], v_all[trajectories.final]
            )
            with torch.no_grad():
                log_prob_backspace = (q_backspace[actions.state] - v).masked_fill(actions.backspace_masked, -torch.inf)
                log_prob_at_temperature = q - v
                for temperature in actions.temperatures:  # logits / temperature are those of states / temperature
                    scaled = (states.float() if states.dtype.itemsize < 4 else states) / temperature
                    v_scaled, backspace_scaled, q_scaled, _ = values_of(scaled)
                    of_scaled = replace(logits, v_floor=v_scaled, q_backspace=backspace_scaled)
                    tempered = q_scaled - of_scaled.v_of_actions(tree)
                    is_sampled_so = actions.behavior_temperature == temperature
                    log_prob_at_temperature = torch.where(is_sampled_so, tempered, log_prob_at_temperature)
            return ActionValues(
                q,
                v,
                v_next,
                v_floor[trajectories.start],
                v_final,
                log_prob_backspace,
                log_prob_at_temperature,
                measured,
            )

    def sequence_logprobs(self, token_ids: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """See the function, for the weights as they are published; with several ranks, all call this together."""
        logprobs: npt.NDArray[np.float32] = self.gathered_sequence_logprobs(token_ids)
        self.release()
        return logprobs

    def gathered_sequence_logprobs(self, token_ids: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A forward pass to FSDP (`learner.ranks` registers it): call `sequence_logprobs`."""
        if isinstance(self, FSDPModule):  # it has gathered parameters that are rounded already
            with self.autocast():
                return sequence_logprobs(self.model, token_ids)
        is_float32 = all(parameter.dtype == torch.float32 for parameter in self.model.parameters())
        # Where nothing is frozen in another format, the products are of float32: what is left of a difference between
        # learner and engine is then the engine's rounding alone.
        with nullcontext() if is_float32 else self.autocast():
            return sequence_logprobs(self.model, token_ids, _rounded_parameters(self.model))


def _as_computed(tensor: Tensor) -> Tensor:
    """In the format of products under autocast, which does not reach into `chunked_values`."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


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
