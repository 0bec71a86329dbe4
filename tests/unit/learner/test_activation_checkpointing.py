"""Activation checkpointing: the same values and gradients from less memory."""

from __future__ import annotations

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from learner.model.loading import checkpoint_activations
from learner.state_tree.policy import TreePolicy
from tests.unit.learner.test_state_tree import BACKSPACE, HARD, SIZES, build, tiny
from tests.unit.learner.test_tree_attention import KINDS, grown_trajectories


class MatrixProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def backward(model, tree) -> tuple[torch.Tensor, ...]:
    values = TreePolicy(model, BACKSPACE).evaluate(tree)
    (values.log_prob.sum() + values.v.square().sum()).backward()
    return values.log_prob, values.v


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_same_bit_for_bit(kind):
    tree = build(HARD)
    plain, saving = tiny(kind), tiny(kind)
    checkpoint_activations(saving)
    assert list(saving.state_dict()) == list(plain.state_dict())
    assert not saving.training
    with MatrixProducts() as once:
        expected = backward(plain, tree)
    with MatrixProducts() as twice:
        found = backward(saving, tree)
    assert twice.count > once.count  # layers did run again
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for a, b in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_less_memory_at_the_peak():
    """8 layers: their activations are most of what is held."""
    tree = build(grown_trajectories(6, 7))
    peaks = []
    for saves in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 8})).eval()
        if saves:
            checkpoint_activations(model)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            backward(model, tree)
        peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
    assert peaks[1] < 0.4 * peaks[0]
