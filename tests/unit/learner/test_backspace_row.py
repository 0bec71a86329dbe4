"""A new backspace row: the most probable one given demonstrations, found from any start, and nothing else moves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from buffer.experts.tasks import load_task
from buffer.settings import ArithmeticTaskSettings, NoiseSettings
from learner.batches import build_micro_batches
from learner.demonstrations import Demonstrations, TaughtRow, teach_backspace_row
from learner.model.backspace_row import BackspaceEvidence, gather_evidence, most_probable_row
from learner.model.policy import load_policy
from learner.ranks import Ranks
from learner.settings.model import PretrainedModelSettings, ScratchModelSettings
from learner.state_tree.batch import TreeSettings
from learner.state_tree.policy import TreePolicy

HIDDEN = 8
NOISE = NoiseSettings(kind="task", rate=0.3)
OWN_NOISE = NoiseSettings(kind="policy", rate=0.3)
TASK = load_task(ArithmeticTaskSettings(max_digits=2, train_questions=200, held_out_questions=50))


def evidence(num_states: int = 400, level: float = 22.0, seed: int = 0) -> BackspaceEvidence:
    """States of a model whose tokens sum up to about `level`, as far above any single row as in real ones."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_states, HIDDEN, generator=random, dtype=torch.float64)
    hidden[:, 0] += 20.0
    log_sum = level + torch.randn(num_states, generator=random, dtype=torch.float64)
    true_row = torch.linspace(-1.0, 1.0, HIDDEN, dtype=torch.float64)
    true_row[0] = (level - 2.0) / 20.0
    taken = torch.bernoulli(torch.sigmoid(hidden @ true_row - log_sum), generator=random)
    mean, deviation = torch.full((2, HIDDEN), 0.1, dtype=torch.float64)
    return BackspaceEvidence(hidden, log_sum, taken, mean, 10 * deviation)


def log_posterior(row: Tensor, found: BackspaceEvidence) -> Tensor:
    """The oracle: torch's own distributions."""
    actions = Bernoulli(logits=found.hidden @ row - found.log_sum).log_prob(found.taken).sum()
    posterior: Tensor = actions + Normal(found.mean, found.deviation).log_prob(row).sum()
    return posterior


@pytest.mark.parametrize("level", [0.0, 22.0, 200.0])
def test_the_row_is_at_the_top_of_the_posterior(level: float) -> None:
    found = evidence(level=level)
    row = most_probable_row(found).requires_grad_()
    (slope,) = torch.autograd.grad(log_posterior(row, found), row)
    (at_start,) = torch.autograd.grad(log_posterior(start := found.mean.clone().requires_grad_(), found), start)
    assert slope.abs().max() < 1e-3
    assert slope.abs().max() < 1e-6 * max(1.0, float(at_start.abs().max()))


def test_a_coordinate_that_no_row_has_stays_nearly_as_it_is() -> None:
    found = evidence()
    deviation = found.deviation.clone()
    deviation[3] = 0.0
    row = most_probable_row(BackspaceEvidence(found.hidden, found.log_sum, found.taken, found.mean, deviation))
    assert torch.isfinite(row).all()
    assert abs(float(row[3] - found.mean[3])) < 0.01


@pytest.fixture
def pretrained(tmp_path: Path) -> PretrainedModelSettings:
    """A model as a user has it: it knows nothing of backspace, which is far below every token."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "max_positions": 64}
    policy = load_policy(ScratchModelSettings(**sizes, tie_embeddings=False), TASK.tokenizer)
    policy.model.config.backspace_token_id = None
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.add_(0.3 * policy.model.get_output_embeddings().weight.sign())
    policy.model.save_pretrained(tmp_path)
    TASK.tokenizer.save_pretrained(tmp_path)
    return PretrainedModelSettings(name=str(tmp_path), dtype="float32")


@pytest.mark.parametrize("noise", [NOISE, OWN_NOISE], ids=lambda noise: noise.kind)
def test_a_pretrained_model_takes_back_about_as_often_as_it_is_shown(
    pretrained: PretrainedModelSettings, noise: NoiseSettings
) -> None:
    loaded = load_policy(pretrained)
    assert loaded.is_row_new
    policy = TreePolicy(loaded.model, loaded.backspace_id)
    contract = TASK.contract(loaded.model.config.vocab_size)
    settings = TreeSettings(loaded.backspace_id, loaded.tokenizer.eos_token_id, 512, 64)
    stream = TASK.expert_stream(noise, contract, seed=99)
    others = Demonstrations(policy, stream, settings, Ranks(), seed=1)
    unseen = gather_evidence(policy, build_micro_batches(others.sample(200), settings))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    nats = []
    for _ in range(2):
        row = loaded.model.get_output_embeddings().weight[loaded.backspace_id].detach().double()
        nats.append(unseen.odds(row)[2])
        taught = teach_backspace_row(policy, TASK, noise, contract, settings, Ranks(), seed=0)
    assert nats[1] < nats[0]
    share = torch.sigmoid(unseen.logit(row)).mean()
    assert float(share) == pytest.approx(float(unseen.taken.mean()), rel=0.2)
    assert taught is not None
    assert taught.nats == pytest.approx(nats[1], rel=0.2)  # on others, of the same kind
    after = loaded.model.state_dict()
    (changed,) = (name for name in after if not torch.equal(after[name], before[name]))
    rows = (after[changed] != before[changed]).any(dim=1).nonzero().flatten().tolist()
    assert (changed, rows) == ("lm_head.weight", [loaded.backspace_id])


def test_own_mistakes_are_what_the_model_would_write(pretrained: PretrainedModelSettings) -> None:
    """Of a model that is all but certain everywhere; in several micro-batches that share prompts."""
    loaded = load_policy(pretrained)
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.mul_(1e4)
    policy = TreePolicy(loaded.model, loaded.backspace_id)
    contract = TASK.contract(loaded.model.config.vocab_size)
    settings = TreeSettings(loaded.backspace_id, loaded.tokenizer.eos_token_id, 48, 64)
    drawn, plan = (TASK.expert_stream(OWN_NOISE, contract, seed=5) for _ in range(2))
    batch = Demonstrations(policy, drawn, settings, Ranks(), seed=0).sample(50)
    planned = plan.plan(50)
    certain = []
    for prefix in planned.prefixes().rows():
        with torch.no_grad():
            logits = loaded.model(torch.from_numpy(prefix).long()[None]).logits[0, -1]
        logits[loaded.backspace_id] = -torch.inf
        certain.append(int(logits.argmax()))
    expected = plan.execute(planned, np.array(certain, dtype=np.int32))
    assert len(certain) > 30
    for column in ("actions", "executed", "id"):
        assert batch.column(column) == expected.column(column)


def test_without_noise_the_row_stays(pretrained: PretrainedModelSettings) -> None:
    loaded = load_policy(pretrained)
    before = loaded.model.get_output_embeddings().weight.detach().clone()
    settings = TreeSettings(loaded.backspace_id, loaded.tokenizer.eos_token_id, 512, 64)
    policy, contract = TreePolicy(loaded.model, loaded.backspace_id), TASK.contract(loaded.model.config.vocab_size)
    none = NoiseSettings(kind="task", rate=0.0)
    assert teach_backspace_row(policy, TASK, none, contract, settings, Ranks(), seed=0) is None
    assert torch.equal(loaded.model.get_output_embeddings().weight, before)


def test_the_evidence_is_that_of_the_model_itself(pretrained: PretrainedModelSettings) -> None:
    """Of one log: hidden states and sums over the tokens by the model's own forward pass on each reduced text."""
    loaded = load_policy(pretrained)
    contract = TASK.contract(loaded.model.config.vocab_size)
    batch = TASK.expert_stream(NOISE, contract, seed=5).sample(1)
    (tree,) = build_micro_batches(batch, TreeSettings(loaded.backspace_id, loaded.tokenizer.eos_token_id, 512, 64))
    found = gather_evidence(TreePolicy(loaded.model, loaded.backspace_id), [tree])
    prompt, actions = batch.column("prompt_ids")[0].as_py(), batch.column("actions")[0].as_py()
    text, expected = list(prompt), []
    for action in actions:
        if len(text) > len(prompt):
            with torch.no_grad():
                output = loaded.model(torch.tensor([text]), output_hidden_states=True)
            logits = output.logits[0, -1].double()
            logits[loaded.backspace_id] = -torch.inf
            expected.append((output.hidden_states[-1][0, -1], logits.logsumexp(0), action == loaded.backspace_id))
        text = text[:-1] if action == loaded.backspace_id else [*text, action]
    hidden, log_sum, taken = zip(*expected, strict=True)
    torch.testing.assert_close(found.hidden.float(), torch.stack(hidden), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.log_sum, torch.stack(log_sum), rtol=1e-5, atol=1e-5)
    assert found.taken.tolist() == [float(each) for each in taken]


@pytest.mark.parametrize(
    ("odds", "judged"),
    [
        ((0.4, 0.1, 0.5), "its probability is 0.40 after a mistake and 0.10 after a right token, 0.50 nats per action"),
        ((0.4, math.nan, 0.5), "its probability is 0.40 after a mistake, 0.50 nats per action"),  # of one token each
        ((math.nan, math.nan, math.nan), "backspace could never be taken"),
    ],
)
def test_a_row_is_judged_by_the_states_that_there_are(odds: tuple[float, float, float], judged: str) -> None:
    text = str(TaughtRow(100, *odds))
    assert f"on 64 others {judged}" in text
    assert "nan " not in text
