"""The files of a trained model, in Hugging Face format: one way of writing and reading them.

config.json, generation_config.json, model.safetensors  whole weights as they are published: adapters merged, 4-bit
                                                        layers restored, rounded to `model.dtype`
trained/model.safetensors                               the trained parameters in float32, where those above are
                                                        rounded: training goes on from them
adapter/adapter_config.json, adapter_model.safetensors  where adapters were trained: they and the trained output
                                                        embedding, for peft to read and training to resume from
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from learner.model.adapters import adapter_config, adapter_tensors, is_adapted
from learner.precision import compute_dtype, published_dtype
from learner.publication.tensors import publication_tensors
from learner.ranks.sharding import gathered, load_tensors, part_like

if TYPE_CHECKING:  # peft takes seconds to import, and most runs train without it
    from peft import LoraConfig

CONFIGURATION_FILES = ("config.json", "generation_config.json")
WEIGHTS_FILE = "model.safetensors"
TRAINED_FOLDER = "trained"
ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class ModelSnapshot:
    """A model as it was at one moment, in host memory of its own, so that training may go on while it is written.

    tensors: as they are published. trained: see `_unrounded`. adapter_config, adapter: where adapters are trained.
    """

    config: PretrainedConfig
    generation_config: GenerationConfig | None
    adapter_config: LoraConfig | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write configuration and weights into an existing folder.

        generation_config.json keeps generators that do not know the backspace action from sampling it.
        """
        self.config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
        _write_tensors(folder / WEIGHTS_FILE, self.tensors, like=folder / "config.json")
        if self.trained:
            (folder / TRAINED_FOLDER).mkdir()
            _write_tensors(folder / TRAINED_FOLDER / WEIGHTS_FILE, self.trained, like=folder / "config.json")
        if self.adapter_config is not None:
            (folder / ADAPTER_FOLDER).mkdir()
            self.adapter_config.save_pretrained(folder / ADAPTER_FOLDER)
            _write_tensors(folder / ADAPTER_FOLDER / ADAPTER_FILE, self.adapter, like=folder / "config.json")


def _write_tensors(file: Path, tensors: dict[str, Tensor], like: Path) -> None:
    """like: a file with the permissions to give; the library leaves its own readable by nobody else."""
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copymode(like, file)


def snapshot_model(model: PreTrainedModel, keep: bool = True) -> ModelSnapshot:
    """Copy a model's whole weights as they are published, and what that rounds as training holds it.

    The ranks of a sharded model call this together. keep: whether this rank wants the copies, or only gives its parts.
    """

    def copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        whole = ((name, gathered(tensor)) for name, tensor in tensors)  # one at a time
        return {name: host_copy(tensor) for name, tensor in whole if keep}

    return replace(
        snapshot_without_weights(model),
        tensors=copies(publication_tensors(model)),
        trained=copies(_unrounded(model).items()),
        adapter=copies(adapter_tensors(model).items()) if is_adapted(model) else {},
    )


def snapshot_without_weights(model: PreTrainedModel) -> ModelSnapshot:
    """The configs alone."""
    config = copy.deepcopy(model.config)
    config.dtype = compute_dtype(model)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # the class of a sharded model has a longer name
    return ModelSnapshot(
        config, copy.deepcopy(model.generation_config), adapter_config(model) if is_adapted(model) else None
    )


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory that shares nothing with the tensor."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _unrounded(model: PreTrainedModel) -> dict[str, Tensor]:
    """The trained parameters that publication rounds; none in a model with adapters, which have files of their own."""
    if is_adapted(model):
        return {}
    parameters = model.named_parameters()
    return {name: tensor for name, tensor in parameters if published_dtype(model, tensor) != tensor.dtype}


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load a checkpoint's weights into `model`, in place, as training left them: all, or none if they do not fit.

    Into a model with adapters go the adapters and the trained output embedding; the rest is its frozen base, which has
    to be the one that the checkpoint was trained on.

    Raises:
        ValueError: the tensors of the checkpoint are not those of the model, or its adapters belong to another base.
    """
    if is_adapted(model):
        _load_adapters(model, checkpoint)
        return
    state = _read_tensors(checkpoint) | _read_tensors(checkpoint / TRAINED_FOLDER)
    if misfits := _misfits(model.state_dict(keep_vars=True), state):
        raise ValueError(f"checkpoint {checkpoint} does not fit the model: {'; '.join(misfits)}")
    load_tensors(model, state)  # a tied tensor is saved under one of its names


def _load_adapters(model: PreTrainedModel, checkpoint: Path) -> None:
    folder = checkpoint / ADAPTER_FOLDER
    if not folder.is_dir():
        raise ValueError(f"checkpoint {checkpoint} has no adapters: it was trained in full; leave model.adapter out")
    state = _read_tensors(folder)
    own = adapter_tensors(model)
    if misfits := _misfits(own, state):
        raise ValueError(f"checkpoint {checkpoint} does not fit the model's adapters: {'; '.join(misfits)}")
    _check_base(model, checkpoint)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(part_like(state[name], tensor))


def _check_base(model: PreTrainedModel, checkpoint: Path) -> None:
    """Adapters on another base are another model. What was neither adapted nor trained (norms, input embedding) lies in
    the checkpoint as it was, bit for bit.
    """
    frozen = {name: tensor for name, tensor in model.named_parameters() if not tensor.requires_grad}
    with safe_open(checkpoint / WEIGHTS_FILE, framework="pt") as saved:
        for name in saved.keys():  # noqa: SIM118 (no mapping: it has keys() and cannot be iterated)
            base = frozen.get(name)
            if base is None or not base.is_floating_point():  # under another name, or in 4 bits
                continue
            if not torch.equal(saved.get_tensor(name), gathered(base).cpu()):
                raise ValueError(
                    f"checkpoint {checkpoint} was trained on another base model: {name} differs; name the same model "
                    "and revision as then"
                )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _misfits(own: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """What keeps `state` from being loaded into a model whose tensors are `own`, in words."""
    common = sorted(own.keys() & state.keys())
    found = [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in common
        if state[name].shape != own[name].shape
    ]
    stored: dict[Tensor, str] = {}  # by identity: tied tensors are one object
    for name in common:
        other = stored.setdefault(own[name], name)
        if other != name and not torch.equal(state[name], state[other]):
            found.append(f"{other} and {name} differ, but the model ties them")
    missing = [name for name in own if name not in state and own[name] not in stored]
    unexpected = [name for name in state if name not in own]
    if missing:
        found.append(f"missing {missing}")
    if unexpected:
        found.append(f"unexpected {unexpected}")
    return found
