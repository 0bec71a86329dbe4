"""Generation outside of training: an engine that answers prompts with the weights of a checkpoint.

A plain class: `sequencematch generate` and `evaluate` use it in their own process, a run uses it as a Ray actor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from safetensors import safe_open

from actors.action_log import FinishedLog, Int32, logs_to_batch
from actors.engine import BackspaceEngine
from actors.engine_settings import EngineSettings, SamplingSettings
from buffer.schema import TokenContract


class Generator:
    """Groups of requests, answered together: the engine stays full across groups.

    Raises (on creation):
        ValueError: the checkpoint says nothing of a backspace action.
    """

    def __init__(self, settings: EngineSettings, contract: TokenContract) -> None:
        self._contract = contract
        self._engine = BackspaceEngine(settings, contract.backspace_id, contract.eos_id)
        self._sampling: dict[str, SamplingSettings] = {}
        self._sizes: dict[str, int] = {}
        self._logs: dict[str, dict[int, FinishedLog]] = {}

    def load(self, checkpoint: str) -> None:
        """Replace the weights, in place, by those of a checkpoint of the same model."""
        assert not self._engine.num_unfinished, "weights change between groups, not within one"
        version = self._engine.version + 1
        tensors = []
        for file in sorted(Path(checkpoint).glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                tensors += [(name, stored.get_tensor(name)) for name in stored.keys()]  # noqa: SIM118
        self._engine.load_weights(tensors, version)

    def submit(
        self,
        group: str,
        prompts: Sequence[Int32],
        sampling: SamplingSettings,
        planted: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Queue a group of prompts. planted: per prompt, tokens forced as the first actions."""
        assert group not in self._sizes, f"group {group} was submitted before"
        self._sampling[group] = sampling
        self._sizes[group] = len(prompts)
        self._logs[group] = {}
        for index, prompt in enumerate(prompts):
            forced = () if planted is None else planted[index]
            self._engine.add(f"{group}/{index}", prompt, sampling, forced)

    def pump(self, seconds: float) -> int:
        """Generate for about `seconds`; gives the number of requests still open."""
        deadline = time.monotonic() + seconds
        while self._engine.num_unfinished and time.monotonic() < deadline:
            for log in self._engine.step():
                group, _, index = log.request_id.rpartition("/")
                self._logs[group][int(index)] = log
        return self._engine.num_unfinished

    def take(self, group: str, task: str) -> pa.RecordBatch:
        """The finished logs of a group, in the order of its prompts, as trajectories."""
        logs = self._logs.pop(group)
        size = self._sizes.pop(group)
        assert len(logs) == size, f"group {group}: {len(logs)} of {size} requests are finished"
        return logs_to_batch(
            [logs[index] for index in range(size)],
            self._contract,
            task=task,
            actor="generator",
            sampling=self._sampling.pop(group),
            weights_fingerprint=None,
        )


def checkpoint_backspace_id(checkpoint: Path) -> int:
    """Id of the backspace action of a checkpoint.

    Raises:
        ValueError: the folder is no model, or one without a backspace action.
    """
    config = checkpoint / "config.json"
    if not config.is_file():
        raise ValueError(f"{checkpoint} is not a model folder: it has no config.json")
    backspace_id = json.loads(config.read_text(encoding="utf-8")).get("backspace_token_id")
    if backspace_id is None:
        raise ValueError(
            f"{checkpoint} has no backspace action (backspace_token_id in its config.json): "
            "train it with `sequencematch train`"
        )
    return int(backspace_id)
