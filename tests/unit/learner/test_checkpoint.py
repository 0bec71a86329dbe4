"""Checkpoints: what they hold, and what is loaded back or refused."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from buffer.experts.tokenizer import character_tokenizer
from learner.checkpoints.checkpoint import load_weights, read_training_state, take_snapshot
from learner.checkpoints.store import LocalCheckpoints, check_contract, read_progress
from learner.model.policy import load_policy
from learner.settings.model import ScratchModelSettings
from tests.checkpoints import CONTRACT, progress_at, save_checkpoint
from tests.training import assert_bit_identical, weights_of

TOKENIZER = character_tokenizer("0123456789")
PROGRESS = progress_at(7, metrics={"loss": 0.5})
STATE = {"step": 7, "random_state": torch.arange(5, dtype=torch.uint8), "nested": {"lr": [0.1, 0.2], "none": None}}


def make_model(**changes) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_positions": 16}
    return load_policy(ScratchModelSettings(**(sizes | changes)), TOKENIZER).model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def save(model, tmp_path):
    """Saves the module's model at a step; gives the checkpoint's path."""

    def save_step(step: int) -> Path:
        return save_checkpoint(tmp_path, model, TOKENIZER, replace(PROGRESS, step=step), STATE)

    return save_step


def test_a_checkpoint_is_a_hugging_face_model_with_its_tokenizer(save, model):
    path = save(7)
    assert path.name == "step-000007"
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.config.backspace_token_id == model.config.backspace_token_id
    assert_bit_identical(loaded.state_dict(), model.state_dict())
    assert AutoTokenizer.from_pretrained(path).get_vocab() == TOKENIZER.get_vocab()
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "| stage | `pretrain`, step 7 of 40 |" in card
    assert f"id {model.config.backspace_token_id}" in card


def test_progress_and_training_state_come_back(save):
    path = save(7)
    assert read_progress(path) == PROGRESS
    assert not read_progress(path).finished
    state = read_training_state(path)
    assert read_progress(save(40)).finished
    assert torch.equal(state["random_state"], STATE["random_state"])
    assert {name: value for name, value in state.items() if name != "random_state"} == {
        name: value for name, value in STATE.items() if name != "random_state"
    }


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md", "training_state.pt", "progress.json"])
def test_a_full_disk_is_told_with_folder_and_room_by_whatever_meets_it(model, tmp_path, name):
    """/dev/full refuses every byte, as a full disk does."""
    store = LocalCheckpoints(tmp_path / "stage")

    def fill(folder: Path) -> None:
        (folder / name).symlink_to("/dev/full")
        take_snapshot(model, TOKENIZER, replace(PROGRESS, step=7), STATE).write(folder)

    store.write(3, lambda folder: (folder / "progress.json").write_text(PROGRESS.to_json()))
    with pytest.raises(OSError, match=r"^\[Errno 28\] it takes \S+ MB, of which \S+ MB were free: '.*/stage'$"):
        store.write(7, fill)
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["step-000003"], "its files give the room back"


def test_training_state_is_read_without_running_code(save):
    path = save(7)
    torch.save({"step": 7, "code": Path}, path / "training_state.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        read_training_state(path)


@pytest.mark.parametrize("text", [None, "", "[1]", '{"stage": "pretrain"}', '{"contract": {}, "other": 1}'])
def test_what_is_no_progress_is_refused_with_its_place(save, text):
    path = save(7)
    (path / "progress.json").unlink()
    if text is not None:
        (path / "progress.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"step-000007 is not a training checkpoint: .*progress\.json"):
        read_progress(path)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"architecture": "gpt2"}, {"dtype": "bfloat16"}])
def test_weights_are_loaded_in_place(tmp_path, changes):
    source, target = make_model(seed=1, **changes), make_model(seed=2, **changes)
    path = save_checkpoint(tmp_path, source, TOKENIZER, PROGRESS, STATE)
    memory = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    parameters = list(target.parameters())
    load_weights(target, path)
    assert_bit_identical(target.state_dict(), source.state_dict())
    assert {name: tensor.data_ptr() for name, tensor in target.state_dict().items()} == memory
    assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))  # an optimizer holds them


def test_shards_are_put_together(tmp_path):
    source, target = make_model(seed=1), make_model(seed=2)
    source.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_weights(target, tmp_path)
    assert_bit_identical(target.state_dict(), source.state_dict())


def rewrite(path: Path, change) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"missing \['{NORM}'\]"),
        (lambda t: t.update(extra=torch.zeros(1)), r"unexpected \['extra'\]"),
        (lambda t: t.update({NORM: torch.zeros(17)}), rf"{NORM} is \(17,\), the model's is \(16,\)"),
        (lambda t: t.clear(), "missing .*embed_tokens"),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            "lm_head.weight and model.embed_tokens.weight differ, but the model ties them",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_loaded(save, change, message):
    path = save(7)
    rewrite(path, change)
    target = make_model(seed=2)
    before = weights_of(target)
    with pytest.raises(ValueError, match=rf"(?s)step-000007 does not fit the model: .*{message}"):
        load_weights(target, path)
    assert_bit_identical(target.state_dict(), before)


def test_tied_weights_may_be_stored_twice_if_they_agree(save, model):
    path = save(7)
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    target = make_model(seed=2)
    load_weights(target, path)
    assert_bit_identical(target.state_dict(), model.state_dict())


def test_tokens_that_mean_something_else_are_refused():
    check_contract(PROGRESS, CONTRACT, "here")
    with pytest.raises(ValueError, match=r"checkpoint here was trained with other tokens .*'abc'.* than this run has"):
        check_contract(PROGRESS, replace(CONTRACT, tokenizer_hash="other"), "here")


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}])
def test_a_snapshot_shares_nothing_with_what_goes_on(tmp_path, changes):
    """Weights, optimizer state and random state change in place with the next step, while the snapshot is written."""
    model = make_model(**changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss.backward()
        optimizer.step()

    step()
    state = {"optimizer": optimizer.state_dict(), "random_state": torch.get_rng_state()}
    before, moment = weights_of(model), optimizer.state_dict()["state"][0]["exp_avg"].clone()
    snapshot = take_snapshot(model, TOKENIZER, PROGRESS, state)
    step()
    torch.rand(1)
    model.config.backspace_token_id = 99
    snapshot.write(tmp_path)
    assert_bit_identical(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), before)
    assert json.loads((tmp_path / "config.json").read_text())["backspace_token_id"] != 99
    read = read_training_state(tmp_path)
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], moment)
    assert not torch.equal(moment, optimizer.state_dict()["state"][0]["exp_avg"]), "the next step moved it"
    assert read["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
