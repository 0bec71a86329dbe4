"""The adversarial objective: golden numbers, exact gradients by enumeration, and training beside the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from buffer.experts.tasks import Task, load_task
from buffer.settings import ArithmeticTaskSettings
from learner.activation_checkpointing import checkpoint_activations
from learner.checkpoint import read_progress, read_training_state
from learner.model_files import load_weights
from learner.objective_settings import AdversarialJsSettings, DiscriminatorSettings, ObjectiveSettings
from learner.objectives.adversarial_js import (
    AdversarialJs,
    data_divergence,
    importance_weights,
    leave_one_out_advantage,
    mixture_reward,
)
from learner.objectives.base import EvaluatedLogs, LogCounts
from learner.ranks import Ranks
from learner.tree_policy import TreePolicy
from tests.checkpoints import progress_at, save_checkpoint
from tests.oracle import Log, states
from tests.unit.test_state_tree import BACKSPACE, EOS, HARD, build, tiny
from tests.unit.test_token_objectives import dense
from tests.unit.test_trainer import (
    HandMadeRollouts,
    assert_bit_identical,
    make_model,
    make_stage,
    make_stream,
    make_trainer,
    train,
    weights_of,
)

PROMPT, MAX_ACTIONS = [0], 3
PIS = [0.001, 0.3, 0.9, 1.0]
ADVERSARIAL = {"name": "adversarial_js", "discriminator": {"warmup_steps": 1}}


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(ArithmeticTaskSettings(max_digits=1, train_questions=40, held_out_questions=4))


def objective_of(body: str = "policy", prior: float | None = None, warmup_steps: int = 0, **settings) -> AdversarialJs:
    discriminator = DiscriminatorSettings(body=body, prior=prior, warmup_steps=warmup_steps)
    return AdversarialJs(AdversarialJsSettings(name="adversarial_js", discriminator=discriminator, **settings), Ranks())


def divergence(p: Tensor, q: Tensor, pi: float) -> Tensor:
    """JS_pi / (pi (1 - pi)) as it is printed; KL(Q || P) at pi = 1."""
    if pi == 1.0:
        return (q * (q / p).log()).sum()
    mixture = pi * p + (1 - pi) * q
    return ((pi * p * (p / mixture).log()).sum() + ((1 - pi) * q * (q / mixture).log()).sum()) / (pi * (1 - pi))


GOLDEN = [(0.001, 0.368112), (0.1, 0.373367), (0.5, 0.406997), (0.9, 0.478601), (0.999, 0.510448), (1.0, 0.510826)]


@pytest.mark.parametrize(("pi", "expected"), GOLDEN)
def test_the_two_parts_make_the_divergence(pi, expected):
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    log_ratio = (p / q).log()
    found = (p * data_divergence(log_ratio, pi)).sum() - (q * mixture_reward(log_ratio, pi)).sum()
    assert float(found) == pytest.approx(expected, abs=2e-6 if pi < 1 else 1e-6)
    # A discriminator that errs says less.
    for error in (torch.tensor([0.3, 0.0]), torch.tensor([-0.2, 0.5])):
        wrong = log_ratio + error
        assert (p * data_divergence(wrong, pi)).sum() - (q * mixture_reward(wrong, pi)).sum() < found


def test_rewards_at_the_ends_are_those_of_the_two_kl():
    """Likelihood: reward P/Q, whose score function is E_P[grad log Q]; reverse KL: log P/Q. Up to constants."""
    log_ratio = torch.tensor([-3.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    near_0, near_1 = mixture_reward(log_ratio, 1e-9), mixture_reward(log_ratio, 1 - 1e-9)
    torch.testing.assert_close(near_0 - near_0.mean(), log_ratio.exp() - log_ratio.exp().mean(), atol=1e-6, rtol=0)
    torch.testing.assert_close(near_1 - near_1.mean(), log_ratio - log_ratio.mean(), atol=1e-6, rtol=0)
    logit = log_ratio + math.log(0.3 / 0.7)
    reward = torch.nn.functional.softplus(logit) / 0.3
    found = mixture_reward(log_ratio, 0.3)
    torch.testing.assert_close(found - found.mean(), reward - reward.mean())


@pytest.mark.parametrize("pi", [0.1, 0.5, 0.9])
def test_token_by_token_the_divergence_is_not_consistent(pi):
    """One binary choice of probability .7. Against one-hot labels the optimum is sharper than the data, the further the
    larger pi is; over whole texts, with the true log-ratio, there is no gradient at the data."""
    p = torch.tensor([0.7, 0.3], dtype=torch.float64)
    q = torch.stack([probability := torch.linspace(0.01, 0.999, 99_000, dtype=torch.float64), 1 - probability])
    mixtures = [pi * label[:, None] + (1 - pi) * q for label in torch.eye(2, dtype=torch.float64)]
    expected = torch.zeros_like(q[0])
    for number, mixture in enumerate(mixtures):
        of_label = -mixture[number].log() * pi + (1 - pi) * (q * (q / mixture).log()).sum(0)
        expected = expected + p[number] * of_label
    optimum = float(probability[expected.argmin()])
    assert optimum == pytest.approx({0.1: 0.720456, 0.5: 0.816793, 0.9: 0.961383}[pi], abs=2e-5)
    logit = torch.logit(p[0]).requires_grad_()
    log_q = logsigmoid(torch.stack([logit, -logit]))
    reward = mixture_reward(p.log() - log_q.detach(), pi)
    (log_q.detach().exp() * (reward - 5.0) * log_q).sum().backward()
    assert abs(float(logit.grad)) < 1e-12


# Enumeration: every action log of at most three actions over two tokens, <eos> and backspace -------------------------


@pytest.fixture(scope="module")
def smallest() -> PreTrainedModel:
    return smallest_model(0)


def smallest_model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, n_positions=8, initializer_range=0.6)
    return GPT2LMHeadModel(config).double().eval()


def all_logs(actions: tuple[int, ...] = (), depth: int = 0) -> list[Log]:
    """Those that begin with `actions`, after which `depth` tokens of the answer stand."""
    if actions[-1:] == (EOS,):
        return [Log(PROMPT, list(actions), source="policy")]
    if len(actions) == MAX_ACTIONS:
        return [Log(PROMPT, list(actions), source="policy", finish_reason="max_actions")]
    steps = [(0, depth + 1), (1, depth + 1), (EOS, depth + 1), *([(BACKSPACE, depth - 1)] if depth else [])]
    return [log for action, left in steps for log in all_logs((*actions, action), left)]


def log_probs(model: PreTrainedModel, logs: list[Log]) -> list[Tensor]:
    """[actions] of each log, every text run alone."""
    chosen = iter([log_q[label] for _, label, log_q in dense(model, logs)])
    return [torch.stack([next(chosen) for _ in log.actions]) for log in logs]


@dataclass(frozen=True)
class Enumeration:
    """All logs, the text that each leaves, and a target over these texts. log_q: [K] of the model, with gradient."""

    logs: list[Log]
    text: Tensor
    target: Tensor
    log_q: Tensor

    @property
    def text_probability(self) -> Tensor:
        return torch.zeros_like(self.target).index_add(0, self.text, self.log_q.exp())

    @property
    def log_ratio(self) -> Tensor:
        """[K] of the text of each log."""
        return (self.target / self.text_probability).log()[self.text].detach()


def enumerate_logs(model: PreTrainedModel) -> Enumeration:
    logs = all_logs()
    texts = [tuple(states(log, BACKSPACE)[-1]) for log in logs]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(len(numbers), generator=generator, dtype=torch.float64).square() + 0.01
    log_q = torch.stack([each.sum() for each in log_probs(model, logs)])
    return Enumeration(logs, torch.tensor([numbers[text] for text in texts]), target / target.sum(), log_q)


def judged(objective: AdversarialJs, model: PreTrainedModel, logs: list[Log], log_ratio: Tensor) -> EvaluatedLogs:
    """The logs as a step's rollouts, with a discriminator that says `log_ratio`."""
    policy, tree = TreePolicy(model, BACKSPACE), build(logs)
    rollouts = objective.evaluate(policy, tree, LogCounts.of([tree]), 0)
    objective._reward_mean = float(mixture_reward(log_ratio, objective._settings.pi).mean())
    return replace(rollouts, values=replace(rollouts.values, measured=log_ratio.clone().requires_grad_()))


def test_the_enumeration_is_of_everything_that_can_happen(smallest):
    found = enumerate_logs(smallest)
    assert float(found.log_q.detach().exp().sum()) == pytest.approx(1.0)
    assert len(found.target) < len(found.logs)  # some texts are reached in several ways


@pytest.mark.parametrize("pi", PIS)
def test_the_gradient_is_that_of_the_divergence_of_texts(smallest, pi):
    """Drawn once each, by a policy for which they were equally likely: a stale one."""
    everything, objective = enumerate_logs(smallest), objective_of(pi=pi)
    count = len(everything.logs)
    drawn = [
        replace(log, temperature=1.0, logprobs=[-math.log(count), *[0.0] * (len(log.actions) - 1)])
        for log in everything.logs
    ]
    rollouts = judged(objective, smallest, drawn, everything.log_ratio)
    loss, metrics = objective.rollout_loss(rollouts, LogCounts(logs=10, actions=20, truncated_logs=0), 0)
    parameters = list(smallest.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    exact = divergence(everything.target, everything.text_probability, pi)
    expected = torch.autograd.grad(exact, parameters, allow_unused=True)
    # Half an expert log per action; the others' mean is of logs drawn without this one.
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other * 0.5 * count / (count - 1), rtol=1e-5, atol=1e-7)
    assert float(metrics["importance_weight_mean"]) == pytest.approx(1.0)
    data = (everything.target * data_divergence((everything.target / everything.text_probability).log(), pi)).sum()
    assert float(metrics["divergence_js"] + data.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)


@pytest.mark.parametrize("pi", PIS)
def test_two_stale_rollouts_have_the_gradient_as_their_mean(smallest, pi):
    """Over all pairs that another policy draws: weights and the baseline leave the estimate without bias."""
    everything, other = enumerate_logs(smallest), smallest_model(2)
    drawn = [
        replace(log, temperature=1.0, logprobs=found.tolist())
        for log, found in zip(everything.logs, log_probs(other, everything.logs), strict=True)
    ]
    rollouts = judged(objective_of(pi=pi), smallest, drawn, everything.log_ratio)
    weight, reward = importance_weights(rollouts), mixture_reward(everything.log_ratio, pi)
    likely = torch.tensor([sum(log.logprobs) for log in drawn], dtype=torch.float64).exp()
    assert float(likely.sum()) == pytest.approx(1.0)
    assert float((weight - 1).abs().max()) > 0.5
    coefficient = torch.zeros_like(reward)
    for first, second in np.ndindex(len(drawn), len(drawn)):
        pair = torch.tensor([first, second])
        advantage = leave_one_out_advantage(reward[pair], float(reward[pair].mean()), 2)
        coefficient.index_add_(0, pair, likely[first] * likely[second] * weight[pair] * advantage / 2)
    parameters = list(smallest.parameters())
    found = torch.autograd.grad(-(coefficient @ everything.log_q), parameters, retain_graph=True, allow_unused=True)
    exact = divergence(everything.target, everything.text_probability, pi)
    for gradient, expected in zip(found, torch.autograd.grad(exact, parameters, allow_unused=True), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prior", [None, 0.2, 0.8])
def test_the_discriminator_is_best_at_the_log_ratio_whatever_its_prior(smallest, prior):
    """Experts in exact proportion to the target, each text as often as a 200th of its probability says."""
    everything, objective = enumerate_logs(smallest), objective_of(pi=0.4, prior=prior)
    counts = (everything.target * 200).round().clamp(min=1)
    target = counts / counts.sum()
    everything = replace(everything, target=target)
    first = {int(text): number for number, text in reversed(list(enumerate(everything.text)))}
    experts = [first[text] for text, count in enumerate(counts.int().tolist()) for _ in range(count)]
    drawn = [
        replace(log, temperature=1.0, logprobs=[-math.log(len(everything.logs)), *[0.0] * (len(log.actions) - 1)])
        for log in everything.logs
    ]
    scores = everything.log_ratio.requires_grad_()
    loss, _ = objective.rollout_loss(
        replace_scores(judged(objective, smallest, drawn, scores.detach()), scores), LogCounts(1, 1, 0), 0
    )
    data = judged(objective, smallest, [replace(everything.logs[n], source="expert") for n in experts], scores.detach())
    assert not data.values.q.requires_grad  # nothing of the policy learns from them
    loss = loss + objective.data_loss(replace_scores(data, scores[experts]), 0)[0]
    (gradient,) = torch.autograd.grad(loss, scores)
    of_text = torch.zeros_like(target).index_add(0, everything.text, gradient)
    assert float(gradient.abs().max()) > 1e-3  # of one way to a text alone
    torch.testing.assert_close(of_text, torch.zeros_like(of_text), rtol=0, atol=1e-8)


def replace_scores(logs: EvaluatedLogs, scores: Tensor) -> EvaluatedLogs:
    return replace(logs, values=replace(logs.values, measured=scores))


def test_a_constant_reward_has_no_gradient_at_all():
    """With a discriminator that says the same of every text, and rollouts that are stale."""
    model, objective = tiny("gpt2"), objective_of(pi=0.3)
    policy, tree = TreePolicy(model, BACKSPACE), build(policy_logs(HARD))
    counts = LogCounts.of([tree])
    objective.prepare(policy, [tree], counts, 0)
    with torch.no_grad():
        for parameter in objective._discriminator.network.head[2].parameters():
            parameter.zero_()
    objective.prepare(policy, [tree], counts, 0)
    rollouts = objective.evaluate(policy, tree, counts, 0)
    assert importance_weights(rollouts).std() > 0
    objective.rollout_loss(rollouts, counts, 0)[0].backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())
    alike = torch.full((7,), 0.7)
    assert not leave_one_out_advantage(alike, float(alike.double().sum()) / 7, 7).any()


# The discriminator, and the step ------------------------------------------------------------------------------------


def policy_logs(logs: Sequence[Log]) -> list[Log]:
    return [replace(log, source="policy", temperature=1.0, logprobs=[-1.5] * len(log.actions)) for log in logs]


@pytest.mark.parametrize("logs", [HARD, HARD[::-1]], ids=["in order", "reversed"])
@pytest.mark.parametrize("body", ["policy", "own"])
def test_it_reads_the_last_text_of_each_log(body, logs):
    """As its network says of each token after the text before it, run alone; the policy gets no gradient from that."""
    model = tiny("llama").double()
    policy, tree, objective = TreePolicy(model, BACKSPACE), build(logs), objective_of(body)
    found = objective.evaluate(policy, tree, LogCounts.of([tree]), 0).values.measured
    network = objective._discriminator.network
    reader = model.base_model if body == "policy" else network.body
    table = model.lm_head.weight if body == "policy" else network.body.embed_tokens.weight
    for log, score in zip(logs, found, strict=True):
        text = states(log, BACKSPACE)[-1]
        expected = torch.zeros((), dtype=torch.float64)
        for length in range(len(log.prompt), len(text)):
            hidden = reader(input_ids=torch.tensor([text[:length]]), use_cache=False).last_hidden_state[0, -1]
            expected = expected + network(torch.stack([hidden, table[text[length]]])[None])[0]
        torch.testing.assert_close(score, expected)
    found.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert moved == ({"head"} if body == "policy" else {"head", "body"})


def test_at_first_the_discriminator_learns_alone():
    model, objective = tiny("gpt2"), objective_of(warmup_steps=3)
    policy, tree = TreePolicy(model, BACKSPACE), build(policy_logs(HARD))
    counts = LogCounts.of([tree])
    objective.prepare(policy, [tree], counts, 0)
    for step, moves in ((0, False), (2, False), (3, True)):
        model.zero_grad()
        objective.rollout_loss(objective.evaluate(policy, tree, counts, step), counts, step)[0].backward()
        assert any(bool(parameter.grad.any()) for parameter in model.parameters()) == moves
        assert all(parameter.grad.any() for parameter in objective._discriminator.network.parameters())


@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "activations recomputed"])
def test_a_body_of_its_own_leaves_the_policys_alone(recomputed):
    model = tiny("llama")
    if recomputed:
        checkpoint_activations(model)
    policy, tree, objective = TreePolicy(model, BACKSPACE), build(policy_logs(HARD)), objective_of("own")
    before, counts = weights_of(model), LogCounts.of([tree])
    objective.prepare(policy, [tree], counts, 0)
    first = objective.evaluate(policy, tree, counts, 0)
    objective.rollout_loss(first, counts, 0)[0].backward()
    objective.advance()
    assert_bit_identical(weights_of(model), before)
    with torch.no_grad():
        moved = objective.evaluate(policy, tree, counts, 0).values.measured
        model.base_model.embed_tokens.weight.mul_(2.0)
        still = objective.evaluate(policy, tree, counts, 0).values.measured
    assert not torch.equal(moved, first.values.measured)
    assert torch.equal(still, moved)


@pytest.mark.parametrize("body", ["policy", "own"])
def test_the_step_is_the_same_however_it_is_cut(body):
    """One tree, or one for each log: losses, metrics and gradients of policy and discriminator add up."""
    results = []
    logs = policy_logs(HARD)
    for parts in ([logs], [[log] for log in logs]):
        model, objective = tiny("gpt2").double(), objective_of(body, pi=0.3)
        policy, trees = TreePolicy(model, BACKSPACE), [build(part) for part in parts]
        counts = LogCounts.of(trees)
        objective.prepare(policy, trees, counts, 0)
        share = [objective.rollout_loss(objective.evaluate(policy, t, counts, 0), counts, 0) for t in trees]
        loss = torch.stack([loss for loss, _ in share]).sum()
        modules = [*model.parameters(), *objective._discriminator.network.parameters()]
        gradients = torch.autograd.grad(loss, modules, allow_unused=True)
        reward = torch.stack([metrics["reward_mean"] for _, metrics in share]).sum()
        results.append((loss, reward, [gradient for gradient in gradients if gradient is not None]))
    torch.testing.assert_close(*results)


def test_a_tree_without_logs_adds_nothing():
    """As a rank has one whose share is empty."""
    model, objective = tiny("gpt2").double(), objective_of()
    policy, tree = TreePolicy(model, BACKSPACE), build(policy_logs(HARD))
    counts = LogCounts.of([tree])
    objective.prepare(policy, [tree], counts, 0)
    mean = objective._reward_mean
    objective.prepare(policy, [tree, tree.without_logs()], counts, 0)
    assert objective._reward_mean == mean
    for is_rollouts in (False, True):
        empty = objective.evaluate(policy, tree.without_logs(), counts, 0)
        loss, metrics = objective.rollout_loss(empty, counts, 0) if is_rollouts else objective.data_loss(empty, 0)
        assert loss.item() == 0
        assert all(value.item() == 0 for value in metrics.values())
        loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in objective._discriminator.network.parameters())


def test_a_discriminator_without_a_finite_gradient_stops_before_anything_moves(task):
    model = make_model(task)
    trainer = make_trainer(task, model, make_stage(ADVERSARIAL))
    trainer.train_step()
    network = trainer._objective._discriminator.network
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
    """5 steps == 2 steps, a checkpoint on disk, fresh objects, and 3 steps; without the discriminator's state, not."""
    stage = make_stage({"name": "adversarial_js", "pi": 0.8, "discriminator": {"body": body, "warmup_steps": 1}}, 5)
    straight = make_model(task, seed=3)
    expected = [row["loss"] for row in train(make_trainer(task, straight, stage), 5)]

    first, stream = make_model(task, seed=3), make_stream(task)
    trainer = make_trainer(task, first, stage, stream)
    losses = [row["loss"] for row in train(trainer, 2)]
    progress = progress_at(2, stage_steps=5, expert_stream=stream.state())
    path = save_checkpoint(tmp_path, first, task.tokenizer, progress, trainer.state(), keep=1)

    ends = []
    for forgets in (False, True):
        second, stream = make_model(task, seed=4), make_stream(task)
        rollouts = HandMadeRollouts(task, next_row=2 * stage.rollout_batch_size)
        trainer = make_trainer(task, second, stage, stream, rollouts)
        load_weights(second, path)
        state = read_training_state(path)
        trainer.load_state(state | ({"objective": {}} if forgets else {}))
        stream.load_state(read_progress(path).expert_stream)
        if not forgets:  # a stage that is stopped again before its first step
            assert_bit_identical(trainer.state()["objective"], state["objective"])
        rest = train(trainer, 3)
        ends.append(([*losses, *(row["loss"] for row in rest)], weights_of(second)))
    assert ends[0][0] == expected
    assert_bit_identical(ends[0][1], weights_of(straight))
    assert any(not torch.equal(ends[1][1][name], tensor) for name, tensor in ends[0][1].items())


@dataclass
class Answers:
    """Answers of one token to one question, as experts give them, in exact proportion."""

    task: Task
    answers: str
    draws: int = 0

    def draw(self, count: int) -> pa.RecordBatch:
        rows = HandMadeRollouts(self.task, tuple(self.answers), next_row=self.draws).draw(count).to_pylist()
        self.draws += count
        prompt = list(self.task.train["prompt_ids"][0])
        expert = {"source": "expert", "prompt_ids": prompt, "logprobs": None, "policy_version": None, "sampling": None}
        return pa.RecordBatch.from_pylist(
            [row | expert for row in rows], schema=HandMadeRollouts(self.task).draw(1).schema
        )


@dataclass
class OwnRollouts:
    """What the policy of now answers, in at most three actions."""

    task: Task
    model: PreTrainedModel
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @torch.no_grad()
    def draw(self, count: int) -> pa.RecordBatch:
        prompt = list(self.task.train["prompt_ids"][0])
        rows = HandMadeRollouts(self.task).draw(count).to_pylist()
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
        return pa.RecordBatch.from_pylist(rows, schema=HandMadeRollouts(self.task).draw(1).schema)


def answer_shares(task: Task, model: PreTrainedModel, answers: str) -> list[float]:
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
    """From three answers alike, towards 7 in three cases of four and 3 in the other; not the most frequent alone."""
    model = make_model(task)
    quick = {"learning_rate": 5e-3, "warmup_steps": 3, "schedule": "constant"}
    trunk = make_stage({"name": "mle"}, 40, batch_size=9, optimizer=quick)
    train(make_trainer(task, model, trunk, Answers(task, "735")), 40)
    assert answer_shares(task, model, "735") == pytest.approx([1 / 3] * 3, abs=0.05)
    discriminator = {"body": body, "learning_rate": learning_rates[1], "warmup_steps": steps // 6}
    stage = make_stage(
        {"name": "adversarial_js", "pi": pi, "discriminator": discriminator},
        steps,
        batch_size=32,
        rollout_batch_size=32,
        optimizer={"learning_rate": learning_rates[0], "warmup_steps": 0},
    )
    metrics = train(make_trainer(task, model, stage, Answers(task, "7773"), OwnRollouts(task, model)), steps)
    assert answer_shares(task, model, "735") == pytest.approx([0.75, 0.25, 0.0], abs=0.18)
    found = [row["divergence_js"] for row in metrics]
    assert np.mean(found[-10:]) < 0.6 * max(found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pi": 0.0}, "pi=0 is maximum likelihood, .* choose objective mle"),
        ({"pi": 1.5}, "less than or equal to 1"),
        ({"discriminator": {"prior": 1.0}}, "less than 1"),
        ({"discriminator": {"body": "shared"}}, "'policy' or 'own'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ObjectiveSettings).validate_python({"name": "adversarial_js"} | settings)
