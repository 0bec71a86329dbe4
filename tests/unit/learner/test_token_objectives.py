"""Unlikelihood, EMO and scheduled sampling: against a dense float64 oracle, their golden numbers, and where their
optimum is not the data."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from learner.objectives import make_objective, token_objectives
from learner.objectives.base import EvaluatedTrajectories
from learner.objectives.token_objectives import Emo, ScheduledSampling, Unlikelihood, emo_loss
from learner.settings.objectives import EmoSettings, ScheduledSamplingSettings, UnlikelihoodSettings
from learner.state_tree import policy as policy_module
from learner.state_tree import vocabulary as vocabulary_module
from learner.state_tree.policy import StateLogits, TreePolicy
from learner.state_tree.vocabulary import chunked_values
from learner.trainer import Trainer
from tests.objectives import counts_of, objective_of
from tests.oracle import Log, states
from tests.training import check_resume, make_stage, make_stream, make_trainer
from tests.unit.learner.test_state_tree import BACKSPACE, EOS, HARD, VOCAB, build, text_of, tiny

LOGS = [*HARD, Log([1, 4], [5, 5, 6, 5, 5, EOS]), Log([1, 4], [4, 4, 5], finish_reason="max_length")]
"""Repeated tokens, labels that the context holds; backspace trajectories too, which the loss is as well defined for."""

WITHOUT_TOKEN = ((0, 1), (VOCAB - 1, VOCAB))
"""Ids that the trajectories do not hold."""


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2").double()


@pytest.fixture(scope="module")
def unsure():
    """Close to uniform, so that what it draws is seldom what stood there."""
    model = tiny("gpt2").double()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    return model


def evaluate(objective, model, trajectories=LOGS, step=0) -> EvaluatedTrajectories:
    tree = build(trajectories)
    return objective.evaluate(TreePolicy(model, BACKSPACE, WITHOUT_TOKEN), tree, counts_of(tree), step)


def dense(model, trajectories, ids_without_token=()) -> list[tuple[list[int], int, Tensor]]:
    """Text, label and [V] log-probabilities of every action, each text run alone."""
    found = []
    for trajectory in trajectories:
        for text, action in zip(states(trajectory, BACKSPACE), trajectory.actions, strict=False):
            logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            for begin, end in ids_without_token:
                logits = logits.index_fill(0, torch.arange(begin, end), -torch.inf)
            if len(text) == len(trajectory.prompt):
                logits = logits.index_fill(0, torch.tensor([BACKSPACE]), -torch.inf)
            found.append((text, action, logits.log_softmax(0)))
    return found


def emo_of(table: Tensor, **settings) -> Emo:
    """With the costs of a given table."""
    objective = Emo(EmoSettings(name="emo", **settings))
    objective.load_state({"table": table})
    return objective


def assert_same_loss_and_gradient(loss: Tensor, expected: Tensor, model) -> None:
    parameters = list(model.parameters())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(expected, parameters)
    )


@pytest.fixture(params=[None, 12], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Chunks of a few columns and a few rows, which divide neither the vocabulary nor the states; none are kept."""
    if request.param is not None:
        few = partial(chunked_values, chunk_elements=request.param, kept_elements=0)
        monkeypatch.setattr(policy_module, "chunked_values", few)
        monkeypatch.setattr(token_objectives, "CHUNK_ELEMENTS", request.param)
        monkeypatch.setattr(policy_module, "CHUNK_ELEMENTS", request.param)
        for module in (policy_module, vocabulary_module):
            monkeypatch.setattr(module, "VOCABULARY_CHUNK", 3)


def test_unlikelihood_against_the_oracle(model, chunks):
    objective = Unlikelihood(UnlikelihoodSettings(name="unlikelihood", weight=0.7))
    loss, metrics = objective.data_loss(evaluate(objective, model), 0)
    terms = []
    for text, label, log_q in dense(model, LOGS, WITHOUT_TOKEN):
        context = [token for token in set(text) if token != label]
        terms.append(-log_q[label] - 0.7 * torch.log(1 - log_q[context].exp()).sum())
    assert_same_loss_and_gradient(loss, torch.stack(terms).mean(), model)
    assert float(metrics["loss_behavior_cloning"] + 0.7 * metrics["loss_unlikelihood"]) == pytest.approx(loss.item())


def test_unlikelihood_is_finite_where_the_model_is_certain():
    """A context token of probability 1 in float32: 1 - q is 0, or rounds below it."""
    model = tiny("gpt2")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e3)
    objective = Unlikelihood(UnlikelihoodSettings(name="unlikelihood"))
    loss, metrics = objective.data_loss(evaluate(objective, model), 0)
    loss.backward()
    assert metrics["loss_unlikelihood"] > 0.5
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(("mode", "cap"), [(1, None), (2, None), (1, 3.0), (2, 0.2)])
def test_emo_against_the_oracle(model, chunks, mode, cap):
    table = torch.randn(VOCAB, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective = emo_of(table, mode=mode, ratio_cap=cap)
    loss, metrics = objective.data_loss(evaluate(objective, model), 0)
    unit = table / table.norm(dim=1, keepdim=True)
    cost = 1 - unit @ unit.T
    terms, distances = [], []
    for _, label, log_q in dense(model, LOGS, WITHOUT_TOKEN):
        mle, demd = -log_q[label], log_q.exp() @ cost[:, label]
        limit = math.inf if cap is None else cap
        if mode == 1:
            terms.append((mle + min(mle.item() / demd.item(), limit) * demd) / 2)
        else:
            terms.append(min(demd.item() / mle.item(), limit) * mle + demd)
        distances.append(demd.item())
    assert_same_loss_and_gradient(loss, torch.stack(terms).mean(), model)
    assert float(metrics["loss_earth_mover"]) == pytest.approx(sum(distances) / len(distances))


def test_emo_freezes_the_models_own_embedding(model):
    """Costs are those of the first evaluation, whatever the weights become, and no gradient flows into them."""
    settings = EmoSettings(name="emo")
    own, given = Emo(settings), emo_of(model.get_output_embeddings().weight.detach().clone())
    losses = [objective.data_loss(evaluate(objective, model), 0)[0] for objective in (own, given)]
    assert_same_loss_and_gradient(*losses, model)
    other = tiny("gpt2").double()
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn(other.lm_head.weight.shape, generator=torch.Generator().manual_seed(2)))
    expected = given.data_loss(evaluate(given, other), 0)[0]
    torch.testing.assert_close(own.data_loss(evaluate(own, other), 0)[0], expected)
    fresh = Emo(settings)
    assert float(fresh.data_loss(evaluate(fresh, other), 0)[1]["loss_earth_mover"]) != pytest.approx(
        float(own.data_loss(evaluate(own, other), 0)[1]["loss_earth_mover"])
    )


def test_emo_distance_is_never_negative_in_bfloat16():
    """Where the model is certain of the label, and all rows point almost the same way."""
    model = tiny("gpt2").bfloat16()
    with torch.no_grad():
        model.lm_head.weight.add_(10.0)
    objective = Emo(EmoSettings(name="emo"))
    data = evaluate(objective, model)
    assert data.values.measured.dtype == torch.float32
    assert data.values.measured.min() >= 0
    objective.data_loss(data, 0)[0].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def emo_fixed_point(share: float, mode: int) -> float:
    """Where the gradient of the expected loss vanishes: two tokens of orthogonal embeddings, so that DEMD = 1 - q."""
    low, high = 0.5, 1 - 1e-6
    for _ in range(60):
        logit = torch.logit(torch.tensor((low + high) / 2, dtype=torch.float64)).requires_grad_()
        log_q = torch.nn.functional.logsigmoid(torch.stack([logit, -logit]))
        losses = emo_loss(-log_q, 1 - log_q.exp(), mode)
        (share * losses[0] + (1 - share) * losses[1]).backward()
        low, high = ((low + high) / 2, high) if logit.grad < 0 else (low, (low + high) / 2)
    return (low + high) / 2


@pytest.mark.parametrize(
    ("share", "mode", "expected", "digits"),
    [(0.6, 1, 0.628114, 6), (0.7, 1, 0.747875, 6), (0.8, 1, 0.852415, 6), (0.9, 1, 0.937275, 6), (0.7, 2, 0.8957, 4)],
)
def test_emo_is_not_consistent(share, mode, expected, digits):
    """The optimum is sharper than the data: golden numbers."""
    assert round(emo_fixed_point(share, mode), digits) == expected


def test_a_cost_table_of_another_vocabulary_is_refused(model, tmp_path):
    objective = emo_of(torch.ones(VOCAB + 1, 4))
    with pytest.raises(ValueError, match=rf"{VOCAB + 1} rows and the model a vocabulary of {VOCAB}: set cost_model"):
        evaluate(objective, model)
    with pytest.raises(ValueError, match=r"cost_model '.*nothing' cannot be loaded"):
        make_objective(EmoSettings(name="emo", cost_model=str(tmp_path / "nothing")))


def test_the_costs_of_another_model_are_read_from_its_folder(model, tmp_path):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    other.save_pretrained(tmp_path)
    objective = make_objective(EmoSettings(name="emo", cost_model=str(tmp_path)))
    expected = emo_of(other.lm_head.weight.detach())
    torch.testing.assert_close(
        evaluate(objective, model).values.measured, evaluate(expected, model).values.measured, rtol=0, atol=0
    )


def scheduled(**settings) -> ScheduledSampling:
    return ScheduledSampling(ScheduledSamplingSettings(name="scheduled_sampling", **settings))


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({"schedule": "linear", "k": 0.9, "slope": 0.01, "least_truth_fraction": 0.2}, 30, 0.6),
        ({"schedule": "linear", "k": 0.9, "slope": 0.01, "least_truth_fraction": 0.2}, 1000, 0.2),
        ({"schedule": "exponential", "k": 0.99}, 50, 0.99**50),
        ({"schedule": "inverse_sigmoid", "k": 20.0}, 0, 20 / 21),
        ({"schedule": "inverse_sigmoid", "k": 20.0}, 100, 20 / (20 + math.exp(5))),
        ({"schedule": "inverse_sigmoid", "k": 2.0}, 100_000, 0.0),  # exp(50,000) has no float
    ],
)
def test_schedules(settings, step, expected):
    assert scheduled(**settings).truth_fraction(step) == pytest.approx(expected, abs=1e-12)


def test_prompts_and_labels_are_true_and_answers_are_the_models(unsure):
    tree = build(LOGS)
    objective = scheduled(schedule="linear", k=1e-9)
    replaced = []
    for step in range(20):
        data = evaluate(objective, unsure, step=step)
        for part, name in (
            ("actions", "label"),
            ("actions", "state"),
            ("nodes", "positions"),
            ("nodes", "subtree_end"),
        ):
            assert torch.equal(getattr(getattr(data.tree, part), name), getattr(getattr(tree, part), name))
        assert all(
            text_of(data.tree, int(node)) == text_of(tree, int(node))
            for node in tree.nodes.states[tree.trajectories.start]
        )
        assert BACKSPACE not in data.tree.nodes.token_ids
        replaced.append(data.tree.nodes.token_ids != tree.nodes.token_ids)
    ever = torch.stack(replaced).any(0)
    in_prompt = {tuple(trajectory.prompt[:n]) for trajectory in LOGS for n in range(1, len(trajectory.prompt) + 1)}
    expected = [tuple(text_of(tree, node)) not in in_prompt for node in range(tree.num_nodes)]
    assert ever[: tree.num_nodes].tolist() == expected
    assert not ever[tree.num_nodes :].any()


def test_the_true_text_alone_is_maximum_likelihood(model):
    objective, likelihood = scheduled(schedule="linear", k=1.0), objective_of("mle")
    losses = [each.data_loss(evaluate(each, model), 0)[0] for each in (objective, likelihood)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_draws_depend_on_seed_and_step_alone(unsure):
    def tokens(seed: int, step: int) -> list[int]:
        objective = scheduled(schedule="linear", k=0.5, seed=seed)
        torch.manual_seed(torch.seed())
        return evaluate(objective, unsure, step=step).tree.nodes.token_ids.tolist()

    assert tokens(1, 4) == tokens(1, 4)
    assert tokens(1, 4) != tokens(1, 5)
    assert tokens(1, 4) != tokens(2, 4)


def test_tokens_are_drawn_from_the_softmax(chunks):
    """3,000 draws, within five standard deviations for each token; backspace and ids without a token never."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(2, 4, generator=generator), torch.randn(VOCAB, 4, generator=generator)
    unused = torch.zeros(2)
    rows = torch.tensor([0, 1]).repeat(3_000)
    tokens = StateLogits(hidden, weight, unused, unused, BACKSPACE, WITHOUT_TOKEN).sample_tokens(rows, generator)
    for row in (0, 1):
        logits = (weight @ hidden[row]).index_fill(0, torch.tensor([0, BACKSPACE, VOCAB - 1]), -torch.inf)
        expected = logits.softmax(0)
        share = torch.bincount(tokens[rows == row], minlength=VOCAB) / 3_000
        assert share[[0, BACKSPACE, VOCAB - 1]].sum() == 0
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 3_000).sqrt()).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth_fraction", "after_0", "after_1", "kl"),
    [(1.0, 0.9, 0.2, 0.0), (0.5, 0.655, 0.305, 0.06836), (0.25, 0.5325, 0.3575, 0.13689), (0.0, 0.41, 0.41, 0.22905)],
)
def test_scheduled_sampling_is_not_consistent(truth_fraction, after_0, after_1, kl):
    """Texts of two tokens, P(x1 = 0) = .3, P(x2 = 0 | x1) = .9 and .2, in exact proportion: a transformer is trained
    to its optimum, whose conditionals are the golden numbers; those of the data only where all tokens are true. kl: of
    the data from that optimum; with none true it is the tokens' mutual information."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=6, n_embd=16, n_layer=1, n_head=1, n_positions=4, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config).eval()
    zero, one = 4, 5
    rows = {(zero, zero): 27, (zero, one): 3, (one, zero): 14, (one, one): 56}
    trajectories = [Log([1], [*text, EOS], id=f"{n}") for text, count in rows.items() for n in range(count)]
    policy, tree = TreePolicy(model, BACKSPACE), build(trajectories, max_positions=4)
    counts = counts_of(tree)
    objective = scheduled(schedule="linear", k=max(truth_fraction, 1e-9))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
    means, steps, averaged = torch.zeros(2), 600, 300
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        loss, _ = objective.data_loss(objective.evaluate(policy, tree, counts, step), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps - averaged:
            with torch.no_grad():
                probabilities = model(torch.tensor([[1, zero], [1, one]])).logits[:, -1].softmax(1)
            means += probabilities[:, zero] / averaged
    assert means.tolist() == pytest.approx([after_0, after_1], abs=0.04)
    data = torch.tensor([0.9, 0.2])
    apart = data * (data / means).log() + (1 - data) * ((1 - data) / (1 - means)).log()
    assert float((torch.tensor([0.3, 0.7]) * apart).sum()) == pytest.approx(kl, abs=0.03)


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "unlikelihood"},
        {"name": "emo"},
        {"name": "scheduled_sampling", "schedule": "linear", "k": 0.8, "slope": 0.1},
    ],
    ids=lambda o: str(o["name"]),
)
def test_training_learns_and_resumes_bit_for_bit(task, objective, tmp_path):
    stage = make_stage(objective, steps=4)

    def make(model, step: int) -> Trainer:
        stream = make_stream(task, noise=0.0)
        stream.sample(step * stage.batch_size)
        return make_trainer(task, model, stage, stream)

    metrics = check_resume(task, make, 4, [2], tmp_path)
    assert metrics[-1]["loss_behavior_cloning"] < metrics[0]["loss_behavior_cloning"]
