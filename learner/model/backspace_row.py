"""The row of the output embedding that makes the logit of backspace, in a model that was trained without.

Backspace is an output only: the text never holds it, so no other weight knows of it. The row must be told from other
untrained rows (reserved tokens are often bitwise equal, and so would their logits be), hence it starts as the mean row
plus a little seeded noise. That is far below every token: in SmolLM2-135M backspace begins at a probability of 1e-8,
and training needs hundreds of steps to bring it to where it is ever sampled. So before the first stage that shows
backspaces the row is fitted to them, all other weights as they are: a logistic regression on the states before the
actions, with the sum over the tokens as the other side,

    P(backspace | s) = sigmoid(row . h(s) - logsumexp_x Q(s, x)),

and with the model's other rows as the prior of this one: each coordinate normal, with their mean and deviation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from buffer.trajectory.schema import IdRanges
from learner.ranks import gathered, load_tensors
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import StateLogits, TreePolicy
from learner.state_tree.vocabulary import fill_ids

BACKSPACE_ROW_NOISE = 0.1
"""Noise on a new backspace row, as a share of the standard deviation over the rows."""

_MAX_NEWTON_STEPS = 100
_TOLERANCE = 1e-8  # of the Newton decrement, in nats of the whole sample
_SMALLEST_DEVIATION = 1e-3  # of a coordinate, as a share of the mean over the coordinates: none is fixed for certain


@dataclass(frozen=True)
class BackspaceEvidence:
    """States in which backspace could be taken, float64.

    hidden: [N, H]. log_sum: [N] log-sum-exp of the logits of all tokens. taken: [N] 1 where backspace was, else 0.
    mean, deviation: [H] of the other rows of the output embedding.
    """

    hidden: Tensor
    log_sum: Tensor
    taken: Tensor
    mean: Tensor
    deviation: Tensor

    def logit(self, row: Tensor) -> Tensor:
        """[N] log-odds of backspace, were `row` [H] its row of the output embedding."""
        return self.hidden @ row - self.log_sum

    def misfit(self, row: Tensor) -> Tensor:
        """Scalar: nats of all N choices for or against backspace."""
        logit = self.logit(row)
        return torch.nn.functional.softplus(logit).sum() - self.taken @ logit

    def odds(self, row: Tensor) -> tuple[float, float, float]:
        """Mean probability of backspace where it is shown, and where it could be taken and is not; nats of one choice
        for or against it. nan where there is no such state."""
        share, shown = torch.sigmoid(self.logit(row)), self.taken.bool()
        return float(share[shown].mean()), float(share[~shown].mean()), float(self.misfit(row) / len(self.taken))


@torch.no_grad()  # type: ignore[untyped-decorator]
def initialize_backspace_row(
    model: PreTrainedModel, backspace_id: int, seed: int, ids_without_token: IdRanges = ()
) -> None:
    """Set the backspace row of the embeddings (in place) to the mean row of the tokens plus small seeded noise."""
    generator = torch.Generator().manual_seed(seed)
    weights: list[Tensor] = [model.get_output_embeddings().weight]
    if model.get_input_embeddings().weight is not weights[0]:
        weights.append(model.get_input_embeddings().weight)
    for weight in weights:
        mean, deviation = _other_rows(weight, backspace_id, ids_without_token)
        noise = torch.randn(len(mean), generator=generator).to(weight.device)
        weight[backspace_id] = (mean + BACKSPACE_ROW_NOISE * deviation * noise).to(weight.dtype)


def fit_backspace_row(policy: TreePolicy, trees: Iterable[TreeBatch]) -> Tensor:
    """Set the backspace row of the output embedding (in place) to the fit of the module's description; gives it, [H].
    trees: of demonstrations; with several ranks the same ones at each, in the same order."""
    row = most_probable_row(gather_evidence(policy, trees))
    weight = policy.model.get_output_embeddings().weight
    whole = gathered(weight)
    whole[policy.backspace_id] = row.to(whole.dtype)
    load_tensors({"weight": weight}, {"weight": whole})
    return row


def gather_evidence(policy: TreePolicy, trees: Iterable[TreeBatch]) -> BackspaceEvidence:
    """What a policy's states say, on the CPU. All ranks call this together."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    rows: tuple[Tensor, Tensor] | None = None

    def measure(tree: TreeBatch, logits: StateLogits) -> Tensor:
        nonlocal rows
        if rows is None:
            rows = _other_rows(logits.weight, policy.backspace_id, policy.ids_without_token)
        free = ~tree.actions.backspace_masked
        states = tree.actions.state[free]
        found.append((logits.hidden[states], logits.v_floor[states], tree.actions.label[free] == policy.backspace_id))
        return logits.v_floor

    for tree in trees:
        policy.measure(tree.to(policy.device), measure)
    assert rows is not None, "there is a tree"
    hidden, log_sum, taken = (torch.cat(parts).double().cpu() for parts in zip(*found, strict=True))
    mean, deviation = (part.double().cpu() for part in rows)
    return BackspaceEvidence(hidden, log_sum, taken, mean, deviation)


def most_probable_row(evidence: BackspaceEvidence) -> Tensor:
    """[H] float64: maximum a posteriori of the row, by Newton's method with step halving; the problem is convex."""
    deviation = evidence.deviation.clamp_min(_SMALLEST_DEVIATION * float(evidence.deviation.mean()))
    precision = deviation**-2
    row = evidence.mean.clone()
    loss = _loss(row, evidence, precision)
    for _ in range(_MAX_NEWTON_STEPS):
        share = torch.sigmoid(evidence.logit(row))
        gradient = evidence.hidden.T @ (share - evidence.taken) + precision * (row - evidence.mean)
        curvature = evidence.hidden.T @ (evidence.hidden * (share * (1.0 - share))[:, None]) + torch.diag(precision)
        step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(curvature)).squeeze(1)
        decrement = float(gradient @ step)
        if decrement < _TOLERANCE:
            break
        scale = 1.0
        while (trial := _loss(row - scale * step, evidence, precision)) > loss - 0.25 * scale * decrement:
            scale /= 2.0
        row, loss = row - scale * step, trial
    return row


def _loss(row: Tensor, evidence: BackspaceEvidence, precision: Tensor) -> float:
    """Negative log-posterior, but for a constant, in nats."""
    return float(evidence.misfit(row) + 0.5 * (precision * (row - evidence.mean) ** 2).sum())


def _other_rows(weight: Tensor, backspace_id: int, ids_without_token: IdRanges) -> tuple[Tensor, Tensor]:
    """[H] mean and standard deviation over the rows of all tokens but backspace, float32."""
    is_other = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    is_other[backspace_id] = False
    fill_ids(is_other, ids_without_token, False)
    others = weight[is_other].float()
    return others.mean(0), others.std(0)
