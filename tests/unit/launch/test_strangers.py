"""Recipes and models from strangers run no code here."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from actors.engine.weights import ExpectedTensors
from launch.errors import UserError
from launch.generation import open_checkpoint
from launch.settings.recipe import read_recipe
from learner.checkpoints.checkpoint import TRAINING_STATE_FILE, read_training_state
from learner.model.policy import load_policy
from learner.objectives import make_objective
from learner.ranks import open_rendezvous
from learner.settings.model import PretrainedModelSettings
from learner.settings.objectives import EmoSettings
from tests.tiny_models import BACKSPACE_ID, save_tiny_model, tiny_model
from tests.unit.learner.test_model import word_tokenizer

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self._mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that is there once code of a stranger has run."""
    return tmp_path / "it-ran"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model in safetensors, with its tokenizer and a backspace action."""
    model: PreTrainedModel = tiny_model()
    model.config.backspace_token_id = BACKSPACE_ID
    folder = save_tiny_model(tmp_path / "model", model)
    word_tokenizer("<backspace>").save_pretrained(folder)
    return folder


def test_yaml_tags_of_a_recipe_build_no_objects(tmp_path: Path, mark: Path) -> None:
    tag = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.PosixPath ['{mark}']]"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{RECIPE.read_text()}\nrunner: {tag}\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_recipe(recipe)
    with pytest.raises(UserError, match="not a YAML value"):
        read_recipe(RECIPE, [f"name={tag}"])
    assert not mark.exists()


def test_weights_in_a_pickle_are_refused_by_name(model_folder: Path, mark: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match=r"pickle \(pytorch_model\.bin\).*safetensors"):
        read_as_learner(model_folder)
    with pytest.raises(ValueError, match=r"cost_model '.*' cannot be loaded: .*safetensors"):
        read_as_cost_model(model_folder)
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_not_read(model_folder: Path, mark: Path) -> None:
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    read_as_learner(model_folder)
    assert not mark.exists()


def test_the_training_state_of_a_checkpoint_builds_no_objects(tmp_path: Path, mark: Path) -> None:
    torch.save({"optimizer": Bomb(mark)}, tmp_path / TRAINING_STATE_FILE)
    with pytest.raises(pickle.UnpicklingError):
        read_training_state(tmp_path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb works"


def read_as_learner(folder: Path) -> None:
    load_policy(PretrainedModelSettings(name=str(folder)))


def read_as_actor(folder: Path) -> None:
    ExpectedTensors(str(folder))


def read_as_cost_model(folder: Path) -> None:
    make_objective(EmoSettings(name="emo", cost_model=str(folder)))


@pytest.mark.parametrize("read", [read_as_learner, read_as_actor, read_as_cost_model, open_checkpoint])
def test_code_in_a_models_folder_is_not_run(model_folder: Path, mark: Path, read: Callable[[Path], object]) -> None:
    (model_folder / "theirs.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig as TheirConfig, LlamaForCausalLM as TheirModel\n"
    )
    config = json.loads((model_folder / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"},
    }
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        read(model_folder)
    assert not mark.exists()


def test_the_ranks_of_a_learner_meet_on_the_given_interface_only() -> None:
    store = open_rendezvous("127.0.0.1", size=2, timeout_s=5.0)
    listening = [connection.laddr for connection in psutil.Process().net_connections() if connection.status == "LISTEN"]
    assert [address.ip for address in listening if address.port == store.port] == ["127.0.0.1"]
