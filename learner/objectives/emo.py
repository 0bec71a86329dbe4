"""EMO (Ren, Wu, Zhu, "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling", arXiv 2310.04691).

Moving probability from token i to token j costs C(i, j) = 1 - cos(e_i, e_j), with e the rows of a frozen output
embedding. From the distribution q to the label y alone the earth mover distance is, exactly,

    DEMD = sum_v q(v) C(v, y) = 1 - <sum_v q(v) e_v / |e_v|, e_y / |e_y|>,

and with MLE = -log q(y) and ratios without gradient the loss of an action is

    mode 1   1/2 (MLE + [MLE / (DEMD + 1e-10)] DEMD)        (its value is that of MLE)
    mode 2   [DEMD / (MLE + 1e-10)] MLE + DEMD.

Not consistent: with endless data the optimum is sharper than the data, whatever the costs. Where a binary choice has
probability .7, mode 1 ends at .748. So compare at matched entropy.

The authors' package bounds the ratio of mode 1 at 3, which is `ratio_cap: 3` here; without a bound it is the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from learner.objectives.base import EvaluatedLogs, Metrics, Objective
from learner.objectives.likelihood import data_metrics
from learner.settings.objectives import EmoSettings
from learner.state_tree.batch import TreeBatch
from learner.state_tree.vocabulary import CHUNK_ELEMENTS

EPSILON = 1e-10
"""Keeps the ratio of the two losses defined."""

NEAR = 1e-2
"""Costs below this are found without the cosine, whose rounding error is of the order of 1e-7 in float32."""


class Emo(Objective):
    """The mean of one of the modes over the actions of the global batch.

    The embeddings that give the costs are those of `cost_model` (ValueError: it cannot be loaded), or else of the model
    itself at the start of the stage.
    """

    settings: EmoSettings

    def __post_init__(self) -> None:
        self._table = None if self.settings.cost_model is None else _output_embedding(self.settings.cost_model)

    def summation(self, tree: TreeBatch, weight: Tensor) -> EarthMoverDistance:
        """The DEMD of every action. ValueError: the cost table is of another vocabulary."""
        if self._table is None:
            self._table = weight.clone()
        if len(self._table) != len(weight):
            raise ValueError(
                f"the cost table has {len(self._table)} rows and the model a vocabulary of {len(weight)}: set "
                "cost_model to one with the same tokenizer, or leave it out to use the model's own embedding"
            )
        self._table = self._table.to(weight.device)
        return EarthMoverDistance(self._table, tree.actions.label)

    def data_loss(self, data: EvaluatedLogs, step: int) -> tuple[Tensor, Metrics]:
        """The mode's loss of the labels."""
        assert data.values.measured is not None
        likelihood, distance = -data.values.log_prob, data.values.measured
        loss = data.mean_over_actions(emo_loss(likelihood, distance, self.settings.mode, self.settings.ratio_cap))
        return loss, data_metrics(data, loss, loss_earth_mover=data.mean_over_actions(distance))

    def state(self) -> dict[str, Tensor]:
        """The frozen table: the weights of a checkpoint no longer are those that it was copied from."""
        return {} if self._table is None else {"table": self._table}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the table of `state()`."""
        self._table = state.get("table", self._table)


def _output_embedding(name: str) -> Tensor:
    """[V, d] of a model in the Hugging Face format; the rest of the model is let go."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
    except OSError as error:
        raise ValueError(f"cost_model {name!r} cannot be loaded: {error}") from error
    table: Tensor = model.get_output_embeddings().weight.detach().clone()
    return table


def emo_loss(likelihood: Tensor, distance: Tensor, mode: int, ratio_cap: float | None = None) -> Tensor:
    """[A] loss of each action, given its -log q(y) and its DEMD. ratio_cap: bound on the detached ratio."""
    numerator, denominator = (likelihood, distance) if mode == 1 else (distance, likelihood)
    ratio = (numerator / (denominator + EPSILON)).detach()
    if ratio_cap is not None:
        ratio = ratio.clamp(max=ratio_cap)
    return (numerator + ratio * denominator) / (2 if mode == 1 else 1)


class EarthMoverDistance:
    """DEMD between the policy before each action and its label, by the directions of the rows of `table` [V, d].

    A sum of q(v) C(v, y) without a difference of large numbers: 1 less a mean of cosines would lose the distance where
    the policy is nearly certain of the label, or of an id with the same direction. The derivative by a logit is
    q(v) (C(v, y) - DEMD). Where backspace is masked it has no part in it.
    """

    ids: Tensor | None = None

    def __init__(self, table: Tensor, labels: Tensor) -> None:
        self._table = table
        self._labels = labels

    def terms(self, q: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        return (q * self._cost(actions, ids, q.dtype)).sum(1)[None]

    def gradient(self, q: Tensor, sums: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        return q * (self._cost(actions, ids, q.dtype) - sums[0][:, None])

    def _cost(self, actions: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[a, w] of each id to the label of each action."""
        directions = normalize(self._table[ids].to(dtype), dim=1)
        labels = normalize(self._table[self._labels[actions]].to(dtype), dim=1)
        cost = 1 - labels @ directions.T
        # Of rows that are nearly parallel, 1 - cosine is rounding alone; half the squared difference is not.
        row, column = (cost < NEAR).nonzero(as_tuple=True)
        pairs = max(1, CHUNK_ELEMENTS // directions.shape[1])
        for i, j in zip(row.split(pairs), column.split(pairs), strict=True):
            cost[i, j] = (labels[i] - directions[j]).square().sum(1) / 2
        return cost
