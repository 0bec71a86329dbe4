"""Q and V from chunks: equal to the plain computation, in value and gradient, without its memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from learner.state_tree import vocabulary
from learner.state_tree.policy import TreePolicy
from tests.oracle import states
from tests.unit.learner.test_state_tree import BACKSPACE, HARD, NEVER_OFFERED, build, tiny


def chunked_values(*args, **kwargs):
    """Without the sums over the vocabulary, which are asked for in none of these."""
    *values, sums = vocabulary.chunked_values(*args, **kwargs)
    assert sums is None
    return tuple(values)


def plain_values(hidden, weight, rows, actions, backspace_id, ids_without_token=()):
    logits = hidden.double() @ weight.double().T
    others = torch.arange(len(weight)) != backspace_id
    for begin, end in ids_without_token:
        others[begin:end] = False
    return logits[:, others].logsumexp(1), logits[:, backspace_id], logits[rows, actions]


def example(num_states=7, vocab_size=13, hidden_size=5, num_actions=17, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_states, hidden_size, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float64)
    rows = torch.randint(num_states, (num_actions,), generator=generator)
    actions = torch.randint(vocab_size, (num_actions,), generator=generator)
    actions[:2], rows[:2] = actions[2], rows[2]  # the same action three times: gradients add up
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        rows,
        actions,
    )


def weighted_sum(outputs):
    generator = torch.Generator().manual_seed(1)
    return sum(
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum() for out in outputs
    )


@pytest.mark.parametrize("chunk_elements", [1, 3, 13, 30, 91, 1000])
@pytest.mark.parametrize("kept_elements", [0, 40, 1000])
@pytest.mark.parametrize("backspace_id", [0, 3, 12])
def test_values_and_gradients_equal_the_plain_computation(chunk_elements, kept_elements, backspace_id):
    hidden, weight, rows, actions = example(scale=30.0)  # logits of a hundred: exp without a maximum overflows
    sizes = {"chunk_elements": chunk_elements, "kept_elements": kept_elements}
    chunked = chunked_values(hidden, weight, rows, actions, backspace_id=backspace_id, **sizes)
    plain = plain_values(hidden, weight, rows, actions, backspace_id)
    for mine, theirs in zip(chunked, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-10)
    mine = torch.autograd.grad(weighted_sum(chunked), (hidden, weight))
    theirs = torch.autograd.grad(weighted_sum(plain), (hidden, weight))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_elements", [1, 3, 30, 1000])
@pytest.mark.parametrize("kept_elements", [0, 40, 1000])
@pytest.mark.parametrize("ranges", [((9, 13),), ((0, 2), (4, 5), (8, 9), (12, 13)), ((5, 9),)])
def test_ids_without_a_token_are_no_actions(chunk_elements, kept_elements, ranges):
    """In no sum, and without a gradient at their rows: padding, holes, whole chunks, a chunk's edges."""
    hidden, weight, rows, actions = example()
    no_token = torch.tensor([index for begin, end in ranges for index in range(begin, end)])
    actions = torch.where(torch.isin(actions, no_token), 10 if 10 not in no_token else 7, actions)
    sizes = {"chunk_elements": chunk_elements, "kept_elements": kept_elements}
    chunked = chunked_values(hidden, weight, rows, actions, backspace_id=3, ids_without_token=ranges, **sizes)
    plain = plain_values(hidden, weight, rows, actions, 3, ranges)
    for mine, theirs in zip(chunked, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-10)
    mine = torch.autograd.grad(weighted_sum(chunked), (hidden, weight))
    torch.testing.assert_close(mine, torch.autograd.grad(weighted_sum(plain), (hidden, weight)), rtol=1e-10, atol=1e-10)
    assert (mine[1][no_token] == 0).all()


@pytest.mark.parametrize("kept_elements", [0, 1000])
def test_a_frozen_output_embedding_gets_no_gradient(kept_elements):
    hidden, weight, rows, actions = example()
    expected = torch.autograd.grad(weighted_sum(plain_values(hidden, weight, rows, actions, 3)), hidden)
    weight.requires_grad_(False)
    outputs = chunked_values(
        hidden, weight, rows, actions, backspace_id=3, chunk_elements=30, kept_elements=kept_elements
    )
    torch.testing.assert_close(torch.autograd.grad(weighted_sum(outputs), hidden), expected, rtol=1e-10, atol=1e-10)


def saved_elements(kept_elements: int) -> int:
    """Elements held from the forward to the backward pass."""
    hidden, weight, rows, actions = example(64, 300, 16, 20, torch.float32)
    total = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        chunked_values(hidden, weight, rows, actions, backspace_id=3, chunk_elements=3000, kept_elements=kept_elements)
    return total


def test_no_more_logits_are_kept_than_allowed():
    least = saved_elements(0)
    assert saved_elements(7000) - least == 6000 + 20  # two chunks of 10 states, and a peak of each state
    assert saved_elements(10**6) - least == 64 * 300 + 64


def test_half_precision_accumulates_in_float32():
    hidden, weight, rows, actions = example(64, 300, 256, 200, torch.bfloat16)
    outputs = chunked_values(hidden, weight, rows, actions, backspace_id=3, chunk_elements=1000)
    plain = plain_values(hidden, weight, rows, actions, 3)
    for mine, theirs in zip(outputs, plain, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-4)
    grads = torch.autograd.grad(weighted_sum(outputs), (hidden, weight))
    expected = torch.autograd.grad(weighted_sum(plain), (hidden, weight))
    for mine, theirs in zip(grads, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2**-7, atol=1e-3)


def test_autocast_does_not_round_the_values():
    hidden, weight, rows, actions = example(64, 300, 256, 200, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = chunked_values(hidden, weight, rows, actions, backspace_id=3)
    for mine, theirs in zip(outputs, plain_values(hidden, weight, rows, actions, 3), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-4)


class LargestOutput(TorchDispatchMode):
    """Records the largest tensor that any operation makes, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_tokens_times_vocabulary():
    num_states, vocab_size, hidden_size, chunk_elements = 512, 20_000, 16, 2**20
    hidden, weight, rows, actions = example(num_states, vocab_size, hidden_size, 600, torch.float32)
    with LargestOutput() as largest:
        outputs = chunked_values(hidden, weight, rows, actions, backspace_id=3, chunk_elements=chunk_elements)
        weighted_sum(outputs).backward()
    assert 0 < largest.elements <= chunk_elements < num_states * vocab_size / 9
    with LargestOutput() as largest:
        torch.logsumexp(hidden @ weight.T, 1)
    assert largest.elements == num_states * vocab_size  # the recorder does see such a tensor


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
@torch.no_grad()
def test_action_values_against_each_text_alone(kind, tied):
    model = tiny(kind, tied).double()
    logs = [*HARD, NEVER_OFFERED]
    tree = build(logs)
    values = TreePolicy(model, BACKSPACE).evaluate(tree)
    flat = 0
    for i, log in enumerate(logs):
        texts = states(log, BACKSPACE)
        logits = [model(input_ids=torch.tensor([text])).logits[0, -1] for text in texts]
        for text, row in zip(texts, logits, strict=True):
            if len(text) == len(log.prompt) or not log.offers_backspace:
                row[BACKSPACE] = -torch.inf
        log_probs = [row.log_softmax(-1) for row in logits]
        v = [row.logsumexp(-1) for row in logits]
        for t, action in enumerate(log.actions):
            torch.testing.assert_close(values.q[flat], logits[t][action])
            torch.testing.assert_close(values.v[flat], v[t])
            torch.testing.assert_close(values.v_next[flat], v[t + 1])
            torch.testing.assert_close(values.log_prob[flat], log_probs[t][action])
            torch.testing.assert_close(values.log_prob_backspace[flat], log_probs[t][BACKSPACE])
            flat += 1
        torch.testing.assert_close(values.v_start[i], v[0])
        torch.testing.assert_close(values.v_final[i], v[-1])
