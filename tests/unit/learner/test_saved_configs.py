"""Configs that lie beside a model: mended when it is loaded, so that it can be saved and stops where it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from learner.checkpoints.checkpoint import check_can_be_saved
from learner.checkpoints.store import check_writable
from learner.model.policy import load_policy
from learner.settings.model import PretrainedModelSettings
from tests.checkpoints import CONTRACT, progress_at, save_checkpoint
from tests.unit.learner.test_model import saved, word_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(saved(tmp_path / "base", word_tokenizer()))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(base: Path):
    return load_policy(PretrainedModelSettings(name=str(base), dtype="float32"))


def test_a_sound_model_needs_no_mending(base):
    assert load(base).notes == ()


@pytest.mark.parametrize(
    ("written", "left_out", "kept"),
    [
        # As Llama 2 was shipped.
        ({"temperature": 0.9, "top_p": 0.6}, ["temperature=0.9", "top_p=0.6"], {"max_length": 30}),
        ({"num_beams": 1, "early_stopping": True}, ["early_stopping=True"], {"num_beams": 1}),
        ({"pad_token_id": -1}, ["pad_token_id=-1"], {}),
        ({"forced_eos_token_id": 16}, ["forced_eos_token_id=16"], {}),  # the id of backspace, which is suppressed
        ({"temperature": 0.9, "do_sample": True, "top_p": 0.6}, [], {"temperature": 0.9, "do_sample": True}),
    ],
)
def test_a_generation_config_that_cannot_be_saved_is_mended(base, tmp_path, written, left_out, kept):
    change(base / "generation_config.json", **written, max_length=30)
    policy = load(base)
    assert len(policy.notes) == bool(left_out)
    assert all(field in note for note in policy.notes for field in left_out)
    check_can_be_saved(policy.model, policy.tokenizer, CONTRACT)
    path = save_checkpoint(tmp_path, policy.model, policy.tokenizer, progress_at(7), {})
    found = GenerationConfig.from_pretrained(path)
    assert {name: getattr(found, name) for name in kept} == kept
    assert policy.backspace_id in found.suppress_tokens
    assert found.eos_token_id == policy.tokenizer.eos_token_id


def test_generators_are_kept_from_ids_without_a_token(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(24)
    model.save_pretrained(base)
    policy = load(base)
    assert policy.model.generation_config.suppress_tokens == [8, *range(16, 24)]  # 16: backspace, 8: of the base


@pytest.mark.parametrize(
    ("of_config", "of_generation", "ends", "named"),
    [
        (2, 2, 2, []),
        (2, [2], 2, []),
        (5, 5, 2, ["5 in config.json", "5 in generation_config.json"]),  # a chat model's tokenizer on its base model
        (2, None, 2, ["None in generation_config.json"]),
        (2, [2, 5], [2, 5], []),  # as Gemma and Llama for chats: the end of a text, and that of a turn
        ([6, 5], [5, 6], [2, 5, 6], ["[6, 5] in config.json", "[5, 6] in generation_config.json"]),
        (2, [2, 16, 99], 2, ["[2, 16, 99] in generation_config.json"]),  # backspace, and an id without a token
    ],
)
def test_config_and_generation_config_name_what_ends_a_text(base, tmp_path, of_config, of_generation, ends, named):
    change(base / "config.json", eos_token_id=of_config)
    change(base / "generation_config.json", eos_token_id=of_generation)
    policy = load(base)
    assert policy.tokenizer.eos_token_id == 2
    assert len(policy.notes) == bool(named)
    assert all(words in note for note in policy.notes for words in [*named, "<eos> (id 2)"])
    assert [policy.tokenizer.eos_token_id, *policy.other_eos_ids] == (ends if isinstance(ends, list) else [ends])
    path = save_checkpoint(tmp_path, policy.model, policy.tokenizer, progress_at(7), {})
    assert AutoConfig.from_pretrained(path).eos_token_id == ends
    assert AutoModelForCausalLM.from_pretrained(path).generation_config.eos_token_id == ends
    assert (load(path).other_eos_ids, load(path).notes) == (policy.other_eos_ids, ())


def test_what_cannot_be_saved_is_found_before_training(base):
    policy = load(base)
    policy.model.generation_config.temperature = 0.5
    with pytest.raises(
        ValueError, match=r"(?s)cannot be saved, so training would end at the first checkpoint: .*temperature"
    ):
        check_can_be_saved(policy.model, policy.tokenizer, CONTRACT)


def test_a_tokenizer_that_is_another_one_once_saved_is_found_before_training(base):
    class Forgetful(type(load(base).tokenizer)):
        def get_vocab(self):
            return super().get_vocab() | {"<never_saved>": 17}

    tokenizer = Forgetful.from_pretrained(base)
    with pytest.raises(ValueError, match="the tokenizer has other tokens once it is saved"):
        check_can_be_saved(load(base).model, tokenizer, CONTRACT)


def test_a_place_for_checkpoints_that_cannot_be_written_is_found_before_training(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    check_writable(None, run)
    check_writable(str(tmp_path / "elsewhere"), run)
    check_writable("memory://checkpoints", run)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoints cannot be written to .*file/run.*learner.checkpoint_dir"):
        check_writable(str(tmp_path / "file"), run)
