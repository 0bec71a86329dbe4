"""Scheduled sampling (Bengio et al. 2015, arXiv 1506.03099), in two passes over a transformer.

The first pass evaluates the true text. Then each token of an answer is kept with probability eps, or else replaced by
one that the model draws where the token stood; the second pass evaluates the mixed text against the true labels, and
alone has a gradient. Prompts are always true. A token that several logs share in the tree is replaced for all of them.

Not consistent (Huszar 2015, arXiv 1511.05101): the optimum mixes the conditional with the marginal distribution,
eps P(x2 | x1) + (1 - eps) P(x2) on texts of two tokens; at eps = 0 the model forgets what its text holds.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from learner.objectives.base import EvaluatedLogs, LogCounts, Metrics, Objective
from learner.objectives.likelihood import cross_entropy, data_metrics
from learner.settings.objectives import ScheduledSamplingSettings
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import StateLogits, TreePolicy


class ScheduledSampling(Objective):
    """Cross-entropy of the labels after texts that are partly the model's, mean over actions of the global batch."""

    settings: ScheduledSamplingSettings

    def truth_share(self, step: int) -> float:
        """eps: the probability that a token of an answer is the true one, at optimizer step `step`."""
        k = self.settings.k
        if self.settings.schedule == "linear":
            return max(self.settings.least_truth_share, k - self.settings.slope * step)
        if self.settings.schedule == "exponential":
            return float(k**step)
        exponent = math.log(k) - step / k  # k / (k + exp(step / k)), where that exponential would overflow
        return 1 / (1 + math.exp(-exponent)) if exponent >= 0 else math.exp(exponent) / (1 + math.exp(exponent))

    def evaluate(self, policy: TreePolicy, tree: TreeBatch, counts: LogCounts, step: int) -> EvaluatedLogs:
        """Two forward passes. What is drawn depends on the seed, the step and the logs of the pass alone: a resumed run
        repeats it."""
        key = "/".join([str(self.settings.seed), str(step), *tree.trajectories.ids])
        generator = torch.Generator(tree.nodes.token_ids.device).manual_seed(zlib.crc32(key.encode()))
        mixing = partial(mixed_tokens, truth_share=self.truth_share(step), generator=generator)
        with torch.no_grad():
            tokens = policy.evaluate(tree, mixing).measured
        assert tokens is not None
        mixed = replace(tree, nodes=replace(tree.nodes, token_ids=tokens))
        return EvaluatedLogs(mixed, policy.evaluate(mixed), counts)

    def data_loss(self, data: EvaluatedLogs, step: int) -> tuple[Tensor, Metrics]:
        """Cross-entropy of the true labels."""
        loss = cross_entropy(data)
        truth_share = loss.new_tensor(self.truth_share(step) * data.share)
        return loss, data_metrics(data, loss, truth_share=truth_share)


def mixed_tokens(tree: TreeBatch, logits: StateLogits, truth_share: float, generator: torch.Generator) -> Tensor:
    """[N] the tokens of the tree, where those of answers are the model's with probability 1 - truth_share each."""
    nodes, writers = tree.answer_nodes()
    start = tree.nodes.states[tree.trajectories.start][:, None]
    in_prompt = ((nodes <= start) & (tree.nodes.subtree_end[nodes] > start)).any(0)
    is_model = torch.rand(tree.num_padded_nodes, generator=generator, device=nodes.device) >= truth_share
    replaced = is_model[nodes] & ~in_prompt
    tokens = logits.sample_tokens(tree.actions.state[writers[replaced]], generator)
    return tree.nodes.token_ids.index_copy(0, nodes[replaced], tokens)
