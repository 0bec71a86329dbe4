"""What a checkpoint holds: written from a copy of everything that training changes, and read back.

config.json, generation_config.json, model.safetensors  whole weights as they are published: adapters merged, 4-bit
                                                        layers restored, rounded to `model.dtype`
tokenizer files, README.md                              the rest of a model in Hugging Face's format, and its card
trained/model.safetensors                               the trained parameters in float32, where those above are
                                                        rounded: training goes on from them
adapter/adapter_config.json, adapter_model.safetensors  where adapters were trained: they and the trained output
                                                        embedding, for peft to read and training to resume from
training_state.pt, progress.json                        optimizer and random numbers; see `learner.checkpoints.store`

The position in the buffer is the step: a draw is named by stage and step, and the buffer's catalog gives the
steps after the checkpoint the rows that they were given before (see buffer.store.shard).
"""

from __future__ import annotations

import copy
import errno
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from buffer.disk import is_disk_full
from buffer.trajectory.schema import TokenContract
from learner.checkpoints.model_card import CardFacts, model_card
from learner.checkpoints.store import PROGRESS_FILE, Progress
from learner.model.adapters import adapter_config, adapter_tensors, is_adapted
from learner.precision import compute_dtype, published_dtype
from learner.publication import publication_tensors
from learner.ranks import OptimizerState, gathered, load_tensors

if TYPE_CHECKING:  # peft takes seconds to import, and most runs train without it
    from peft import LoraConfig

CONFIGURATION_FILES = ("config.json", "generation_config.json")
WEIGHTS_FILE = "model.safetensors"
TRAINED_FOLDER = "trained"
ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
TRAINING_STATE_FILE = "training_state.pt"


class TrainingState(TypedDict, total=False):
    """What the next step depends on besides weights and data: tensors, numbers and strings only, to be read without
    pickle."""

    step: int
    optimizer: OptimizerState
    learning_rate: float
    random_state: Tensor
    objective: dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """All of a checkpoint at one moment, in host memory of its own, so that training may go on while it is written.
    tensors: as they are published. trained: see `_unrounded`. adapter_config, adapter: where adapters are trained."""

    config: PretrainedConfig
    generation_config: GenerationConfig | None
    adapter_config: LoraConfig | None
    tokenizer: PreTrainedTokenizerBase
    progress: Progress
    training_state: TrainingState = field(default_factory=TrainingState)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder. OSError: the disk refused; if it is full, the error says how much room
        there was, and how much is needed."""
        free_bytes = shutil.disk_usage(folder).free
        try:
            self._write(folder)
        except Exception as error:
            if not is_disk_full(error):
                raise
            tensors = tree_leaves([self.tensors, self.trained, self.adapter, self.training_state])
            size_bytes = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))  # nearly all
            needed = f"it takes {size_bytes / 1e6:,.0f} MB, of which {free_bytes / 1e6:,.0f} MB were free"
            raise OSError(errno.ENOSPC, needed, str(folder.parent)) from error

    def _write(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        if self.generation_config is not None:  # keeps generators that do not know backspace from sampling it
            self.generation_config.save_pretrained(folder)
        _write_tensors(folder / WEIGHTS_FILE, self.tensors, like=folder / "config.json")
        if self.trained:
            (folder / TRAINED_FOLDER).mkdir()
            _write_tensors(folder / TRAINED_FOLDER / WEIGHTS_FILE, self.trained, like=folder / "config.json")
        if self.adapter_config is not None:
            (folder / ADAPTER_FOLDER).mkdir()
            self.adapter_config.save_pretrained(folder / ADAPTER_FOLDER)
            _write_tensors(folder / ADAPTER_FOLDER / ADAPTER_FILE, self.adapter, like=folder / "config.json")
        self.tokenizer.save_pretrained(folder)
        card = model_card(CardFacts(self.config.to_dict(), self.progress))
        (folder / "README.md").write_text(card, encoding="utf-8")
        with (folder / TRAINING_STATE_FILE).open("wb") as file:  # given a path, torch hides why it failed
            torch.save(self.training_state, file)
        (folder / PROGRESS_FILE).write_text(self.progress.to_json(), encoding="utf-8")


def _write_tensors(file: Path, tensors: dict[str, Tensor], like: Path) -> None:
    """like: a file with the permissions to give; the library leaves its own readable by nobody else."""
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copymode(like, file)


def take_snapshot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    training_state: TrainingState,
    keep: bool = True,
) -> Snapshot:
    """Copy everything that the next step changes. The ranks of a sharded model call this together. keep: whether this
    rank wants the copies, or only gives its parts."""

    def copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        whole = ((name, gathered(tensor)) for name, tensor in tensors)  # one at a time
        return {name: _host_copy(tensor) for name, tensor in whole if keep}

    return replace(
        _without_weights(model, tokenizer, progress),
        training_state=tree_map_only(Tensor, _host_copy, training_state) if keep else TrainingState(),
        tensors=copies(publication_tensors(model)),
        trained=copies(_unrounded(model).items()),
        adapter=copies(adapter_tensors(model).items()) if is_adapted(model) else {},
    )


def _without_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> Snapshot:
    config = copy.deepcopy(model.config)
    config.dtype = compute_dtype(model)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # the class of a sharded model has a longer name
    adapters = adapter_config(model) if is_adapted(model) else None
    return Snapshot(config, copy.deepcopy(model.generation_config), adapters, tokenizer, progress)


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def check_can_be_saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contract: TokenContract) -> None:
    """Save all of a checkpoint but the numbers in a scratch folder, and read the tokenizer back.

    Called before the first step: what transformers refuses to save would be found at the first checkpoint, which loses
    the training before it.

    Raises:
        ValueError: a file cannot be saved, or the saved tokenizer has other tokens.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            _without_weights(model, tokenizer, Progress("", 0, 0, -1, -1, {}, contract)).write(folder)
            again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"the model or its tokenizer cannot be saved, so training would end at the first checkpoint: {error}"
            ) from error
        if (again.get_vocab(), again.eos_token_id) != (tokenizer.get_vocab(), tokenizer.eos_token_id):
            raise ValueError(
                "the tokenizer has other tokens once it is saved and read back, so a checkpoint would not belong to "
                "its model: save it with transformers' save_pretrained, check it, and name that folder"
            )


def read_training_state(checkpoint: Path) -> TrainingState:
    """Optimizer and RNG state of one checkpoint."""
    state: TrainingState = torch.load(checkpoint / TRAINING_STATE_FILE, map_location="cpu", weights_only=True)
    return state


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
        if not (checkpoint / ADAPTER_FOLDER).is_dir():
            raise ValueError(
                f"checkpoint {checkpoint} has no adapters: it was trained in full; leave model.adapter out"
            )
        own, state = adapter_tensors(model), _read_tensors(checkpoint / ADAPTER_FOLDER)
    else:
        own = model.state_dict(keep_vars=True)
        state = _read_tensors(checkpoint) | _read_tensors(checkpoint / TRAINED_FOLDER)
    if misfits := _misfits(own, state):
        what = "model's adapters" if is_adapted(model) else "model"
        raise ValueError(f"checkpoint {checkpoint} does not fit the {what}: {'; '.join(misfits)}")
    if is_adapted(model):
        _check_base(model, checkpoint)
    load_tensors(own, state)  # a tied tensor is saved under one of its names


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
    if missing := [name for name in own if name not in state and own[name] not in stored]:
        found.append(f"missing {missing}")
    if unexpected := [name for name in state if name not in own]:
        found.append(f"unexpected {unexpected}")
    return found
