"""Action values of a causal language model: Q(s, a) = logit of a after text s, V(s) = logsumexp_a Q(s, a).

At the floor (the end of the prompt) backspace is masked, as it is in the actors, so there V sums over the
other actions only; so it does everywhere in a log whose sampler never offered backspace. Ids that no token has are
no actions anywhere. `log_prob = q - v` then is the log-probability under the policy that acted.

A tensor of tokens x vocabulary is never held: logits are made in chunks, folded into a running log-sum-exp, and but for
the first few made again in the backward pass. Q, V and sums over the vocabulary come from one function of states and
output embedding, so parts of the gradient that nearly cancel are added at the logits in float32, before any rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from buffer.trajectory.schema import IdRanges
from learner.state_tree.attention import evaluate_nodes
from learner.state_tree.batch import TreeBatch
from learner.state_tree.products import (
    CHUNK_ELEMENTS,
    VOCABULARY_CHUNK,
    accumulation_dtype,
    fill_ids,
    matmul,
    matmul_operand,
)
from learner.state_tree.vocabulary_sums import ActionSums, Summation

KEPT_ELEMENTS = 2**25
"""Logits kept for the backward pass (128 MiB in float32): whatever is small is not computed twice."""


@dataclass(frozen=True)
class ActionValues:
    """Values along the logs of a `TreeBatch` (A actions, L logs), float32.

    q: [A] logit of the label.
    v, v_next: [A] value of the text before and after the action.
    v_start, v_final: [L] value of the first and the last text.
    log_prob_backspace: [A] of backspace before the action, without gradient (-inf where it is masked).
    log_prob_at_temperature: [A] of the label at the temperature that its policy sampled with, without gradient; that of
        temperature 1 where there is none (`behaviour_temperature` 0).
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
        """[K] a token drawn after each of the states `rows` [K]; never backspace, which no text holds.

        By the Gumbel-max trick, so that the vocabulary is gone through in chunks: the largest logit - log(exponential
        noise) is a draw from the softmax.
        """
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
"""What else an objective wants to know of the states, without gradient. It runs inside the model's forward pass, where
the ranks have the output embedding whole; a tensor of states x vocabulary is as forbidden to it as to this file."""


def action_values(
    model: PreTrainedModel,
    tree: TreeBatch,
    backspace_id: int,
    *,
    ids_without_token: IdRanges = (),
    measurement: Measurement | None = None,
    summation: Summation | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ActionValues:
    """Evaluate `model` on every state of `tree` with one forward pass of its transformer.

    The model must pass `learner.model.support.check_supported`: Q is hidden state times row of the output embedding,
    nothing else. Under FSDP call this inside a wrapped forward, so that the output embedding is gathered.
    At most one of `measurement` and `summation` gives `measured`.
    """
    assert measurement is None or summation is None, "there is one field for both"
    actions, logs = tree.actions, tree.trajectories
    states = _as_computed(evaluate_nodes(model, tree).index_select(0, tree.nodes.states))
    weight = _as_computed(model.get_output_embeddings().weight)
    with torch.autocast(states.device.type, enabled=False):  # it would round what is multiplied here
        sums = None
        if summation is not None:
            summed = summation(tree, weight.detach())
            sums = ActionSums(summed, actions, backspace_id, ids_without_token, chunk_elements)
        values_of = partial(
            chunked_values,
            weight=weight,
            rows=actions.state,
            actions=actions.label,
            backspace_id=backspace_id,
            ids_without_token=ids_without_token,
            chunk_elements=chunk_elements,
        )
        v_floor, q_backspace, q, measured = values_of(states, sums=sums)
        logits = StateLogits(states, weight, v_floor, q_backspace, backspace_id, ids_without_token)
        if measurement is not None:
            with torch.no_grad():
                measured = measurement(tree, logits)
        v_all = torch.logaddexp(v_floor, q_backspace)
        v = logits.v_of_actions(tree)
        with torch.no_grad():
            log_prob_backspace = (q_backspace[actions.state] - v).masked_fill(actions.backspace_masked, -torch.inf)
            log_prob_at_temperature = q - v
            for temperature in actions.temperatures:  # logits / temperature are those of states / temperature
                scaled = (states.float() if states.dtype.itemsize < 4 else states) / temperature
                v_scaled, backspace_scaled, q_scaled, _ = values_of(scaled)
                of_scaled = replace(logits, v_floor=v_scaled, q_backspace=backspace_scaled)
                drawn = actions.behavior_temperature == temperature
                tempered = q_scaled - of_scaled.v_of_actions(tree)
                log_prob_at_temperature = torch.where(drawn, tempered, log_prob_at_temperature)
        return ActionValues(
            q=q,
            v=v,
            v_next=torch.where(actions.next_backspace_masked, v_floor[actions.next_state], v_all[actions.next_state]),
            v_start=v_floor[logs.start],
            v_final=torch.where(logs.final_backspace_masked, v_floor[logs.final], v_all[logs.final]),
            log_prob_backspace=log_prob_backspace,
            log_prob_at_temperature=log_prob_at_temperature,
            measured=measured,
        )


def _as_computed(tensor: Tensor) -> Tensor:
    """In the format of products under autocast, which does not reach into `chunked_values`."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def chunked_values(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    actions: Tensor,
    *,
    backspace_id: int,
    ids_without_token: IdRanges = (),
    chunk_elements: int = CHUNK_ELEMENTS,
    kept_elements: int = KEPT_ELEMENTS,
    sums: ActionSums | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of logits = hidden @ weight.T: log-sum-exp over all actions but backspace, backspace logit, chosen logits, sums.

    hidden: [M, H]. weight: [V, H]. rows, actions: [A] state and id of each chosen logit. chunk_elements: logits made at
    a time. kept_elements: logits kept for the backward pass, at most.

    Returns:
        v_floor [M], q_backspace [M], q [A] and the sums [A] (None without), in float32 (float64 if hidden or weight
        is); differentiable once.
    """
    if chunk_elements < 1:
        raise ValueError(f"chunk_elements={chunk_elements} must be at least 1")
    with torch.autocast(hidden.device.type, enabled=False):
        chunks = _Chunks(len(hidden), len(weight), chunk_elements, kept_elements, ids_without_token)
        v_floor, q_backspace, q, summed = _ChunkedValues.apply(
            hidden, weight, rows, actions, backspace_id, chunks, sums
        )
    return v_floor, q_backspace, q, None if sums is None else summed


class _ChunkedValues(torch.autograd.Function):  # type: ignore[misc]
    """Loops over the vocabulary, and in it over the states.

    The first chunks are kept for the backward pass, as exp(logits - peak) with the peak of each state: what they were
    made into for the log-sum-exp anyway, so that the backward pass takes no second exponential of them.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
        actions: Tensor,
        backspace_id: int,
        chunks: _Chunks,
        sums: ActionSums | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(hidden, weight)
        v_floor = hidden.new_full((len(hidden),), -torch.inf, dtype=dtype)
        q_backspace = torch.empty_like(v_floor)
        q = hidden.new_zeros((len(rows),), dtype=dtype)
        states = matmul_operand(hidden, weight)
        kept: list[Tensor] = []  # exponentials and peaks in turn
        for low, high in chunks.vocabulary:
            columns = matmul_operand(weight[low:high], hidden)
            for begin, end in chunks.states:
                logits = matmul(states[begin:end], columns.T)
                index, inside = _flat_index(rows, actions, (begin, end), (low, high))
                q += torch.where(inside, logits.flatten()[index], 0.0)
                if low <= backspace_id < high:
                    q_backspace[begin:end] = logits[:, backspace_id - low]
                    logits[:, backspace_id - low] = -torch.inf
                fill_ids(logits, chunks.ids_without_token, -torch.inf, low)
                peak = logits.amax(1)
                peak = torch.where(peak == -torch.inf, 0.0, peak)  # where no other action stands in the chunk
                exponentials = logits.sub_(peak[:, None]).exp_()
                v_floor[begin:end] = torch.logaddexp(v_floor[begin:end], peak + exponentials.sum(1).log())
                if len(kept) < 2 * chunks.num_kept:
                    kept += [exponentials, peak]
        ctx.save_for_backward(hidden, weight, rows, actions, v_floor, *kept)
        ctx.backspace_id, ctx.chunks, ctx.sums = backspace_id, chunks, sums
        summed = q.new_zeros(0) if sums is None else sums.forward(hidden, weight, v_floor, q_backspace)
        return v_floor, q_backspace, q, summed

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_v: Tensor,
        grad_backspace: Tensor,
        grad_q: Tensor,
        grad_sums: Tensor,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, rows, actions, v_floor, *kept = ctx.saved_tensors
        remembered = iter(kept)
        grad_hidden = torch.zeros_like(hidden, dtype=grad_v.dtype)
        grad_weight = torch.empty_like(weight)
        if ctx.sums is not None:
            ctx.sums.prepare_backward(grad_sums, ctx.chunks.states)
        with torch.autocast(hidden.device.type, enabled=False):
            states = matmul_operand(hidden, weight)
            for low, high in ctx.chunks.vocabulary:
                columns = matmul_operand(weight[low:high], hidden)
                grad_columns = torch.zeros_like(columns, dtype=grad_v.dtype)
                for begin, end in ctx.chunks.states:
                    exponentials = next(remembered, None)
                    if exponentials is None:
                        q = matmul(states[begin:end], columns.T).sub_(v_floor[begin:end, None]).exp_()
                        fill_ids(q, ctx.chunks.ids_without_token, 0.0, low)
                    else:
                        q = exponentials * (next(remembered) - v_floor[begin:end]).exp()[:, None]
                    summed = None if ctx.sums is None else ctx.sums.gradient(q, (begin, end), (low, high))
                    # The gradient of the logits: softmax, backspace column, chosen ids, sums over the vocabulary.
                    grad = q.mul_(grad_v[begin:end, None])
                    if low <= ctx.backspace_id < high:
                        grad[:, ctx.backspace_id - low] = grad_backspace[begin:end]
                    index, inside = _flat_index(rows, actions, (begin, end), (low, high))
                    grad.view(-1).scatter_add_(0, index, torch.where(inside, grad_q, 0.0))
                    grad = (grad if summed is None else grad.add_(summed)).to(columns.dtype)
                    grad_hidden[begin:end] += matmul(grad, columns)
                    if weight.requires_grad:  # under adapters it is frozen: a third of the work less
                        grad_columns += matmul(grad.T, states[begin:end])
                grad_weight[low:high] = grad_columns
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None


class _Chunks:
    """How M x V logits are cut, how many chunks, from the first one on, are kept, and which ids are no actions."""

    def __init__(
        self, num_states: int, vocab_size: int, chunk_elements: int, kept_elements: int, ids_without_token: IdRanges
    ) -> None:
        self.ids_without_token = ids_without_token
        is_single = num_states * vocab_size <= chunk_elements
        width = vocab_size if is_single else min(vocab_size, VOCABULARY_CHUNK, chunk_elements)
        height = num_states if is_single else max(1, chunk_elements // width)
        self.num_kept = kept_elements // max(width * min(height, num_states), 1)
        self.vocabulary = _cut(vocab_size, width)
        self.states = _cut(num_states, height)


def _cut(total: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, total)) for begin in range(0, total, max(size, 1))]


def _flat_index(
    rows: Tensor, actions: Tensor, states: tuple[int, int], vocabulary: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """[A] index of each (row, action) in the flattened chunk (0 outside of it), and whether it lies inside.

    All A pairs go through every chunk: picking those inside would make the host wait for the device.
    """
    (begin, end), (low, high) = states, vocabulary
    inside = (rows >= begin) & (rows < end) & (actions >= low) & (actions < high)
    return torch.where(inside, (rows - begin) * (high - low) + (actions - low), 0), inside
