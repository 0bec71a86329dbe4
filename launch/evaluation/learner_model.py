"""What an evaluation takes from the learner's model, not from the engine: held-out probabilities, contrastive search.

perplexity                    exp of the mean negative log-probability per token, `<eos>` at the end of complete texts
                              included, under the policy: what it gives to backspace is lost to the tokens.
perplexity_without_backspace  the same under the tokens' own distribution: renormalized without backspace.
backspace_prob                mean probability of backspace before a token, where it can be taken: on held-out texts it
                              would delete a right token.

Contrastive search (Su et al., arXiv 2202.06417): of the k most likely tokens v after a text, the one with the largest
(1 - alpha) p(v) - alpha max_j cos(h_v, h_j) is appended. h_v is the last hidden state at v, h_j those of the text
before it, prompt included. Backspace is no candidate: the search is a baseline for models that write on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from actors.engine.interface import FinishedRollout, Int32, rollouts_to_batch
from buffer.experts.stream import clean_trajectories
from buffer.trajectory.schema import TokenContract
from launch.evaluation.rollouts import RolloutGroup
from launch.generation import Checkpoint, library_chatter_held
from launch.settings.evaluation import ContrastiveSearch
from launch.statistics import Estimate, Float64
from learner.batches import build_micro_batches
from learner.model.loading import load_model
from learner.settings.model import PretrainedModelSettings
from learner.state_tree.batch import TreeSettings
from learner.state_tree.policy import TreePolicy
from learner.state_tree.vocabulary import fill_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

MAX_TOKENS_PER_MICRO_BATCH = 2048
BATCH_PROMPTS = 16


def load_for_evaluation(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint in float32, as the learner loads it, on the GPU if there is one."""
    settings = PretrainedModelSettings(name=str(checkpoint.folder), dtype="float32")
    with library_chatter_held():
        model = load_model(settings, checkpoint.tokenizer)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()  # type: ignore[untyped-decorator]
def held_out_metrics(
    model: PreTrainedModel, examples: Dataset, contract: TokenContract, max_length: int
) -> dict[str, Estimate]:
    """The numbers of the module's description, with errors over texts. examples: with `prompt_ids`, `target_ids`."""
    policy = TreePolicy(model, contract.backspace_id, contract.ids_without_token)
    ids = contract.backspace_id, contract.eos_id
    settings = TreeSettings(*ids, MAX_TOKENS_PER_MICRO_BATCH, max_length, other_eos_ids=contract.other_eos_ids)
    totals = np.zeros((5, len(examples)))
    for tree in build_micro_batches(clean_trajectories(examples, contract), settings):
        # [A] log-sum-exp of the logits before each action, without backspace's
        values = policy.evaluate(tree.to(policy.device), lambda at, logits: logits.v_floor[at.actions.state])
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


def _perplexity(loss: Float64, tokens: Float64) -> Estimate:
    """exp of the ratio of sums, its error by the delta method."""
    mean = Estimate.ratio(loss, tokens)
    assert mean.value is not None
    assert mean.influence is not None
    value = float(np.exp(mean.value))
    return Estimate.linear(value, value * mean.influence, mean.count)


def contrastive_rollouts(
    model: PreTrainedModel,
    group: RolloutGroup,
    contract: TokenContract,
    max_length: int,
    task: str,
    on_finished: Callable[[int], None],
) -> pa.RecordBatch:
    """Continue every prompt of a group; rows of the trajectory schema in the order of its prompts."""
    assert group.contrastive is not None
    prompts, sampling = group.prompts, group.sampling
    rollouts: dict[int, FinishedRollout] = {}
    for batch in _batches_of_one_length(prompts):
        room = min(sampling.max_new_tokens, sampling.max_actions, max_length - len(prompts[batch[0]]))
        ids, logprobs = search(model, np.stack([prompts[index] for index in batch]), room, group.contrastive, contract)
        for index, actions, chosen in zip(batch, ids, logprobs, strict=True):
            ended = np.flatnonzero(np.isin(actions, contract.eos_ids))
            length = int(ended[0]) + 1 if len(ended) else len(actions)
            rollouts[index] = FinishedRollout(
                request_id=f"{group.name}/{index}",
                prompt_ids=prompts[index],
                actions=actions[:length],
                logprobs=chosen[:length],
                policy_version=np.zeros(length, dtype=np.int32),
                finish_reason="eos" if len(ended) else "max_length",
            )
        on_finished(len(batch))
    in_order = [rollouts[index] for index in range(len(prompts))]
    return rollouts_to_batch(
        in_order, contract, task=task, actor="contrastive", sampling=sampling, weights_fingerprint=None
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def search(
    model: PreTrainedModel, prompts: Int32, num_tokens: int, settings: ContrastiveSearch, contract: TokenContract
) -> tuple[Int32, np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
    """Continue B prompts of one length by up to `num_tokens` tokens; what follows `<eos>` in a row means nothing.

    prompts: [B, P]. Returns ids [B, T] and their log-probabilities [B, T] among the tokens without backspace.
    """
    num_prompts, k = len(prompts), settings.num_candidates
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    out = decoder(input_ids=torch.from_numpy(prompts).long().to(model.device), use_cache=True)
    context, cache = out.last_hidden_state, out.past_key_values
    last = context[:, -1]
    rows = torch.arange(num_prompts, device=model.device)
    chosen_ids, chosen_logprobs = [], []
    eos_ids = torch.tensor(contract.eos_ids, device=model.device)
    ended = torch.zeros(num_prompts, dtype=torch.bool, device=model.device)
    for _ in range(num_tokens):
        logits = head(last).float()
        logits[:, contract.backspace_id] = -torch.inf
        fill_ids(logits, contract.ids_without_token, -torch.inf)
        logprobs, candidates = logits.log_softmax(-1).topk(k)
        cache.batch_repeat_interleave(k)
        states = decoder(input_ids=candidates.reshape(-1, 1), past_key_values=cache, use_cache=True).last_hidden_state
        states = states.reshape(num_prompts, k, -1)
        cosine = torch.nn.functional.normalize(states, dim=-1) @ torch.nn.functional.normalize(context, dim=-1).mT
        score = (1.0 - settings.penalty) * logprobs.exp() - settings.penalty * cosine.amax(-1)
        best = score.argmax(-1)
        cache.batch_select_indices(rows * k + best)
        last = states[rows, best]
        context = torch.cat([context, last[:, None]], dim=1)
        chosen_ids.append(candidates[rows, best])
        chosen_logprobs.append(logprobs[rows, best])
        ended |= torch.isin(chosen_ids[-1], eos_ids)
        if ended.all():
            break
    ids = torch.stack(chosen_ids, 1).cpu().numpy().astype(np.int32)
    return ids, torch.stack(chosen_logprobs, 1).cpu().numpy()


def _batches_of_one_length(prompts: Sequence[Int32]) -> list[list[int]]:
    """Indexes of prompts, so that nothing needs padding."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    starts = ((same, begin) for same in by_length.values() for begin in range(0, len(same), BATCH_PROMPTS))
    return [same[begin : begin + BATCH_PROMPTS] for same, begin in starts]
