"""Objectives of expert trajectories alone, action by action: likelihood, unlikelihood, EMO, scheduled sampling.

All but likelihood are inconsistent: with infinite data their optimum differs from the distribution of the data. Compare
them at matched entropy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from learner.objectives.base import BatchCounts, EvaluatedTrajectories, Metrics, Objective, cross_entropy, data_metrics
from learner.settings.objectives import EmoSettings, ScheduledSamplingSettings, UnlikelihoodSettings
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import StateLogits, TreePolicy
from learner.state_tree.vocabulary import CHUNK_ELEMENTS

LEAST_COMPLEMENT = 1e-5
"""Lower bound of 1 - q(c): the slope of log(1 - q) is infinite at q = 1."""

PROBABLE = 0.75
"""The slope of a context token with more than this probability is summed separately from the others."""

EPSILON = 1e-10
"""Added to the denominator of the ratio of the two losses of EMO."""

NEAR = 1e-2
"""Costs below this are found without the cosine, whose rounding error is of the order of 1e-7 in float32."""


class Likelihood(Objective):
    """-E_data[log p(a|s)], mean over the actions of the global batch. `mle` and `behavior_cloning` have the same
    formula and different trajectories."""

    def data_loss(self, data: EvaluatedTrajectories, step: int) -> tuple[Tensor, Metrics]:
        loss = cross_entropy(data)
        return loss, data_metrics(data, loss)


class Unlikelihood(Objective):
    """Likelihood, minus tokens that the context already holds (Welleck et al. 2019, arXiv 1908.04319).

    Per action with label y after text s, and C the distinct tokens of s (its prompt included) but y,

        -log q(y) - weight * sum over c in C of log(1 - q(c)).

    The optimum puts less on repeated tokens than the data do.
    """

    settings: UnlikelihoodSettings

    def summation(self, tree: TreeBatch, weight: Tensor) -> ContextUnlikelihood:
        return ContextUnlikelihood(tree)

    def data_loss(self, data: EvaluatedTrajectories, step: int) -> tuple[Tensor, Metrics]:
        assert data.values.measured is not None
        unlikelihood = data.mean_over_actions(data.values.measured)
        loss = cross_entropy(data) + self.settings.weight * unlikelihood
        return loss, data_metrics(data, loss, loss_unlikelihood=unlikelihood)


class ContextUnlikelihood:
    """-sum of log(1 - q(c)) over the distinct tokens c of the text before each action, its label left out.

    With h(c) = q(c) / (1 - q(c)) the derivative by the logit of any id v is [v in C] h(v) - q(v) sum_C h. Near q(c) = 1
    both parts of c's own are large and nearly equal; together they are q(c) (1 - sum over the others of h). At most one
    token is that probable, so the sums keep it apart: of each action the loss, the sum of h over the others, and h of
    the probable one (0 where there is none, or where the bound on 1 - q holds and there is no slope).
    """

    def __init__(self, tree: TreeBatch) -> None:
        self._tree = tree
        self.ids: Tensor | None = torch.unique(tree.nodes.token_ids)

    def terms(self, q: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        q = q.masked_fill(~self._counted(actions, ids), 0.0)
        complement = (1 - q).clamp(min=LEAST_COMPLEMENT)
        slope = torch.where(1 - q > LEAST_COMPLEMENT, q / complement, 0.0)
        is_probable = q > PROBABLE
        loss = torch.where(is_probable, -complement.log(), -torch.log1p(-q.clamp(max=PROBABLE)))
        others, probable = slope.masked_fill(is_probable, 0.0), slope.masked_fill(~is_probable, 0.0)
        return torch.stack([loss.sum(1), others.sum(1), probable.sum(1)])

    def gradient(self, q: Tensor, sums: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        _, others, probable = sums[:, :, None]
        # Rounding may differ from that of `terms`, which has decided: what was above PROBABLE is above 1/2 here too.
        is_probable = (q > 0.5) & (probable > 0)
        is_bounded = (q > (1 + PROBABLE) / 2) & (probable == 0)
        own = torch.where(is_bounded, 0.0, q / (1 - q).clamp(min=LEAST_COMPLEMENT))
        by_v = q * (others + probable)
        of_context = torch.where(is_probable, q * (1 - others), own - by_v)
        return torch.where(self._counted(actions, ids), of_context, -by_v)

    def _counted(self, actions: Tensor, ids: Tensor) -> Tensor:
        """[a, w] whether the id stands in the text before the action, and is not its label."""
        tree = self._tree
        states, labels = tree.nodes.states[tree.actions.state[actions]], tree.actions.label[actions]
        place = torch.searchsorted(ids, tree.nodes.token_ids).clamp(max=len(ids) - 1)
        nodes = (ids[place] == tree.nodes.token_ids).nonzero().flatten()
        precedes = (nodes <= states[:, None]) & (tree.nodes.subtree_end[nodes] > states[:, None])
        seen = torch.zeros((len(actions), len(ids)), dtype=torch.uint8, device=ids.device)
        seen.scatter_reduce_(1, place[nodes].expand_as(precedes), precedes.to(torch.uint8), "amax")
        return seen.bool() & (ids != labels[:, None])


class Emo(Objective):
    """Earth mover distance (Ren, Wu, Zhu, arXiv 2310.04691).

    Moving probability from token i to token j costs C(i, j) = 1 - cos(e_i, e_j), with e the rows of a frozen output
    embedding: that of `cost_model` (ValueError: it cannot be loaded), or else of the model at the start of the stage.
    From the distribution q to the label y alone the distance is, exactly,

        DEMD = sum_v q(v) C(v, y) = 1 - <sum_v q(v) e_v / |e_v|, e_y / |e_y|>,

    and with MLE = -log q(y) and ratios without gradient the loss of an action is

        mode 1   1/2 (MLE + [MLE / (DEMD + 1e-10)] DEMD)        (its value is that of MLE)
        mode 2   [DEMD / (MLE + 1e-10)] MLE + DEMD.

    Where a binary choice has probability .7, mode 1 ends at .748. The authors' package bounds the ratio of mode 1 at 3,
    which is `ratio_cap: 3` here; without a bound it is the paper's.
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

    def data_loss(self, data: EvaluatedTrajectories, step: int) -> tuple[Tensor, Metrics]:
        assert data.values.measured is not None
        likelihood, distance = -data.values.log_prob, data.values.measured
        loss = data.mean_over_actions(emo_loss(likelihood, distance, self.settings.mode, self.settings.ratio_cap))
        return loss, data_metrics(data, loss, loss_earth_mover=data.mean_over_actions(distance))

    def state(self) -> dict[str, Tensor]:
        """The frozen table: no checkpoint holds the weights that it was copied from."""
        return {} if self._table is None else {"table": self._table}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._table = state.get("table", self._table)


def _output_embedding(name: str) -> Tensor:
    """[V, d] of a model in the Hugging Face format; the rest of the model is freed."""
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


class ScheduledSampling(Objective):
    """Cross-entropy of the labels after texts that are partly the model's (Bengio et al. 2015, arXiv 1506.03099).

    The first pass evaluates the true text. Then each token of an answer is kept with probability eps, or else replaced
    by one that the model draws where the token stood; the second pass evaluates the mixed text against the true labels,
    and alone has a gradient. Prompts are always true. A token that several trajectories share is replaced for all of
    them.

    The optimum mixes the conditional with the marginal distribution (Huszar 2015, arXiv 1511.05101), eps P(x2 | x1) +
    (1 - eps) P(x2) on texts of two tokens; at eps = 0 the model ignores its text.
    """

    settings: ScheduledSamplingSettings

    def truth_fraction(self, step: int) -> float:
        """eps: the probability that a token of an answer is the true one, at optimizer step `step`."""
        k = self.settings.k
        if self.settings.schedule == "linear":
            return max(self.settings.least_truth_fraction, k - self.settings.slope * step)
        if self.settings.schedule == "exponential":
            return float(k**step)
        exponent = math.log(k) - step / k  # k / (k + exp(step / k)), where that exponential would overflow
        return 1 / (1 + math.exp(-exponent)) if exponent >= 0 else math.exp(exponent) / (1 + math.exp(exponent))

    def evaluate(self, policy: TreePolicy, tree: TreeBatch, counts: BatchCounts, step: int) -> EvaluatedTrajectories:
        """Two forward passes. The replaced tokens depend only on seed, step and the trajectories of the pass, so that a
        resumed run repeats them."""
        key = "/".join([str(self.settings.seed), str(step), *tree.trajectories.ids])
        generator = torch.Generator(tree.nodes.token_ids.device).manual_seed(zlib.crc32(key.encode()))
        mixing = partial(mixed_tokens, truth_fraction=self.truth_fraction(step), generator=generator)
        with torch.no_grad():
            tokens = policy.evaluate(tree, mixing).measured
        assert tokens is not None
        mixed = replace(tree, nodes=replace(tree.nodes, token_ids=tokens))
        return EvaluatedTrajectories(mixed, policy.evaluate(mixed), counts)

    def data_loss(self, data: EvaluatedTrajectories, step: int) -> tuple[Tensor, Metrics]:
        loss = cross_entropy(data)
        truth_fraction = loss.new_tensor(self.truth_fraction(step) * data.fraction)
        return loss, data_metrics(data, loss, truth_fraction=truth_fraction)


def mixed_tokens(tree: TreeBatch, logits: StateLogits, truth_fraction: float, generator: torch.Generator) -> Tensor:
    """[N] the tokens of the tree, where those of answers are the model's with probability 1 - truth_fraction each."""
    nodes, writers = tree.answer_nodes()
    start = tree.nodes.states[tree.trajectories.start][:, None]
    in_prompt = ((nodes <= start) & (tree.nodes.subtree_end[nodes] > start)).any(0)
    is_model = torch.rand(tree.num_padded_nodes, generator=generator, device=nodes.device) >= truth_fraction
    replaced = is_model[nodes] & ~in_prompt
    tokens = logits.sample_tokens(tree.actions.state[writers[replaced]], generator)
    return tree.nodes.token_ids.index_copy(0, nodes[replaced], tokens)
