"""Values and sums over the vocabulary of states, without a tensor of states x vocabulary.

Logits = states x output embedding are made in chunks, in float32 or better, folded into a running log-sum-exp, and but
for the first few made again in the backward pass. Chosen logits, V and sums come from one function of states and output
embedding, so parts of the gradient that nearly cancel are added at the logits in float32, before any rounding.

A loss of the probabilities q before an action has a gradient at the logits in two parts: what it says of each id, and
what it says of V, by which all probabilities are normalized. Where the policy is nearly certain the two are large and
nearly cancel. So an objective gives the gradient at the logits with both parts together (`VocabularySum`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from buffer.trajectory.schema import IdRanges
from learner.state_tree.batch import Actions

CHUNK_ELEMENTS = 2**22
"""Logits made at a time (16 MiB in float32)."""

VOCABULARY_CHUNK = 8192
"""Columns of the vocabulary in a chunk, at most."""

KEPT_ELEMENTS = 2**25
"""Logits kept for the backward pass (128 MiB in float32): whatever is small is not computed twice."""

TENSORS_PER_CHUNK = 4
"""As large as a chunk of probabilities, at hand while its terms are made."""


def accumulation_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """In what products of the two are summed up: float32, or float64 if either is."""
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def matmul_operand(a: Tensor, other: Tensor) -> Tensor:
    """`a` as `matmul` wants it: half precision stays where the device multiplies it into float32."""
    if a.is_cuda and a.dtype == other.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return a
    return a.to(accumulation_dtype(a, other))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[m, n] product of two operands, in float32 or better."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def fill_ids(values: Tensor, ranges: IdRanges, value: float, first_id: int = 0) -> None:
    """Set (in place) the columns of ids that no token has (`TokenContract.ids_without_token`). values: [..., W] whose
    columns are the ids from `first_id` on."""
    width = values.shape[-1]
    for begin, end in ranges:
        low, high = max(begin - first_id, 0), min(end - first_id, width)
        if low < high:
            values[..., low:high] = value


class VocabularySum(Protocol):
    """K sums over ids v for each action, of terms of q(v); the first one is what the loss is made of.

    Legend: a actions of a chunk, w ids of a chunk. q is the policy before the action, 0 where backspace is masked and
    of ids without a token.
    """

    @property
    def ids(self) -> Tensor | None:
        """[U] ascending ids that have terms; None = all that have a token."""

    def terms(self, q: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        """[K, a] sums over `ids` [w] alone. q: [a, w]. actions: [a] indexes of actions of the tree."""

    def gradient(self, q: Tensor, sums: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        """[a, w] derivative of the first sum by the logits of `ids`, that through V included. sums: [K, a] over all."""


class ActionSums:
    """A `VocabularySum` for all actions of a tree, as the chunks of states x vocabulary of the values need it."""

    def __init__(self, summed: VocabularySum, actions: Actions, backspace_id: int) -> None:
        self._summed = summed
        self._rows = actions.state
        self._backspace_masked = actions.backspace_masked
        self._backspace_id = backspace_id

    def forward(self, hidden: Tensor, weight: Tensor, v_floor: Tensor, q_backspace: Tensor, chunks: _Chunks) -> Tensor:
        """[A] the first sum of each action. hidden: [M, H]. weight: [V, H]. v_floor, q_backspace: [M]."""
        self._elements = max(1, chunks.elements // TENSORS_PER_CHUNK)
        v_all = torch.logaddexp(v_floor, q_backspace)
        v = torch.where(self._backspace_masked, v_floor[self._rows], v_all[self._rows])
        self._share = (v_floor[self._rows] - v).exp()  # of all probability, the ids but backspace
        self._backspace = (q_backspace[self._rows] - v).exp().masked_fill(self._backspace_masked, 0.0)
        ids = self._summed.ids
        if ids is None:
            is_action = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
            fill_ids(is_action, chunks.ids_without_token, False)
            ids = is_action.nonzero().flatten()
        width = min(len(ids), VOCABULARY_CHUNK, self._elements)
        states = matmul_operand(hidden, weight)
        total: Tensor | None = None
        for chunk in ids.split(width):
            columns = matmul_operand(weight[chunk], hidden).T
            found: list[Tensor] = []
            for actions in torch.arange(len(self._rows), device=v.device).split(max(1, self._elements // width)):
                logits = matmul(states[self._rows[actions]], columns)
                q = self._with_backspace(logits.sub_(v[actions, None]).exp_(), actions, chunk)
                found.append(self._summed.terms(q, actions, chunk))
            terms = torch.cat(found, dim=1)
            total = terms if total is None else total + terms
        assert total is not None, "a vocabulary has ids"
        self._sums = total
        return self._sums[0].clone()

    def prepare_backward(self, grad: Tensor, states: list[tuple[int, int]]) -> None:
        """Begin a backward pass. grad: [A] of the first sum. states: begin and end of each chunk of states."""
        self._grad = grad
        self._order = torch.argsort(self._rows, stable=True)
        edges = torch.tensor([begin for begin, _ in states] + [end for _, end in states[-1:]], device=grad.device)
        bounds = torch.searchsorted(self._rows[self._order], edges).tolist()
        self._actions_of = dict(zip(states, itertools.pairwise(bounds), strict=True))

    def gradient(self, probabilities: Tensor, states: tuple[int, int], vocabulary: tuple[int, int]) -> Tensor:
        """[m, w] gradient at the logits of a chunk. probabilities: [m, w] over all ids but backspace."""
        ids = torch.arange(*vocabulary, device=probabilities.device)
        found = torch.zeros_like(probabilities)
        first, last = self._actions_of[states]
        for actions in self._order[first:last].split(max(1, self._elements // len(ids))):
            rows = self._rows[actions] - states[0]
            q = self._with_backspace(probabilities[rows] * self._share[actions, None], actions, ids)
            gradient = self._summed.gradient(q, self._sums[:, actions], actions, ids)
            found.index_add_(0, rows, gradient * self._grad[actions, None])
        return found

    def _with_backspace(self, q: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        return torch.where(ids == self._backspace_id, self._backspace[actions, None], q)


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
    is_single = len(hidden) * len(weight) <= chunk_elements
    width = len(weight) if is_single else min(len(weight), VOCABULARY_CHUNK, chunk_elements)
    height = len(hidden) if is_single else max(1, chunk_elements // width)
    chunks = _Chunks(
        vocabulary=_cut(len(weight), width),
        states=_cut(len(hidden), height),
        num_kept=kept_elements // max(width * min(height, len(hidden)), 1),
        elements=chunk_elements,
        ids_without_token=ids_without_token,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        v_floor, q_backspace, q, summed = _ChunkedValues.apply(
            hidden, weight, rows, actions, backspace_id, chunks, sums
        )
    return v_floor, q_backspace, q, None if sums is None else summed


class _Chunks(NamedTuple):
    """Begin and end of each chunk of the vocabulary and of the states; how many chunks, from the first on, are kept;
    elements of a chunk, at most; ids that are no actions."""

    vocabulary: list[tuple[int, int]]
    states: list[tuple[int, int]]
    num_kept: int
    elements: int
    ids_without_token: IdRanges


def _cut(total: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, total)) for begin in range(0, total, max(size, 1))]


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
        summed = q.new_zeros(0) if sums is None else sums.forward(hidden, weight, v_floor, q_backspace, chunks)
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


def _flat_index(
    rows: Tensor, actions: Tensor, states: tuple[int, int], vocabulary: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """[A] index of each (row, action) in the flattened chunk (0 outside of it), and whether it lies inside. All A pairs
    go through every chunk: picking those inside would make the host wait for the device."""
    (begin, end), (low, high) = states, vocabulary
    inside = (rows >= begin) & (rows < end) & (actions >= low) & (actions < high)
    return torch.where(inside, (rows - begin) * (high - low) + (actions - low), 0), inside
