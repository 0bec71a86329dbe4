"""How well a model predicts the held-out texts, by the learner's own forward pass.

perplexity                    exp of the mean negative log-probability per token, `<eos>` at the end of complete texts
                              included, under the policy: what it gives to backspace is lost to the tokens.
perplexity_without_backspace  the same under the tokens' own distribution: renormalized without backspace.
backspace_prob                mean probability of backspace before a token, where it can be taken: on held-out texts it
                              would delete a right token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from buffer.experts.ragged import Ragged
from buffer.experts.stream import ExpertStream, NoisePlan
from buffer.settings import NoiseSettings
from buffer.trajectory.schema import TokenContract
from launch.statistics import Estimate, Float64
from learner.batches.micro_batches import build_micro_batches
from learner.state_tree.batch import TreeBatch, TreeSettings
from learner.state_tree.policy import StateLogits, TreePolicy

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

MAX_NODES_PER_BATCH = 2048


@torch.no_grad()  # type: ignore[untyped-decorator]
def held_out_metrics(
    model: PreTrainedModel, examples: Dataset, contract: TokenContract, max_length: int
) -> dict[str, Estimate]:
    """The numbers of the module's description; errors are of texts, which are drawn as a whole.

    examples: columns `prompt_ids` and `target_ids`.
    """
    policy = TreePolicy(model, contract.backspace_id, contract.ids_without_token)
    ids = contract.backspace_id, contract.eos_id
    settings = TreeSettings(*ids, MAX_NODES_PER_BATCH, max_length, other_eos_ids=contract.other_eos_ids)
    totals = np.zeros((5, len(examples)))
    for tree in build_micro_batches(_expert_logs(examples, contract), settings):
        values = policy.evaluate(tree.to(policy.device), _log_sum_without_backspace)
        assert values.measured is not None
        text = np.array([int(name.rsplit("/", 1)[1]) for name in tree.trajectories.ids])[
            tree.actions.trajectory.numpy()
        ]
        columns = torch.stack(
            [
                -values.log_prob.double(),
                (values.measured - values.q).double(),
                values.log_prob_backspace.double().exp(),
                torch.ones_like(values.log_prob, dtype=torch.float64),
                torch.isfinite(values.log_prob_backspace).double(),  # where backspace can be taken
            ]
        )
        totals += [np.bincount(text, column, minlength=len(examples)) for column in columns.cpu().numpy()]
    loss, loss_without, backspace, tokens, can_undo = totals
    return {
        "perplexity": _perplexity(loss, tokens),
        "perplexity_without_backspace": _perplexity(loss_without, tokens),
        "backspace_prob": Estimate.ratio(backspace, can_undo),
    }


def _log_sum_without_backspace(tree: TreeBatch, logits: StateLogits) -> torch.Tensor:
    """[A] log-sum-exp of the logits before each action, without backspace's."""
    return logits.v_floor[tree.actions.state]


def _perplexity(loss: Float64, tokens: Float64) -> Estimate:
    """exp of the ratio of sums, its error by the delta method."""
    mean = Estimate.ratio(loss, tokens)
    assert mean.value is not None
    assert mean.influence is not None
    value = float(np.exp(mean.value))
    return Estimate.linear(value, value * mean.influence, mean.count)


def _expert_logs(examples: Dataset, contract: TokenContract) -> pa.RecordBatch:
    """The held-out texts as logs without noise, in their order; their ids end in the number of the example."""
    columns = examples.select_columns(["prompt_ids", "target_ids"]).with_format("arrow")[:]
    prompts, targets = (Ragged.from_arrow(columns.column(name)) for name in ("prompt_ids", "target_ids"))
    nothing = np.zeros(0, dtype=np.int64)
    plan = NoisePlan(0, prompts, targets, np.zeros(len(examples), dtype=np.int64), positions=nothing)
    none = NoiseSettings(kind="none")
    stream = ExpertStream(examples, task="held-out", noise=none, contract=contract, seed=0, actor="evaluation")
    return stream.realise(plan, np.zeros(0, dtype=np.int32))
