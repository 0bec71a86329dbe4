"""The rollouts of an evaluation: what an interrupted one has kept, the rest from the engine or the search.

A kept group of rollouts is one Arrow file, named by all that determines it (weights, prompts, decoding, seed, engine)
and by its content. Other settings have other names, and a file that does not hold what its name says is not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import xxhash
from rich.console import Console

from actors.generator import Generator
from buffer.disk import writing_to
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


class KeptRollouts:
    """The folder of kept rollouts of an evaluation. on_damaged: called with each damaged file, which is removed."""

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
    checkpoints: Mapping[str, Checkpoint],
    groups: Sequence[RolloutGroup],
    task: str,
    max_length: int,
    seed: int,
    kept: KeptRollouts | None,
    console: Console,
) -> dict[str, dict[str, pa.RecordBatch]]:
    """The rollouts of every checkpoint, by its label and their group.

    Each group starts with the noise of the seed, whatever was made before it. max_length: longest text with its prompt,
    in tokens. Raises UserError where the checkpoints are of different models.
    """
    found: dict[str, dict[str, pa.RecordBatch]] = {label: {} for label in checkpoints}
    keys: dict[tuple[str, str], str] = {}
    missing: list[tuple[str, RolloutGroup]] = []
    for label, checkpoint in checkpoints.items():
        weights = "" if kept is None else weights_digest(checkpoint.folder)
        for group in groups:
            key = keys[label, group.name] = rollouts_key(weights, group, checkpoint.contract, max_length, seed)
            batch = None if kept is None else kept.find(key)
            if batch is None:
                missing.append((label, group))
            else:
                found[label][group.name] = batch

    def take(label: str, group: RolloutGroup, make: Callable[[Callable[[int], None]], pa.RecordBatch]) -> None:
        with progress_bar(console, f"evaluating {label}, {group.name}", len(group.group.prompts)) as advance:
            batch = found[label][group.name] = make(advance)
        if kept is not None:
            kept.keep(keys[label, group.name], batch)

    sampled = [each for each in missing if each[1].contrastive is None]
    if sampled:
        with running_generator(next(iter(checkpoints.values())), max_length, seed) as generator:
            for label, group in sampled:
                try:
                    generator.load(checkpoints[label].folder)  # starts the noise anew, too
                except ValueError as error:
                    raise UserError(f"checkpoints of different models cannot be compared in one go: {error}") from None
                take(label, group, partial(_generated, generator, group, task))
    for label, group in missing:
        if group.contrastive is not None:
            from launch.evaluation.contrastive import contrastive_rollouts

            model, contract = load_for_evaluation(checkpoints[label]), checkpoints[label].contract
            take(label, group, partial(contrastive_rollouts, model, group, contract, max_length, task))
    return found


def _generated(
    generator: Generator, group: RolloutGroup, task: str, on_finished: Callable[[int], None]
) -> pa.RecordBatch:
    return generator.generate({group.name: group.group}, task, on_finished)[group.name]


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
