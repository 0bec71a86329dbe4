"""Score-function objectives: exact against enumeration of all rollouts of a tiny transformer, and in the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from buffer.experts.tasks import Task
from learner.objectives import make_objective
from learner.objectives.base import BatchCounts
from learner.objectives.score_function import RewardAscent, Rollouts, ScoreFunction, leave_one_out_mean
from learner.ranks import Ranks
from learner.settings.objectives import KlControlSettings, ReinforceSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer
from tests.objectives import counts_of
from tests.oracle import Log
from tests.training import (
    HandMadeRollouts,
    check_resume,
    make_model,
    make_stage,
    make_trees,
    weights_of,
)
from tests.unit.learner.test_state_tree import BACKSPACE, EOS, build

MAX_ACTIONS = 3
LETTERS = (0, 1)


def model(seed: int) -> PreTrainedModel:
    """Over two letters, `<eos>` and backspace, in float64; far from uniform."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, n_positions=8, tie_word_embeddings=False)
    made = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20.0)
    return made


def all_trajectories() -> list[Log]:
    """Every rollout of at most three actions, each scored: the reward says how often 1 is left at the end."""

    def go_on(actions: tuple[int, ...], text: tuple[int, ...]) -> Iterator[Log]:
        if actions and (actions[-1] == EOS or len(actions) == MAX_ACTIONS):
            reason = "eos" if actions[-1] == EOS else "max_actions"
            scores = {"reward": float(text.count(1)), "features": [float(text[:1] == (1,)), float(len(text))]}
            yield Log([0], list(actions), finish_reason=reason, source="policy", id=str(actions), **scores)
            return
        for action in (*LETTERS, EOS, *([BACKSPACE] if text else [])):
            kept = text[:-1] if action == BACKSPACE else text if action == EOS else (*text, action)
            yield from go_on((*actions, action), kept)

    return list(go_on((), ()))


@dataclass(frozen=True)
class World:
    """All rollouts, and their log-probabilities under three models; those of the policy have a gradient."""

    policy: PreTrainedModel
    rollouts: Rollouts
    log_pi: Tensor

    def gradient(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, list(self.policy.parameters()), retain_graph=True)


@pytest.fixture(scope="module")
def world() -> World:
    tree = build(all_trajectories())

    def log_probs(of: PreTrainedModel) -> Tensor:
        values = TreePolicy(of, BACKSPACE).evaluate(tree)
        return torch.zeros(tree.num_trajectories, dtype=torch.float64).index_add(
            0, tree.actions.trajectory, values.log_prob
        )

    policy = model(0)
    log_pi = log_probs(policy)
    log_mu, log_base = (log_probs(model(seed)).detach() for seed in (1, 2))
    rollouts = Rollouts(
        torch.arange(tree.num_trajectories),
        tree.trajectories.context,
        log_pi.detach(),
        log_mu,
        log_base,
        tree.trajectories.reward.double(),
        tree.trajectories.features.double(),
    )
    return World(policy, rollouts, log_pi)


def reward_ascent(beta: float = 0.0) -> RewardAscent:
    return RewardAscent(
        KlControlSettings(name="kl_control", beta=beta) if beta else ReinforceSettings(name="reinforce")
    )


def expected_direction(world: World, rule: ScoreFunction, rollouts: Rollouts) -> Tensor:
    """Whose gradient is the exact expectation of the update, over all pairs of rollouts that mu makes."""
    mu = rollouts.log_mu.exp()
    share = torch.zeros(len(rollouts), dtype=torch.float64)
    for first in range(len(rollouts)):
        for second in range(len(rollouts)):
            pair = rollouts[torch.tensor([first, second])]
            share[first] += mu[first] * mu[second] * rule.weigh(pair).coefficients[0]
    return share @ world.log_pi


def test_the_rollouts_are_all_there_are(world):
    for log_prob in (world.rollouts.log_pi, world.rollouts.log_mu, world.rollouts.log_base):
        assert float(log_prob.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    assert (world.rollouts.log_pi - world.rollouts.log_mu).abs().max() > 0.5
    assert len(world.rollouts) == 25


@pytest.mark.parametrize("stale", [False, True], ids=["on policy", "stale"])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_the_expected_update_is_the_gradient_of_the_objective(world, beta, stale):
    rollouts = world.rollouts if stale else replace(world.rollouts, log_mu=world.rollouts.log_pi)
    gain = rollouts.reward - beta * (world.log_pi - rollouts.log_base)
    expected = world.gradient((world.log_pi.exp() * gain).sum())
    found = world.gradient(expected_direction(world, reward_ascent(beta), rollouts))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_without_the_weights_stale_rollouts_would_mislead(world):
    """Negative control of the test above."""
    believed = replace(world.rollouts, log_mu=world.rollouts.log_pi)
    share = world.rollouts.log_mu.exp() * reward_ascent().weigh(believed).coefficients
    expected = world.gradient((world.log_pi.exp() * world.rollouts.reward).sum())
    found = world.gradient(share @ world.log_pi)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) > 1e-2


def test_equal_rewards_change_nothing_at_all(world):
    rollouts = replace(world.rollouts, reward=torch.full_like(world.rollouts.reward, 0.3))
    assert not reward_ascent().weigh(rollouts).coefficients.any()
    assert reward_ascent().weigh(rollouts[torch.tensor([4])]).coefficients.abs() > 0  # nothing to compare one with


def test_the_mean_of_the_others():
    values, weight = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 0.0])
    assert leave_one_out_mean(values, weight).tolist() == pytest.approx([2.0, 1.0, 1.75])
    assert leave_one_out_mean(values[:1], weight[:1]).tolist() == [0.0]


def table(pi: Tensor, base: Tensor, **fields: Tensor) -> Rollouts:
    """Every one of the outcomes of a table, as rollouts of the policy itself."""
    nothing = torch.full_like(pi, torch.nan)
    given = {"reward": nothing, "features": torch.zeros(len(pi), 0)} | fields
    return Rollouts(
        torch.arange(len(pi)), torch.zeros(len(pi), dtype=torch.int64), pi.log(), pi.log(), base.log(), **given
    )


def test_golden_optimum_of_kl_control():
    """R = phi, beta = 1: there all advantages are the same number, the value beta log Z."""
    base, reward = torch.tensor([0.4, 0.3, 0.2, 0.1]).double(), torch.tensor([0.0, 0.0, 0.0, 1.0]).double()
    optimum = base * reward.exp() / (base * reward.exp()).sum()
    assert optimum.tolist() == pytest.approx([0.341347, 0.256010, 0.170673, 0.231969], abs=1e-6)
    gain = reward - (optimum / base).log()
    assert gain.tolist() == pytest.approx([0.158565] * 4, abs=1e-6)
    assert reward_ascent(1.0).weigh(table(optimum, base, reward=reward)).coefficients.abs().max() < 1e-12
    assert reward_ascent(1.0).weigh(table(base, base, reward=reward)).coefficients.abs().max() > 0.1


def both_rounds(
    objective: ScoreFunction, policy: TreePolicy, packs: list[list[Log]]
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of rollouts that lie in several passes."""
    trees = [build(trajectories) for trajectories in packs]
    counts = counts_of(*trees)
    objective.begin_step(policy, trees, counts, 0)
    shares = [
        objective.rollout_loss(objective.evaluate(policy, tree, counts, 0), BatchCounts(0, 0, 0), 0) for tree in trees
    ]
    names = shares[0][1]
    return torch.stack([loss for loss, _ in shares]).sum(), {
        name: sum(float(metrics[name]) for _, metrics in shares) for name in names
    }


def test_the_two_rounds_know_all_rollouts_however_they_are_packed(world):
    """And the stored log-probabilities, and those of the frozen model."""
    trajectories = [
        replace(trajectory, logprobs=[-0.5] * len(trajectory.actions), temperature=1.0)
        for trajectory in all_trajectories()
    ]
    policy, base = TreePolicy(world.policy, BACKSPACE), TreePolicy(model(2), BACKSPACE)
    objective = RewardAscent(KlControlSettings(name="kl_control", beta=0.7), base=base)
    whole, metrics = both_rounds(objective, policy, [trajectories])
    log_mu = torch.tensor([-0.5 * len(trajectory.actions) for trajectory in trajectories]).double()
    coefficients = reward_ascent(0.7).weigh(replace(world.rollouts, log_mu=log_mu)).coefficients
    expected = -(coefficients * world.log_pi).mean()
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)  # coefficients travel in the model's own type
    assert metrics["reward_mean"] == pytest.approx(float(world.rollouts.reward.mean()))
    assert metrics["loss"] == pytest.approx(whole.item())
    split, split_metrics = both_rounds(objective, policy, [trajectories[:3], trajectories[3:20], trajectories[20:]])
    torch.testing.assert_close(world.gradient(split), world.gradient(whole))
    assert split_metrics == pytest.approx(metrics)


@dataclass
class ScoredRollouts(HandMadeRollouts):
    """The answer 7 is worth 1. As if made by a policy that knows nothing, as the newborn one does."""

    rewards: dict[int, float | None] = field(default_factory=lambda: {1: 1.0})

    def _row(self, serial: int) -> dict[str, object]:
        row = super()._row(serial)
        logprobs = [-math.log(len(self.task.tokenizer))] * len(row["actions"])
        return row | {"logprobs": logprobs, "reward": self.rewards.get(serial % len(self.answers), 0.0)}


class NoExperts:
    """Score functions draw none."""

    def sample(self, count: int) -> pa.RecordBatch:
        raise AssertionError(f"{count} expert trajectories were asked for")


REINFORCE = {"name": "reinforce"}
KL_CONTROL = {"name": "kl_control", "beta": 0.2}


def make_score_trainer(
    task: Task,
    policy: PreTrainedModel,
    objective: dict[str, object],
    rollouts: HandMadeRollouts,
    base: Callable[[], PreTrainedModel] | None = None,
) -> Trainer:
    stage = make_stage(objective, steps=6, rollout_batch_size=6)
    load_base = base or (lambda: make_model(task, seed=3))
    made = make_objective(stage.objective, Ranks(), lambda: TreePolicy(load_base(), task.backspace_id))
    return Trainer(TreePolicy(policy, task.backspace_id), made, stage, make_trees(task), NoExperts(), rollouts)


@pytest.mark.parametrize("objective", [REINFORCE, KL_CONTROL], ids=lambda o: str(o["name"]))
def test_training_raises_the_reward_and_resumes_bit_for_bit(task, objective, tmp_path):
    def make(model: PreTrainedModel, step: int) -> Trainer:
        return make_score_trainer(task, model, objective, ScoredRollouts(task, next_row=6 * step))

    metrics = check_resume(task, make, 4, [2], tmp_path)
    # The rollouts stay the same ones, so what grows is the weight of those that are rewarded.
    assert metrics[-1]["reward_policy_mean"] > metrics[0]["reward_policy_mean"] + 0.1
    assert all(row["reward_mean"] == pytest.approx(1 / 3) for row in metrics)


def test_kl_control_compares_with_the_frozen_start(task):
    """0 at the first step, beyond 0 later; with another frozen model it is another number."""
    policy = make_model(task, seed=3)
    trainer = make_score_trainer(task, policy, KL_CONTROL, ScoredRollouts(task))
    found = [trainer.train_step()["kl_base"] for _ in range(3)]
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[2] != pytest.approx(0.0, abs=1e-3)
    other = make_score_trainer(
        task, make_model(task, seed=3), KL_CONTROL, ScoredRollouts(task), lambda: make_model(task, seed=5)
    )
    assert other.train_step()["kl_base"] != pytest.approx(0.0, abs=1e-6)


def test_rollouts_that_spoil_a_step_are_named(task):
    """Though the coefficients of all depend on all: those of sound rollouts stay sound."""
    policy = make_model(task, tie_embeddings=False)
    with torch.no_grad():
        policy.get_input_embeddings().weight[task.tokenizer.get_vocab()["2"]] = torch.nan
    rollouts = ScoredRollouts(task)
    drawn = ScoredRollouts(task).sample(6).to_pylist()
    two = task.tokenizer.get_vocab()["2"]
    bad = [row["id"] for row in drawn if two in [*row["prompt_ids"], *row["actions"]]]
    assert 0 < len(bad) < 6
    before = weights_of(policy)
    with pytest.raises(FloatingPointError, match=rf"Not finite on {len(bad)} of 6 trajectories: {', '.join(bad)}$"):
        make_score_trainer(task, policy, REINFORCE, rollouts).train_step()
    for name, tensor in before.items():
        torch.testing.assert_close(weights_of(policy)[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_rollouts_without_a_reward_are_a_mistake_of_the_recipe(task):
    trainer = make_score_trainer(task, make_model(task), REINFORCE, ScoredRollouts(task, rewards={2: None}))
    with pytest.raises(ValueError, match=r"2 of 6 rollouts have no reward: set scoring\.reward"):
        trainer.train_step()


def test_what_score_functions_refuse(task):
    objective = make_objective(make_stage(REINFORCE).objective)
    trajectories = objective.evaluate(
        TreePolicy(model(0), BACKSPACE), build(all_trajectories()), BatchCounts(25, 60, 0), 0
    )
    with pytest.raises(ValueError, match="reinforce takes no expert trajectories"):
        objective.data_loss(trajectories, 0)
    with pytest.raises(ValueError, match="reinforce takes no prioritized samples"):
        objective.priorities(trajectories)


REINFORCE_RUN = ["stages.sequencematch.objective={name: reinforce}", "scoring.reward={name: exact_answer}"]
