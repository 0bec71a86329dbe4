"""The discriminator of the adversarial objective, and training beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import PreTrainedModel

from buffer.experts.tasks import Task
from learner.model.loading import checkpoint_activations
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer
from tests.objectives import counts_of
from tests.oracle import states
from tests.training import (
    HandMadeRollouts,
    assert_bit_identical,
    check_resume,
    make_model,
    make_stage,
    make_stream,
    make_trainer,
    train,
    weights_of,
)
from tests.unit.learner.test_adversarial_js import objective_of, policy_trajectories
from tests.unit.learner.test_score_functions import MAX_ACTIONS
from tests.unit.learner.test_state_tree import BACKSPACE, HARD, build, tiny

ADVERSARIAL = {"name": "adversarial_js", "discriminator": {"warmup_steps": 1}}


@pytest.mark.parametrize("trajectories", [HARD, HARD[::-1]], ids=["in order", "reversed"])
@pytest.mark.parametrize("body", ["policy", "own"])
def test_it_reads_the_last_text_of_each_log(body, trajectories):
    """As its network says of each token after the text before it, run alone; the policy gets no gradient from that."""
    model = tiny("llama").double()
    policy, tree, objective = TreePolicy(model, BACKSPACE), build(trajectories), objective_of(body)
    found = objective.evaluate(policy, tree, counts_of(tree), 0).values.measured
    network = objective._discriminator
    reader = model.base_model if body == "policy" else network.body
    table = model.lm_head.weight if body == "policy" else network.body.embed_tokens.weight
    for trajectory, score in zip(trajectories, found, strict=True):
        text = states(trajectory, BACKSPACE)[-1]
        expected = torch.zeros((), dtype=torch.float64)
        for length in range(len(trajectory.prompt), len(text)):
            hidden = reader(input_ids=torch.tensor([text[:length]]), use_cache=False).last_hidden_state[0, -1]
            expected = expected + network(torch.stack([hidden, table[text[length]]])[None])[0]
        torch.testing.assert_close(score, expected)
    found.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert moved == ({"head"} if body == "policy" else {"head", "body"})


def test_at_first_the_discriminator_learns_alone():
    model, objective = tiny("gpt2"), objective_of(warmup_steps=3)
    policy, tree = TreePolicy(model, BACKSPACE), build(policy_trajectories(HARD))
    counts = counts_of(tree)
    objective.begin_step(policy, [tree], counts, 0)
    for step, moves in ((0, False), (2, False), (3, True)):
        model.zero_grad()
        objective.rollout_loss(objective.evaluate(policy, tree, counts, step), counts, step)[0].backward()
        assert any(bool(parameter.grad.any()) for parameter in model.parameters()) == moves
        assert all(parameter.grad.any() for parameter in objective._discriminator.parameters())


@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "activations recomputed"])
def test_a_body_of_its_own_leaves_the_policys_alone(recomputed):
    model = tiny("llama")
    if recomputed:
        checkpoint_activations(model)
    policy, tree, objective = TreePolicy(model, BACKSPACE), build(policy_trajectories(HARD)), objective_of("own")
    before, counts = weights_of(model), counts_of(tree)
    objective.begin_step(policy, [tree], counts, 0)
    first = objective.evaluate(policy, tree, counts, 0)
    objective.rollout_loss(first, counts, 0)[0].backward()
    objective.optimizer_step()
    assert_bit_identical(weights_of(model), before)
    with torch.no_grad():
        moved = objective.evaluate(policy, tree, counts, 0).values.measured
        model.base_model.embed_tokens.weight.mul_(2.0)
        still = objective.evaluate(policy, tree, counts, 0).values.measured
    assert not torch.equal(moved, first.values.measured)
    assert torch.equal(still, moved)


def test_a_discriminator_without_a_finite_gradient_stops_before_anything_moves(task):
    model = make_model(task)
    trainer = make_trainer(task, model, make_stage(ADVERSARIAL))
    trainer.train_step()
    network = trainer._objective._discriminator
    network.head[0].weight.register_hook(lambda gradient: gradient * torch.inf)
    before = weights_of(model), weights_of(network)
    with pytest.raises(
        FloatingPointError, match=r"gradient of the discriminator .*; lower discriminator.learning_rate"
    ):
        trainer.train_step()
    assert_bit_identical(weights_of(model), before[0])
    assert_bit_identical(weights_of(network), before[1])
    assert trainer.step == 1


@pytest.mark.parametrize("body", ["policy", "own"])
def test_stopping_and_going_on_changes_nothing(task, tmp_path, body):
    stage = make_stage({"name": "adversarial_js", "pi": 0.8, "discriminator": {"body": body, "warmup_steps": 1}}, 5)

    def make(model: PreTrainedModel, step: int) -> Trainer:
        stream = make_stream(task)
        stream.sample(step * stage.batch_size)
        rollouts = HandMadeRollouts(task, next_row=step * stage.rollout_batch_size)
        return make_trainer(task, model, stage, stream, rollouts)

    check_resume(task, make, 5, [2], tmp_path)


@dataclass
class Answers:
    """Answers of one token to one question, as experts give them, in exact proportion."""

    task: Task
    answers: str
    draws: int = 0

    def sample(self, count: int) -> pa.RecordBatch:
        rows = HandMadeRollouts(self.task, tuple(self.answers), next_row=self.draws).sample(count).to_pylist()
        self.draws += count
        prompt = list(self.task.train["prompt_ids"][0])
        expert = {"source": "expert", "prompt_ids": prompt, "logprobs": None, "policy_version": None, "sampling": None}
        return pa.RecordBatch.from_pylist(
            [row | expert for row in rows], schema=HandMadeRollouts(self.task).sample(1).schema
        )


@dataclass
class OwnRollouts:
    """What the policy of now answers, in at most three actions."""

    task: Task
    model: PreTrainedModel
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @torch.no_grad()
    def sample(self, count: int) -> pa.RecordBatch:
        prompt = list(self.task.train["prompt_ids"][0])
        rows = HandMadeRollouts(self.task).sample(count).to_pylist()
        texts = [list(prompt) for _ in rows]
        for row in rows:
            row |= {"prompt_ids": prompt, "actions": [], "logprobs": [], "finish_reason": "max_actions"}
        for _ in range(MAX_ACTIONS):
            longest = max(map(len, texts))
            ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
            ends = torch.tensor([len(text) - 1 for text in texts])
            logits = self.model(input_ids=ids, use_cache=False).logits[torch.arange(count), ends]
            logits[ends == len(prompt) - 1, self.task.backspace_id] = -torch.inf
            log_q = logits.log_softmax(1)
            chosen = torch.multinomial(log_q.exp(), 1, generator=self.generator).squeeze(1).tolist()
            for number, (row, text, action) in enumerate(zip(rows, texts, chosen, strict=True)):
                if row["finish_reason"] == "eos":
                    continue
                row["actions"].append(action)
                row["logprobs"].append(float(log_q[number, action]))
                row["policy_version"] = [0] * len(row["actions"])
                row["finish_reason"] = "eos" if action == self.task.eos_id else "max_actions"
                if action == self.task.backspace_id:
                    text.pop()
                else:
                    text.append(action)
        return pa.RecordBatch.from_pylist(rows, schema=HandMadeRollouts(self.task).sample(1).schema)


def answer_fractions(task: Task, model: PreTrainedModel, answers: str) -> list[float]:
    """Probability of each first token."""
    with torch.no_grad():
        logits = model(torch.tensor([list(task.train["prompt_ids"][0])])).logits[0, -1]
    logits[task.backspace_id] = -torch.inf
    return [float(logits.softmax(0)[task.tokenizer.get_vocab()[answer]]) for answer in answers]


@pytest.mark.parametrize(
    ("pi", "body", "steps", "learning_rates"),
    [
        (0.5, "own", 60, (1e-3, 5e-3)),
        pytest.param(1.0, "own", 80, (1e-3, 5e-3), marks=pytest.mark.slow),
        pytest.param(0.5, "policy", 150, (5e-4, 1e-2), marks=pytest.mark.slow),
    ],
)
def test_the_policy_learns_the_proportions_of_the_data(task, pi, body, steps, learning_rates):
    """From three answers alike, toward 7 in three cases of four and 3 in the other; not the most frequent alone.

    So few steps go about half of the way, and how far depends on how a processor rounds.
    """
    model = make_model(task)
    quick = {"learning_rate": 5e-3, "warmup_steps": 3, "schedule": "constant"}
    pretrain = make_stage({"name": "mle"}, 40, batch_size=9, optimizer=quick)
    train(make_trainer(task, model, pretrain, Answers(task, "735")), 40)
    assert answer_fractions(task, model, "735") == pytest.approx([1 / 3] * 3, abs=0.05)
    discriminator = {"body": body, "learning_rate": learning_rates[1], "warmup_steps": steps // 6}
    stage = make_stage(
        {"name": "adversarial_js", "pi": pi, "discriminator": discriminator},
        steps,
        batch_size=32,
        rollout_batch_size=32,
        optimizer={"learning_rate": learning_rates[0], "warmup_steps": 0},
    )
    metrics = train(make_trainer(task, model, stage, Answers(task, "7773"), OwnRollouts(task, model)), steps)
    seven, three, five = answer_fractions(task, model, "735")
    assert seven > 0.45
    assert 0.15 < three < 0.4
    assert five < 0.2
    found = [row["divergence_js"] for row in metrics]
    assert np.mean(found[-10:]) < 0.6 * max(found)
