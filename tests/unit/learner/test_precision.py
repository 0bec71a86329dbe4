"""A model that computes in bfloat16 and is trained in float32: it learns, and everybody gets it rounded once."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, PreTrainedModel

from launch.settings.run import RunSettings
from learner.batches import build_micro_batches
from learner.checkpoints.checkpoint import TRAINED_FOLDER, WEIGHTS_FILE, load_weights, read_training_state
from learner.model.policy import load_policy
from learner.objectives.adversarial_js import Discriminator
from learner.publication import publication_tensors
from learner.settings.model import AdapterSettings, PretrainedModelSettings
from learner.settings.objectives import DiscriminatorSettings
from learner.state_tree.policy import TreePolicy, sequence_logprobs
from tests.checkpoints import progress_at, save_checkpoint
from tests.training import CLONING, assert_bit_identical, make_model, make_stage, make_stream, make_trainer, make_trees
from tests.training import train as train_steps

SMALL_STEPS = {"learning_rate": 2e-5, "warmup_steps": 0, "schedule": "constant"}
PROBE = tuple(range(4, 16))
STEPS = 6


@pytest.fixture(scope="module")
def pretrained(task, tmp_path_factory) -> dict[str, str]:
    """Folders of small models, by architecture."""
    folders = {}
    for kind in ("llama", "gpt2"):
        folder = tmp_path_factory.mktemp(kind)
        make_model(task, architecture=kind, initializer_range=0.1).save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


def load(folder: str, param_dtype: str = "float32", dtype: str = "bfloat16", adapter: bool = False) -> PreTrainedModel:
    adapters = AdapterSettings(rank=4) if adapter else None
    return load_policy(
        PretrainedModelSettings(name=folder, dtype=dtype, adapter=adapters), param_dtype=param_dtype
    ).model


def mean_loss(task, model: PreTrainedModel) -> float:
    """Of 64 demonstrations."""
    policy = TreePolicy(model, task.backspace_id)
    trees = build_micro_batches(make_stream(task, noise=0.0).sample(64), make_trees(task))
    with torch.no_grad():
        return -float(torch.cat([policy.evaluate(tree).log_prob for tree in trees]).mean())


def test_small_steps_in_bfloat16_lower_the_loss_as_in_float32(task, pretrained):
    drops = {}
    for dtype, param_dtype in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        model = load(pretrained["llama"], param_dtype, dtype)
        before = mean_loss(task, model)
        stage = make_stage(CLONING, steps=100, optimizer=SMALL_STEPS)
        train_steps(make_trainer(task, model, stage, make_stream(task, noise=0.0)), 100)
        drops[dtype, param_dtype] = before - mean_loss(task, model)
    assert drops["float32", "float32"] > 0.1
    assert drops["bfloat16", "float32"] >= 0.95 * drops["float32", "float32"]
    assert drops["bfloat16", "bfloat16"] < 0.5 * drops["float32", "float32"]  # else the line above proves nothing


def test_what_is_trained_is_float32_and_what_is_frozen_stays(task, pretrained):
    whole = load(pretrained["llama"])
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    adapted = load(pretrained["llama"], adapter=True)
    trained = {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in adapted.parameters() if not parameter.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})
    for model in (whole, adapted):
        assert '"dtype": "bfloat16"' in model.config.to_json_string(use_diff=False)  # what an engine's `auto` reads
        trainer = make_trainer(task, model, make_stage(CLONING, optimizer=SMALL_STEPS))
        train_steps(trainer, 1)
        moments = [values["exp_avg"] for values in trainer.state()["optimizer"]["state"].values()]
        assert {moment.dtype for moment in moments} == {torch.float32}
    assert {parameter.dtype for parameter in load(pretrained["llama"], "bfloat16", adapter=True).parameters()} == {
        torch.bfloat16
    }


def test_a_source_in_float32_is_not_rounded_on_loading(pretrained):
    source = AutoModelForCausalLM.from_pretrained(pretrained["llama"], dtype=torch.float32).state_dict()
    assert_bit_identical(load(pretrained["llama"]).state_dict(), source)
    rounded = load(pretrained["llama"], "bfloat16").state_dict()
    assert_bit_identical(rounded, {name: tensor.to(torch.bfloat16) for name, tensor in source.items()})


def test_products_are_of_bfloat16(task, pretrained):
    policy = TreePolicy(load(pretrained["llama"]), task.backspace_id)
    seen = []
    layer = policy.model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    (tree,) = build_micro_batches(make_stream(task).sample(4), make_trees(task))

    def measure(tree, logits):
        seen.extend([logits.hidden.dtype, logits.weight.dtype, logits.v_floor.dtype])
        return logits.v_floor

    policy.evaluate(tree, measure)
    assert seen == [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapters"])
def test_what_is_published_is_rounded_once(task, pretrained, adapter):
    """Also the probe is that of the weights that were rounded, not of those that are trained."""
    model = load(pretrained["llama"], adapter=adapter)
    train_steps(make_trainer(task, model, make_stage(CLONING)), 3)
    published = dict(publication_tensors(model))
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    head = "lm_head.weight" if adapter else "model.embed_tokens.weight"
    trained = model.get_output_embeddings().weight
    assert torch.equal(published[head], trained.to(torch.bfloat16))
    assert not torch.equal(published[head].float(), trained)
    if not adapter:
        reader = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32).eval()
        reader.load_state_dict(published, strict=False)
        probe = TreePolicy(model, task.backspace_id).sequence_logprobs(PROBE)
        assert np.array_equal(probe, sequence_logprobs(reader, PROBE))


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapters"])
def test_a_checkpoint_goes_on_exactly_and_is_read_rounded(task, pretrained, tmp_path, adapter):
    stage = make_stage(CLONING, steps=2 * STEPS, optimizer=SMALL_STEPS)
    straight = load(pretrained["llama"], adapter=adapter)
    stream = make_stream(task)
    trainer = make_trainer(task, straight, stage, stream)
    train_steps(trainer, STEPS)
    progress = progress_at(trainer.step, expert_stream=stream.state())
    folder = save_checkpoint(tmp_path, straight, task.tokenizer, progress, trainer.state())
    saved = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    published = {name: tensor.clone() for name, tensor in publication_tensors(straight)}
    train_steps(trainer, STEPS)

    second, stream = load(pretrained["llama"], adapter=adapter), make_stream(task)
    load_weights(second, folder)
    assert_bit_identical(second.state_dict(), saved)
    trainer = make_trainer(task, second, stage, stream)
    trainer.load_state(read_training_state(folder))
    stream.load_state(progress.expert_stream)
    train_steps(trainer, STEPS)
    assert_bit_identical(second.state_dict(), dict(straight.state_dict()))

    assert (folder / TRAINED_FOLDER / WEIGHTS_FILE).is_file() == (not adapter)
    reader = AutoModelForCausalLM.from_pretrained(folder)
    assert reader.dtype == torch.bfloat16
    found = reader.state_dict()
    assert_bit_identical({name: found[name] for name in published}, published)


def test_a_model_in_float32_has_no_second_copy_in_its_checkpoint(task, tmp_path):
    folder = save_checkpoint(tmp_path, make_model(task), task.tokenizer, progress_at(1), {})
    assert not (folder / TRAINED_FOLDER).exists()


def test_a_discriminator_with_a_body_of_its_own_is_trained_in_float32(task, pretrained):
    policy = TreePolicy(load(pretrained["llama"]), task.backspace_id)
    discriminator = Discriminator(DiscriminatorSettings(body="own"), policy)
    assert {parameter.dtype for parameter in discriminator.parameters()} == {torch.float32}
    seen = []
    layer = discriminator.body.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    (tree,) = build_micro_batches(make_stream(task).sample(4), make_trees(task))
    assert discriminator.log_ratio(tree, None).dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_pure_bfloat16_needs_a_model_that_computes_in_it():
    recipe = {
        "name": "x",
        "task": {"name": "arithmetic"},
        "stages": [{"name": "s", "objective": CLONING, "steps": 1}],
        "learner": {"param_dtype": "bfloat16"},
    }
    RunSettings.model_validate(recipe | {"model": {"source": "pretrained", "name": "m"}})
    for model in ({"source": "scratch"}, {"source": "pretrained", "name": "m", "dtype": "float32"}):
        with pytest.raises(ValidationError, match="leave param_dtype out, or set model"):
            RunSettings.model_validate(recipe | {"model": model})
