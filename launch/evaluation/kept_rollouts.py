"""Rollouts of an evaluation on disk, so that one that was interrupted goes on where it was.

A group of rollouts is one Arrow file, named by all that determines it (weights, prompts, decoding, seed, engine) and by
its content. Other settings have other names, and a file that does not hold what its name says is not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import xxhash

from buffer.full_disk import writing_to
from buffer.trajectory.schema import TokenContract
from launch.evaluation.arms import Arm
from launch.run_folder.folder import installed_versions

ROLLOUTS_FOLDER = "rollouts"

_FORMAT = 1  # part of every name: a change of what determines rollouts ends the use of older files
_READ_BYTES = 1 << 24


def weights_digest(checkpoint: Path) -> str:
    """32 hexadecimal digits over the weights and the configuration of a checkpoint."""
    digest = xxhash.xxh3_128()
    for file in [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]:
        digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while chunk := content.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def rollouts_key(weights: str, arm: Arm, contract: TokenContract, max_length: int, seed: int) -> str:
    """32 hexadecimal digits over all that determines the rollouts of an arm. weights: their digest."""
    described = {
        "format": _FORMAT,
        "weights": weights,
        "contract": asdict(contract),
        "prompts": [prompt.tolist() for prompt in arm.group.prompts],
        "planted": None if arm.group.planted is None else [list(ids) for ids in arm.group.planted],
        "sampling": asdict(arm.group.sampling),
        "contrastive": None if arm.contrastive is None else asdict(arm.contrastive),
        "max_length": max_length,
        "seed": seed,
        "versions": installed_versions(),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())


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
