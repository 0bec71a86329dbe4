"""The rollouts of an evaluation: what an interrupted one has kept, the rest from the engine or the search.

A kept group of rollouts is one Arrow file, named by all that determines it (weights, prompts, decoding, seed, engine)
and by its content. Other settings have other names, and a file that does not hold what its name says is not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import xxhash
from rich.console import Console

from buffer.full_disk import writing_to
from buffer.trajectory.schema import TokenContract
from launch.errors import UserError
from launch.evaluation.rollout_groups import RolloutGroup
from launch.generation import Checkpoint, library_chatter_held, progress_bar, running_generator
from launch.run_folder.folder import installed_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROLLOUTS_FOLDER = "rollouts"

_FORMAT = 1  # part of every name: a change of what determines rollouts ends the use of older files
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class RolloutPlan:
    """What is generated of every checkpoint. max_length: longest text with its prompt, in tokens."""

    groups: Sequence[RolloutGroup]
    task: str
    max_length: int
    seed: int
    kept: KeptRollouts | None


class KeptRollouts:
    """The folder of kept rollouts of an evaluation; it is made when there is something to keep.

    on_damaged: told of each file that does not hold what its name says; it is removed.
    """

    def __init__(self, folder: Path, on_damaged: Callable[[Path], None]) -> None:
        self._folder = folder / ROLLOUTS_FOLDER
        self._on_damaged = on_damaged

    def find(self, key: str) -> pa.RecordBatch | None:
        """The rollouts of a key, if they are there and whole."""
        for path in sorted(self._folder.glob(f"{key}-*.arrow")):
            content = path.read_bytes()
            if path.stem == f"{key}-{xxhash.xxh3_64_hexdigest(content)}":
                return pa.ipc.open_file(pa.BufferReader(content)).get_batch(0)
            path.unlink()
            self._on_damaged(path)
        return None

    def keep(self, key: str, batch: pa.RecordBatch) -> None:
        """Write the rollouts of a key. A process that dies here leaves no half of a file under its name."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        content = sink.getvalue()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{key}-{xxhash.xxh3_64_hexdigest(content)}.arrow"
        temporary = path.with_suffix(".tmp")
        with writing_to(temporary):
            temporary.write_bytes(content)
        temporary.rename(path)


def make_rollouts(
    checkpoints: Mapping[str, Checkpoint], plan: RolloutPlan, console: Console
) -> dict[str, dict[str, pa.RecordBatch]]:
    """The rollouts of every checkpoint, by its label and their group.

    Each group starts with the noise of the seed, whatever was made before it.

    Raises:
        UserError: the checkpoints are of different models.
    """
    jobs = {label: _Job(checkpoint, plan) for label, checkpoint in checkpoints.items()}
    if any(job.missing(searched=False) for job in jobs.values()):
        first = next(iter(checkpoints.values()))
        with running_generator(first, plan.max_length, plan.seed) as generator:
            for label, job in jobs.items():
                groups = job.missing(searched=False)
                with progress_bar(console, f"evaluating {label}", _num_prompts(groups)) as advance:
                    for group in groups:
                        try:
                            generator.load(job.checkpoint.folder)  # starts the noise anew, too
                        except ValueError as error:
                            raise UserError(
                                f"checkpoints of different models cannot be compared in one go: {error}"
                            ) from None
                        job.take(group, generator.generate({group.name: group.group}, plan.task, advance)[group.name])
    for label, job in jobs.items():
        if groups := job.missing(searched=True):
            from launch.evaluation.contrastive import contrastive_rollouts

            model = load_for_evaluation(job.checkpoint)
            with progress_bar(console, f"evaluating {label}", _num_prompts(groups)) as advance:
                for group in groups:
                    contract = job.checkpoint.contract
                    job.take(group, contrastive_rollouts(model, group, contract, plan.max_length, plan.task, advance))
    return {label: job.rollouts for label, job in jobs.items()}


def load_for_evaluation(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint in float32, as the learner loads it, on the GPU if there is one."""
    import torch

    from learner.model.policy import load_model
    from learner.settings.model import PretrainedModelSettings

    settings = PretrainedModelSettings(name=str(checkpoint.folder), dtype="float32")
    with library_chatter_held():
        model = load_model(settings, checkpoint.tokenizer)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def weights_digest(checkpoint: Path) -> str:
    """32 hexadecimal digits over the weights and the configuration of a checkpoint."""
    digest = xxhash.xxh3_128()
    for file in [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]:
        digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while chunk := content.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def rollouts_key(weights: str, group: RolloutGroup, contract: TokenContract, max_length: int, seed: int) -> str:
    """32 hexadecimal digits over all that determines the rollouts of a group. weights: their digest."""
    prompts = group.group
    described = {
        "format": _FORMAT,
        "weights": weights,
        "contract": asdict(contract),
        "prompts": [prompt.tolist() for prompt in prompts.prompts],
        "planted": None if prompts.planted is None else [list(ids) for ids in prompts.planted],
        "sampling": asdict(prompts.sampling),
        "contrastive": None if group.contrastive is None else asdict(group.contrastive),
        "max_length": max_length,
        "seed": seed,
        "versions": installed_versions(),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())


class _Job:
    """A checkpoint, what there is of its rollouts, and where to keep the others."""

    def __init__(self, checkpoint: Checkpoint, plan: RolloutPlan) -> None:
        self.checkpoint = checkpoint
        self.rollouts: dict[str, pa.RecordBatch] = {}
        self._plan = plan
        self._keys: dict[str, str] = {}
        if plan.kept is not None:
            weights = weights_digest(checkpoint.folder)
            for group in plan.groups:
                key = rollouts_key(weights, group, checkpoint.contract, plan.max_length, plan.seed)
                self._keys[group.name] = key
                if (batch := plan.kept.find(key)) is not None:
                    self.rollouts[group.name] = batch

    def missing(self, *, searched: bool) -> list[RolloutGroup]:
        """Groups without rollouts: those of the search, or those of the engine."""
        groups = [group for group in self._plan.groups if group.name not in self.rollouts]
        return [group for group in groups if (group.contrastive is not None) == searched]

    def take(self, group: RolloutGroup, batch: pa.RecordBatch) -> None:
        """The rollouts of a group are there."""
        self.rollouts[group.name] = batch
        if self._plan.kept is not None:
            self._plan.kept.keep(self._keys[group.name], batch)


def _num_prompts(groups: Sequence[RolloutGroup]) -> int:
    return sum(len(group.group.prompts) for group in groups)
