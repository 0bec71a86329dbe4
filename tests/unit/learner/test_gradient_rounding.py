"""The gradient of every objective in bfloat16 against float64, where the policy is nearly certain of a token.

The states and the output embedding are given, in bfloat16; the reference computes in float64 with the same numbers.
Where a gradient reaches them in parts that nearly cancel, each rounded, it is off by far more than one rounding.
"""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from learner.objectives import make_objective
from learner.objectives.token_objectives import Unlikelihood
from learner.ranks import Ranks
from learner.settings.objectives import ObjectiveSettings, UnlikelihoodSettings
from learner.state_tree import policy as policy_module
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import TreePolicy
from tests.objectives import EXPERT_LOGS, OBJECTIVES, ROLLOUT_LOGS, counts_of
from tests.oracle import Log
from tests.unit.learner.test_state_tree import BACKSPACE, VOCAB, build
from tests.unit.learner.test_token_objectives import emo_of

EXPERTS, ROLLOUTS = build(EXPERT_LOGS), build(ROLLOUT_LOGS)

FORMATS = ((torch.float64, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16))
"""Of parameters, and of products under autocast."""


def certain_states(tree: TreeBatch, weight: Tensor, probability: float, of: str, seed: int = 0) -> Tensor:
    """[N, H] bfloat16 states before which one id has about `probability`: a label, or the last token of the text."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tree.num_padded_nodes, VOCAB, generator=generator, dtype=torch.float64) / 2
    chosen = tree.nodes.token_ids.clone()
    if of == "label":
        chosen[tree.nodes.states[tree.actions.state]] = tree.actions.label
    node = torch.arange(len(chosen))
    others = logits.scatter(1, chosen[:, None], -torch.inf).logsumexp(1)
    logits[node, chosen] = others + math.log(probability) - math.log1p(-probability)
    return torch.linalg.solve(weight.double(), logits.T).T.bfloat16()


def output_embedding() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.eye(VOCAB) + 0.1 * torch.randn(VOCAB, VOCAB, generator=generator)).bfloat16()


class Gradients:
    """Of an objective by given states and a given output embedding, in one type."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weight: Tensor, computes: torch.dtype | None = None
    ) -> None:
        config = GPT2Config(vocab_size=VOCAB, n_embd=VOCAB, n_layer=1, n_head=1, n_positions=16)
        config.tie_word_embeddings = False
        self.policy, self.base = (TreePolicy(GPT2LMHeadModel(config).to(dtype), BACKSPACE) for _ in ("policy", "base"))
        self.dtype = dtype
        for each in (self.policy, self.base):
            each.autocast_dtype = computes
            each.model.get_output_embeddings().weight = torch.nn.Parameter(weight.to(dtype))
        self.states: dict[tuple[bool, tuple[str, ...]], Tensor] = {}
        monkeypatch.setattr(
            policy_module,
            "evaluate_nodes",
            lambda model, tree: self.states[model is self.base.model, tree.trajectories.ids],
        )

    def set_states(self, tree: TreeBatch, states: Tensor, base: Tensor | None = None) -> None:
        self.states[False, tree.trajectories.ids] = states.to(self.dtype).requires_grad_()
        if base is not None:
            self.states[True, tree.trajectories.ids] = base.to(self.dtype)

    def of(self, objective: object) -> list[Tensor]:
        """By the states and the output embedding, of the loss of the experts and of that of the rollouts."""
        weight = self.policy.model.get_output_embeddings().weight
        data_counts, counts = counts_of(EXPERTS), counts_of(ROLLOUTS)
        found: list[Tensor] = []
        if objective.settings.needs_rollouts:
            objective.begin_step(self.policy, [ROLLOUTS], counts, 0)
            evaluated = objective.evaluate(self.policy, ROLLOUTS, counts, 0)
            loss, _ = objective.rollout_loss(evaluated, data_counts, 0)
            found += torch.autograd.grad(loss, [self.states[False, ROLLOUTS.trajectories.ids], weight])
        if objective.settings.needs_experts:
            evaluated = objective.evaluate(self.policy, EXPERTS, data_counts, 0)
            loss, _ = objective.data_loss(evaluated, 0)
            # Experts of adversarial_js teach the discriminator alone.
            if loss.requires_grad and objective.settings.name != "adversarial_js":
                found += torch.autograd.grad(loss, [self.states[False, EXPERTS.trajectories.ids], weight])
        return found


def assert_rounded_once(found: list[Tensor], exact: list[Tensor]) -> None:
    """Row by row within 1 %: a rounding to bfloat16 is .4 % at most, V in float32 has about .5 % of 1 - q = 1e-4."""
    assert len(found) == len(exact)
    for mine, theirs in zip(found, exact, strict=True):
        error = (mine.double() - theirs).norm(dim=1)
        assert theirs.norm() > 0
        assert (error <= 0.01 * theirs.norm(dim=1) + 1e-6 * theirs.norm()).all()


@pytest.mark.parametrize("case", [case for case in OBJECTIVES if "own" not in case])  # whose body is another model
def test_bfloat16_rounds_the_gradient_once(case, monkeypatch):
    """Trained in bfloat16, or in float32 with products in bfloat16."""
    settings = TypeAdapter(ObjectiveSettings).validate_python({"name": case.split(",")[0], **OBJECTIVES[case]})
    weight = output_embedding()
    for probability in (0.9, 0.99, 0.999, 0.9999):
        for of in ("label", "context"):
            sides = []
            for dtype, computes in FORMATS:
                side = Gradients(monkeypatch, dtype, weight, computes)
                for tree in (EXPERTS, ROLLOUTS):
                    base = certain_states(tree, weight, 0.5, of, seed=1)
                    side.set_states(tree, certain_states(tree, weight, probability, of), base)
                sides.append(side.of(make_objective(settings, Ranks(), lambda side=side: side.base, ("f",))))
            exact, pure, mixed = sides
            assert_rounded_once(pure, exact)
            assert_rounded_once(mixed, exact)


@pytest.mark.parametrize("case", ["unlikelihood", "emo", "sequencematch"])
def test_autocast_does_not_round_what_follows_the_states(case, monkeypatch):
    """Trained in float32 under autocast to bfloat16: forward and backward pass are those without it."""
    settings = TypeAdapter(ObjectiveSettings).validate_python({"name": case})
    weight = output_embedding()
    side = Gradients(monkeypatch, torch.float32, weight)
    for tree in (EXPERTS, ROLLOUTS):
        side.set_states(tree, certain_states(tree, weight, 0.999, "context"))
    expected = side.of(make_objective(settings))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = side.of(make_objective(settings))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("probability", "expected"), [(0.999, 1.998), (0.9999, 2.0)])
def test_unlikelihood_of_a_token_that_is_nearly_certain(probability, expected, monkeypatch):
    """Text 1 4 6, label 5: the gradient at the logit of 6 is that of the likelihood, q, and q again."""
    tree = build([Log([1, 4, 6], [5], finish_reason="max_length", id="a")])
    logits = torch.zeros(tree.num_padded_nodes, VOCAB, dtype=torch.float64)
    logits[:, 6] = math.log(probability / (1 - probability)) + math.log(VOCAB - 2)  # backspace is masked
    side = Gradients(monkeypatch, torch.bfloat16, torch.eye(VOCAB))
    side.set_states(tree, logits)
    objective = Unlikelihood(UnlikelihoodSettings(name="unlikelihood"))
    loss, _ = objective.data_loss(objective.evaluate(side.policy, tree, counts_of(tree), 0), 0)
    loss.backward()
    gradient = side.states[False, tree.trajectories.ids].grad[int(tree.nodes.states[tree.actions.state[0]]), 6]
    assert float(gradient) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("apart", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("others", [0.1, 1e-4, 1e-6])
def test_emo_in_float32_with_a_twin_of_the_label(mode, apart, others, monkeypatch):
    """Label and twin share all probability but `others`; their rows point the same way, or nearly."""
    tree = build([Log([1, 4], [5], finish_reason="max_length", id="a")])
    logits = torch.full((tree.num_padded_nodes, VOCAB), math.log(others / (VOCAB - 3)))
    logits[:, [5, 6]] = math.log((1 - others) / 2)
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(VOCAB, 64, generator=generator)
    table[6] = table[5] + apart * torch.randn(64, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        side = Gradients(monkeypatch, dtype, torch.eye(VOCAB))
        side.set_states(tree, logits)
        objective = emo_of(table.to(dtype), mode=mode)
        evaluated = objective.evaluate(side.policy, tree, counts_of(tree), 0)
        loss, metrics = objective.data_loss(evaluated, 0)
        (gradient,) = torch.autograd.grad(loss, side.states[False, tree.trajectories.ids])
        found.append((loss.double(), metrics["loss_earth_mover"].double(), gradient.double()))
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-7 * exact.abs().max().item())
