"""The rollouts that an evaluation makes of checkpoints; docs/evaluation.md lists their groups.

In greedy decoding a token that was taken back is not offered again at its text, else a greedy policy that rejects its
own choice would go round in circles.

A kept group of rollouts is one Arrow file, named by all that determines it (weights, prompts, decoding, seed, engine)
and by its content. Other settings have other names, and a file that does not hold what its name says is not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash
from rich.console import Console

from actors.engine.interface import SamplingSettings
from actors.generator import Generator, PromptGroup
from actors.settings import RolloutSettings
from buffer.disk import writing_to
from buffer.experts.noise import Float64, NoiseCandidates
from buffer.experts.ragged import Int32, Int64, Ragged
from buffer.trajectory.schema import TokenContract
from launch.errors import UserError
from launch.generation import Checkpoint, progress_bar, running_generator
from launch.run_folder.folder import installed_versions
from launch.settings.evaluation import (
    GREEDY,
    RECOVERY,
    SAMPLED,
    ContrastiveSearch,
    Decoding,
    EvaluationSettings,
    check_forced_prefix,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from buffer.experts.tasks import Task

ROLLOUTS_FOLDER = "rollouts"

_FORMAT = 1  # part of every name: a change of what determines rollouts ends the use of older files
_READ_BYTES = 1 << 24


@dataclass(frozen=True, eq=False, kw_only=True)
class RolloutGroup(PromptGroup):
    """One way to decode every example. contrastive: searched for in the learner's model, not sampled by the engine."""

    name: str
    contrastive: ContrastiveSearch | None = None

    @property
    def num_forced(self) -> int:
        """How many tokens each answer begins with that were forced; the first is wrong."""
        return len(self.forced_prefixes[0]) if self.forced_prefixes else 0


def recovery_obstacle(task: Task, contract: TokenContract, examples: Dataset, rollout: RolloutSettings) -> str | None:
    """Why these examples cannot be made to begin with a wrong token; None where they can."""
    if rollout.max_new_tokens == 1:
        return "actors.rollout.max_new_tokens=1 leaves no room for an answer behind a forced token"
    choices = _choices(examples, task.task_noise, contract, wrong=True)
    lacking = sum(len(rows) for rows, ids, _ in choices if len(ids) == 0)
    return f"{lacking} of {len(examples)} examples have no plausible wrong token to begin with" if lacking else None


def plan_groups(
    task: Task,
    contract: TokenContract,
    examples: Dataset,
    rollout: RolloutSettings,
    evaluation: EvaluationSettings,
    seed: int,
) -> list[RolloutGroup]:
    """The usual groups, and those that the settings ask for. Raises ValueError as `check_forced_prefix` does."""
    has_answers = task.is_correct is not None
    check_forced_prefix(evaluation.decodings, rollout.max_new_tokens)
    prompts = [np.asarray(ids, dtype=np.int32) for ids in examples["prompt_ids"]]
    usual = [Decoding(SAMPLED)] + ([Decoding(GREEDY, temperature=0.0)] if has_answers else [])
    usual += [decoding for decoding in evaluation.decodings if decoding.name not in {each.name for each in usual}]
    can_recover = recovery_obstacle(task, contract, examples, rollout) is None
    groups = []
    for decoding in [*usual, Decoding(RECOVERY, temperature=0.0, num_forced=1)]:
        forced = None
        if decoding.num_forced:
            if not can_recover:
                continue
            rng = np.random.default_rng(seed)
            forced = wrong_tokens(examples, task.task_noise, contract, decoding.num_forced, rng).tolist()
        temperature = 1.0 if decoding.num_forced and not has_answers else decoding.temperature
        backspace = rollout.backspace and decoding.contrastive is None
        sampling = SamplingSettings(
            max_new_tokens=rollout.max_new_tokens,
            max_actions=rollout.max_actions,
            temperature=temperature,
            top_p=decoding.top_p,
            backspace=backspace,
            ban_deleted=backspace and temperature == 0.0,
        )
        groups.append(RolloutGroup(prompts, sampling, forced, name=decoding.name, contrastive=decoding.contrastive))
    if evaluation.ban_deleted == "both":
        for each in [each for each in groups if each.sampling.backspace]:
            is_banned = each.sampling.ban_deleted
            sampling = each.sampling.model_copy(update={"ban_deleted": not is_banned})
            groups.append(replace(each, name=each.name + (", allowed" if is_banned else ", banned"), sampling=sampling))
    return groups


def wrong_tokens(
    examples: Dataset, candidates: NoiseCandidates, contract: TokenContract, count: int, rng: np.random.Generator
) -> Int32:
    """[R, count] plausible tokens for each example; the first differs from the reference's, so that all are mistakes.

    Raises ValueError where an example has no candidate (see `recovery_obstacle`).
    """
    tokens = np.empty((len(examples), count), dtype=np.int32)
    for column in range(count):
        for rows, ids, chances in _choices(examples, candidates, contract, wrong=column == 0):
            if len(ids) == 0:
                raise ValueError(f"example {rows[0]} has no candidate for a wrong token")
            tokens[rows, column] = rng.choice(ids, len(rows), p=chances)
    return tokens


def references(examples: Dataset) -> Ragged:
    """The tokens of the right answers, or of the held-out continuations."""
    return Ragged.from_arrow(examples.select_columns(["target_ids"]).with_format("arrow")[:].column("target_ids"))


def first_targets(examples: Dataset) -> Int32:
    """[R] the first token of each reference."""
    right = references(examples)
    return right.values[right.offsets[:-1]]


def _choices(
    examples: Dataset, candidates: NoiseCandidates, contract: TokenContract, *, wrong: bool
) -> Iterator[tuple[Int64, Int32, Float64]]:
    """Rows of examples with the same plausible tokens; those tokens, and the chances of each.

    wrong: without the first token of the reference.
    """
    special = [*contract.eos_ids, contract.backspace_id]
    refused = first_targets(examples) if wrong else np.full(len(examples), special[0], dtype=np.int32)
    keys = np.stack([np.asarray(examples["noise_group"], dtype=np.int64), refused])
    pairs, key_of_row = np.unique(keys, axis=1, return_inverse=True)
    for index, (group, token) in enumerate(pairs.T.tolist()):
        ids, chances = candidates.others(group, [*special, token])
        yield np.flatnonzero(key_of_row == index), ids, chances


class KeptRollouts:
    """The kept rollouts of an evaluation; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, console: Console) -> None:
        self._folder = None if folder is None else folder / ROLLOUTS_FOLDER
        self._console = console

    def find(self, key: str) -> pa.RecordBatch | None:
        """The rollouts of a key, if they are there and whole. A damaged file is removed."""
        for path in sorted(self._folder.glob(f"{key}-*.arrow")) if self._folder else ():
            content = path.read_bytes()
            if path.stem == f"{key}-{xxhash.xxh3_64_hexdigest(content)}":
                return pa.ipc.open_file(pa.BufferReader(content)).get_batch(0)
            path.unlink()
            said = f"rollouts kept in {path} are damaged: they are made anew"
            self._console.print(said, highlight=False, soft_wrap=True)
        return None

    def keep(self, key: str, batch: pa.RecordBatch) -> None:
        """Write the rollouts of a key. A process that dies here leaves no half of a file under its name."""
        if self._folder is None:
            return
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
    kept: KeptRollouts,
    console: Console,
) -> dict[str, dict[str, pa.RecordBatch]]:
    """The rollouts of every checkpoint, by its label and their group.

    Each group starts with the noise of the seed, whatever was made before it. max_length: longest text with its prompt,
    in tokens. Raises UserError where the checkpoints are of different models.
    """
    found: dict[str, dict[str, pa.RecordBatch]] = {label: {} for label in checkpoints}
    keys: dict[tuple[str, str], str] = {}
    for label, checkpoint in checkpoints.items():
        weights = weights_digest(checkpoint.folder)
        for group in groups:
            key = keys[label, group.name] = rollouts_key(weights, group, checkpoint.contract, max_length, seed)
            if (batch := kept.find(key)) is not None:
                found[label][group.name] = batch
    missing = [(label, group) for label in checkpoints for group in groups if group.name not in found[label]]

    def add(label: str, group: RolloutGroup, make: Callable[[Callable[[int], None]], pa.RecordBatch]) -> None:
        with progress_bar(console, f"evaluating {label}, {group.name}", len(group.prompts)) as advance:
            batch = found[label][group.name] = make(advance)
        kept.keep(keys[label, group.name], batch)

    sampled = [each for each in missing if each[1].contrastive is None]
    if sampled:
        with running_generator(next(iter(checkpoints.values())), max_length, seed) as generator:
            for label, group in sampled:
                try:
                    generator.load(checkpoints[label].folder)  # starts the noise anew, too
                except ValueError as error:
                    raise UserError(f"checkpoints of different models cannot be compared in one go: {error}") from None
                add(label, group, partial(_generated, generator, group, task))
    for label, group in missing:
        if group.contrastive is not None:
            from launch.evaluation.learner_model import contrastive_rollouts, load_for_evaluation

            checkpoint = checkpoints[label]
            model = load_for_evaluation(checkpoint)
            add(label, group, partial(contrastive_rollouts, model, group, checkpoint.contract, max_length, task))
    return found


def _generated(
    generator: Generator, group: RolloutGroup, task: str, on_finished: Callable[[int], None]
) -> pa.RecordBatch:
    return generator.generate({group.name: group}, task, on_finished)[group.name]


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
    described = {
        "format": _FORMAT,
        "weights": weights,
        "contract": asdict(contract),
        "prompts": [prompt.tolist() for prompt in group.prompts],
        "forced_prefixes": None if group.forced_prefixes is None else [list(ids) for ids in group.forced_prefixes],
        "sampling": group.sampling.model_dump(),
        "contrastive": None if group.contrastive is None else asdict(group.contrastive),
        "max_length": max_length,
        "seed": seed,
        "versions": installed_versions(),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())
