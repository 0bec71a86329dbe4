"""EMO (Ren, Wu, Zhu, "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling", arXiv 2310.04691).

Moving probability from token i to token j costs C(i, j) = 1 - cos(e_i, e_j), with e the rows of a frozen output
embedding. From the distribution q to the label y alone the earth mover distance is, exactly,

    DEMD = sum_v q(v) C(v, y) = 1 - <sum_v q(v) e_v / |e_v|, e_y / |e_y|>,

and with MLE = -log q(y) and ratios without gradient the loss of an action is

    mode 1   1/2 (MLE + [MLE / (DEMD + 1e-10)] DEMD)        (its value is that of MLE)
    mode 2   [DEMD / (MLE + 1e-10)] MLE + DEMD.

Not consistent: with endless data the optimum is sharper than the data, whatever the costs. Where a binary choice has
probability .7, mode 1 ends at .748. So compare at matched entropy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from learner.objectives.base import EvaluatedLogs, ExpertObjective, LogCounts, Metrics
from learner.objectives.likelihood import likelihood_metrics
from learner.settings.objectives import EmoSettings
from learner.state_tree.action_values import CHUNK_ELEMENTS, VOCABULARY_CHUNK, StateLogits, accumulation_dtype
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import TreePolicy

EPSILON = 1e-10
"""Keeps the ratio of the two losses defined."""

TENSORS_PER_CHUNK = 4
"""As large as the chunk, at hand in its backward pass."""


class Emo(ExpertObjective):
    """The mean of one of the modes over the actions of the global batch.

    Args:
        table: [V, d] embeddings that give the costs. None: those of the model itself as this objective first sees it,
            which is at the start of its stage.
    """

    name = "emo"

    def __init__(self, settings: EmoSettings, table: Tensor | None = None) -> None:
        self._settings = settings
        self._table = table

    def evaluate(self, policy: TreePolicy, tree: TreeBatch, counts: LogCounts, step: int) -> EvaluatedLogs:
        """One forward pass, which measures the DEMD of every action.

        Raises:
            ValueError: the cost table is of another vocabulary.
        """
        return EvaluatedLogs(tree, policy.evaluate(tree, self._measure), counts)

    def data_loss(self, data: EvaluatedLogs, step: int) -> tuple[Tensor, Metrics]:
        """The mode's loss of the labels."""
        assert data.values.measured is not None
        likelihood, distance = -data.values.log_prob, data.values.measured
        loss = data.mean_over_actions(emo_loss(likelihood, distance, self._settings.mode, self._settings.ratio_cap))
        metrics = {
            "loss": loss.detach(),
            "loss_behaviour_cloning": data.mean_over_actions(likelihood).detach(),
            "loss_earth_mover": data.mean_over_actions(distance).detach(),
            **likelihood_metrics(data),
        }
        return loss, metrics

    def state(self) -> dict[str, Tensor]:
        """The frozen table: the weights of a checkpoint no longer are those that it was copied from."""
        return {} if self._table is None else {"table": self._table}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the table of `state()`."""
        self._table = state.get("table", self._table)

    def _measure(self, tree: TreeBatch, logits: StateLogits) -> Tensor:
        if self._table is None:
            self._table = logits.weight.detach().clone()
        if len(self._table) != len(logits.weight):
            raise ValueError(
                f"the cost table has {len(self._table)} rows and the model a vocabulary of {len(logits.weight)}: set "
                "cost_model to one with the same tokenizer, or leave it out to use the model's own embedding"
            )
        self._table = self._table.to(logits.weight.device)
        return earth_mover_distance(tree, logits, self._table)


def emo_loss(likelihood: Tensor, distance: Tensor, mode: int, ratio_cap: float | None = None) -> Tensor:
    """[A] loss of each action, given its -log q(y) and its DEMD. ratio_cap: bound on the detached ratio."""
    numerator, denominator = (likelihood, distance) if mode == 1 else (distance, likelihood)
    ratio = (numerator / (denominator + EPSILON)).detach()
    if ratio_cap is not None:
        ratio = ratio.clamp(max=ratio_cap)
    return (numerator + ratio * denominator) / (2 if mode == 1 else 1)


def earth_mover_distance(tree: TreeBatch, logits: StateLogits, table: Tensor) -> Tensor:
    """[A] DEMD between the policy before each action and its label, by the directions of the rows of `table` [V, d].

    The mean direction of a state, [d], is summed up chunk by chunk over the vocabulary; each chunk of probabilities is
    made again in the backward pass. Where backspace is masked it has no part in it.
    """
    mean = _mean_direction(logits, table)
    dtype = mean.dtype
    labels = normalize(table[tree.action].to(dtype), dim=1)
    backspace = normalize(table[logits.backspace_id].to(dtype), dim=0)
    cosine = (mean.index_select(0, tree.state_row) * labels).sum(1)
    other_share = torch.sigmoid(logits.v_floor - logits.q_backspace)[tree.state_row]
    cosine_all = other_share * cosine + (1 - other_share) * (labels @ backspace)
    # In exact arithmetic nothing is below 0, rounding is.
    return (1 - torch.where(tree.backspace_masked, cosine, cosine_all)).clamp(min=0)


def _mean_direction(logits: StateLogits, table: Tensor) -> Tensor:
    """[M, d] mean of the rows' directions under the distribution of each state over all ids but backspace."""
    dtype = accumulation_dtype(logits.hidden, logits.weight)

    def of_chunk(hidden: Tensor, weight: Tensor, v_floor: Tensor, rows: Tensor, backspace: int) -> Tensor:
        log_q = hidden.to(dtype) @ weight.to(dtype).T - v_floor[:, None]
        if 0 <= backspace < len(weight):
            log_q = log_q.index_fill(1, torch.tensor([backspace], device=log_q.device), -torch.inf)
        return log_q.exp() @ normalize(rows.to(dtype), dim=1)

    width = min(len(table), VOCABULARY_CHUNK)
    means: list[Tensor] = []
    height = max(1, CHUNK_ELEMENTS // (TENSORS_PER_CHUNK * width))
    weights = logits.weight.split(width)  # once: each split has a gradient as large as the whole
    for hidden, v_floor in zip(logits.hidden.split(height), logits.v_floor.split(height), strict=True):
        mean = hidden.new_zeros((len(hidden), table.shape[1]), dtype=dtype)
        for number, weight in enumerate(weights):
            rows = table[number * width : (number + 1) * width]
            arguments = (hidden, weight, v_floor, rows, logits.backspace_id - number * width)
            mean = mean + checkpoint(of_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        means.append(mean)
    return torch.cat(means)
