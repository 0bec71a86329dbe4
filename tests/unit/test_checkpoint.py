"""Checkpoints: what a kill at any moment leaves behind, and what is loaded back or refused."""

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
from learner import checkpoint as checkpoint_module
from learner.checkpoint import (
    Progress,
    checkpoints_of,
    read_progress,
    read_training_state,
    save_checkpoint,
)
from learner.model import load_policy
from learner.model_files import load_weights
from learner.settings import ScratchModelSettings

TOKENIZER = character_tokenizer("0123456789")
PROGRESS = Progress(
    stage="trunk",
    step=7,
    stage_steps=40,
    policy_version=3,
    first_policy_version=1,
    expert_stream={"epoch": 1, "rows": 9},
)
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

    def save_step(step: int, keep: int = 2, policy_version: int = 3) -> Path:
        progress = replace(PROGRESS, step=step, policy_version=policy_version)
        return save_checkpoint(tmp_path, model, TOKENIZER, progress, STATE, keep)

    return save_step


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_checkpoint_is_a_hugging_face_model_with_its_tokenizer(save, model):
    path = save(7)
    assert path.name == "step-000007"
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.config.backspace_token_id == model.config.backspace_token_id
    assert_equal(loaded.state_dict(), model.state_dict())
    assert AutoTokenizer.from_pretrained(path).get_vocab() == TOKENIZER.get_vocab()
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "| stage | `trunk`, step 7 of 40 |" in card
    assert f"id {model.config.backspace_token_id}" in card


def test_progress_and_training_state_come_back(save):
    path = save(7)
    assert read_progress(path) == PROGRESS
    assert not read_progress(path).finished
    assert read_progress(save(40)).finished
    state = read_training_state(path)
    assert torch.equal(state["random_state"], STATE["random_state"])
    assert {name: value for name, value in state.items() if name != "random_state"} == {
        name: value for name, value in STATE.items() if name != "random_state"
    }


def test_training_state_is_read_without_running_code(save):
    path = save(7)
    torch.save({"step": 7, "code": Path}, path / "training_state.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        read_training_state(path)


@pytest.mark.parametrize("text", [None, "", "[1]", '{"stage": "trunk"}', '{"stage": "trunk", "other": 1}'])
def test_what_is_no_progress_is_refused_with_its_place(save, text):
    path = save(7)
    (path / "progress.json").unlink()
    if text is not None:
        (path / "progress.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"step-000007 is not a training checkpoint: .*progress\.json"):
        read_progress(path)


def test_the_newest_are_kept_in_order_of_their_numbers(save, tmp_path):
    assert checkpoints_of(tmp_path / "absent") == []
    for step in (5, 999_999, 1_000_000, 1_000_001):
        save(step, keep=2)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-1000000", "step-1000001"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-1000000", "step-1000001"}


def test_what_is_not_a_checkpoint_is_neither_listed_nor_removed(save, tmp_path):
    for name in ("step-7", "step-000001x", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000003").write_text("a file")
    save(7, keep=1)
    save(8, keep=1)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-000008"]
    assert {"step-000001x", "notes", "step-000003", "step-7"} <= {path.name for path in tmp_path.iterdir()}


def test_keeping_none_is_a_mistake(save):
    with pytest.raises(AssertionError):
        save(7, keep=0)


class KilledError(Exception):
    """Stands for the death of the process: nothing after it runs."""


def die_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let the `call`-th use of a function (from 0) end the process instead."""
    original, calls = getattr(owner, name), iter(range(10**6))

    def dying(*args, **kwargs):
        if next(calls) == call:
            raise KilledError
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


MOMENTS = [
    (checkpoint_module.torch, "save", 0),
    (checkpoint_module.json, "dumps", 0),
    (checkpoint_module.os, "fsync", 0),
    (checkpoint_module.os, "fsync", 5),
    (checkpoint_module.Path, "rename", 0),
    (checkpoint_module.Path, "rename", 1),
    (checkpoint_module.Path, "rename", 2),
    (checkpoint_module.shutil, "rmtree", 0),
    (checkpoint_module.os, "rmdir", 0),
    (checkpoint_module.os, "unlink", 3),
]


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
@pytest.mark.parametrize(("owner", "name", "call"), MOMENTS, ids=[f"{name}-{call}" for _, name, call in MOMENTS])
def test_a_kill_at_any_moment_leaves_a_complete_newest_checkpoint(
    save, model, tmp_path, monkeypatch, owner, name, call, again
):
    """With keep=1 and the same step saved again (a resumed run that had nothing left to do) too."""
    save(7, keep=1, policy_version=3)
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, call)
        try:
            save(7 if again else 8, keep=1, policy_version=4)
        except KilledError:
            killed = True
        else:
            killed = False
    found = checkpoints_of(tmp_path)
    assert found, "no checkpoint is left"
    for path in found:
        assert read_progress(path).policy_version in (3, 4)
        read_training_state(path)
        load_weights(make_model(seed=1), path)
        AutoTokenizer.from_pretrained(path)
    assert killed or read_progress(found[-1]).policy_version == 4

    # The process that comes after it ends with one checkpoint and nothing half-written.
    save(8, keep=1, policy_version=5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000008"]
    assert read_progress(tmp_path / "step-000008").policy_version == 5


def test_a_left_over_folder_is_ignored_and_replaced(save, tmp_path):
    left = tmp_path / "step-000008.tmp"
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_text("half of it")
    assert checkpoints_of(tmp_path) == []
    path = save(8)
    assert checkpoints_of(tmp_path) == [path]
    assert not (path / "model-00001-of-00002.safetensors").exists()
    assert not left.exists()


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"architecture": "gpt2"}, {"dtype": "bfloat16"}])
def test_weights_are_loaded_in_place(tmp_path, changes):
    source, target = make_model(seed=1, **changes), make_model(seed=2, **changes)
    path = save_checkpoint(tmp_path, source, TOKENIZER, PROGRESS, STATE, 1)
    memory = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    parameters = list(target.parameters())
    load_weights(target, path)
    assert_equal(target.state_dict(), source.state_dict())
    assert {name: tensor.data_ptr() for name, tensor in target.state_dict().items()} == memory
    assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))  # an optimizer holds them


def test_shards_are_put_together(tmp_path):
    source, target = make_model(seed=1), make_model(seed=2)
    source.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_weights(target, tmp_path)
    assert_equal(target.state_dict(), source.state_dict())


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
    assert_equal(target.state_dict(), before)


def test_tied_weights_may_be_stored_twice_if_they_agree(save, model):
    path = save(7)
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    target = make_model(seed=2)
    load_weights(target, path)
    assert_equal(target.state_dict(), model.state_dict())


def test_a_tied_checkpoint_does_not_fit_an_untied_model(save):
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
        load_weights(make_model(tie_embeddings=False), save(7))


def test_an_untied_checkpoint_does_not_fit_a_tied_model(tmp_path):
    path = save_checkpoint(tmp_path, make_model(tie_embeddings=False), TOKENIZER, PROGRESS, STATE, 1)
    with pytest.raises(ValueError, match="the model ties them"):
        load_weights(make_model(), path)


def test_progress_is_readable_json(save):
    assert json.loads((save(7) / "progress.json").read_text(encoding="utf-8"))["expert_stream"] == {
        "epoch": 1,
        "rows": 9,
    }
