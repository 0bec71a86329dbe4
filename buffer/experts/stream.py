"""Seeded, endless, resumable streams over the examples of a task: expert trajectories, and prompts for
rollouts.

A stream is a function of its seed alone: the order of every epoch and the noise of every position do not
depend on how many rows are drawn at a time. So its state is a handful of counters, and a stream that is
loaded with them goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.experts.noise import NoiseCandidates, choose_noise_positions, insert_noise, prefixes_at
from buffer.experts.ragged import Int32, Int64, Ragged
from buffer.experts.tasks import Task
from buffer.schema import TokenContract, trajectory_schema
from buffer.settings import NoiseSettings

if TYPE_CHECKING:
    from datasets import Dataset


class EpochOrder:
    """Row indexes of one epoch after the other, each epoch in an order of its own."""

    def __init__(self, num_examples: int, seed: tuple[int, ...]) -> None:
        if num_examples < 1:
            raise ValueError("a stream needs at least one example")
        self._num_examples = num_examples
        self._seed = seed
        self._start_epoch(epoch=0, position=0)

    @property
    def epoch(self) -> int:
        """Epoch of the next row."""
        return self._epoch

    def draw(self, count: int) -> Int64:
        """The next `count` row indexes; may run over the end of an epoch."""
        parts = []
        while count > 0:
            if self._position == self._num_examples:
                self._start_epoch(self._epoch + 1, position=0)
            part = self._order[self._position : self._position + count]
            self._position += len(part)
            count -= len(part)
            parts.append(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def state(self) -> dict[str, int]:
        """Counters for `load_state`."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go to where `state` was taken.

        Raises:
            ValueError: the state is not of a stream over as many examples.
        """
        epoch, position = _counters(state, ("epoch", "position"))
        if position > self._num_examples:
            raise ValueError(
                f"the stream's state is at row {position} of an epoch, but the task has "
                f"{self._num_examples} examples; resume with the task settings of the run"
            )
        self._start_epoch(epoch, position)

    def _start_epoch(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = np.random.default_rng([*self._seed, epoch]).permutation(self._num_examples)


class CountedUniforms:
    """A seeded generator of doubles that knows how many it has given, so that it can be put back there."""

    def __init__(self, seed: tuple[int, ...]) -> None:
        self._seed = seed
        self.load_count(0)

    def load_count(self, count: int) -> None:
        """Go to after the first `count` doubles."""
        self.rng = np.random.Generator(np.random.PCG64(self._seed).advance(count))
        self.count = count


@dataclass(frozen=True)
class NoisePlan:
    """Rows whose noise positions are chosen and whose noise tokens are still to be drawn.

    serial: number of the first row in its stream. prompts, targets: R rows. groups: [R] noise group of each
    row. positions: [K] flat indexes into the targets.
    """

    serial: int
    prompts: Ragged
    targets: Ragged
    groups: Int64
    positions: Int64

    @property
    def position_groups(self) -> Int64:
        """[K] noise group of each position."""
        return self.groups[np.searchsorted(self.targets.offsets, self.positions, side="right") - 1]

    def prefixes(self) -> Ragged:
        """K rows: the text (prompt and answer so far) that each noise token continues."""
        return prefixes_at(self.prompts, self.targets, self.positions)


class ExpertStream:
    """Expert trajectories of a task's training examples, with fresh noise every epoch.

    With noise of kind `policy` the tokens come from the current policy: take a `plan`, have the engine
    continue each of its `prefixes` by one token (`<eos>` and backspace masked), and hand the tokens to
    `realise`. The other kinds do the same inside `draw`.

    Args:
        task: where the examples come from.
        noise: kind and rate.
        contract: of the run's trajectories; must agree with the task's backspace, `<eos>` and tokenizer.
        seed: of order and noise.
        actor: who draws; with the task and the seed it makes the trajectory ids, so that each run of an actor
            process needs its own.

    Raises:
        ValueError: the contract is of other tokens than the task's.
    """

    def __init__(
        self, task: Task, noise: NoiseSettings, contract: TokenContract, seed: int, actor: str = "expert"
    ) -> None:
        if contract != task.contract(contract.vocab_size):
            raise ValueError(
                f"the trajectories' contract {contract} is not that of the task's tokenizer: "
                f"{task.contract(contract.vocab_size)}"
            )
        self._task = task
        self._noise = noise
        self._rate = 0.0 if noise.kind == "none" else noise.rate
        self._schema = trajectory_schema(contract)
        self._id_prefix = f"{actor}/{task.name}/{seed}/"
        self._actor = actor
        self._order = EpochOrder(len(task.train), (seed, 0))
        self._choices = CountedUniforms((seed, 1))
        self._tokens = CountedUniforms((seed, 2))
        self._serial = 0
        self._examples = task.train.select_columns(["prompt_ids", "target_ids", "noise_group"]).with_format(
            "arrow"
        )

    @property
    def epoch(self) -> int:
        """Epoch of the next row."""
        return self._order.epoch

    def plan(self, count: int) -> NoisePlan:
        """The next `count` examples with the positions that get a noise token."""
        rows = self._examples[self._order.draw(count)]
        targets = Ragged.from_arrow(rows.column("target_ids"))
        plan = NoisePlan(
            serial=self._serial,
            prompts=Ragged.from_arrow(rows.column("prompt_ids")),
            targets=targets,
            groups=rows.column("noise_group").to_numpy().astype(np.int64),
            positions=choose_noise_positions(len(targets.values), self._rate, self._choices.rng),
        )
        self._choices.count += len(targets.values)
        self._serial += count
        return plan

    def realise(self, plan: NoisePlan, tokens: Int32) -> pa.RecordBatch:
        """Expert trajectories of a plan with its noise tokens [K]; void ones are left out (see
        buffer.experts.noise).
        """
        logs = insert_noise(plan.targets, plan.positions, tokens, self._task.backspace_id, self._task.eos_id)
        count = plan.targets.num_rows
        serials = pa.array(np.arange(plan.serial, plan.serial + count)).cast(pa.string())
        ends_in_eos = plan.targets.last_values == self._task.eos_id
        columns = {
            "id": pc.binary_join_element_wise(self._id_prefix, serials, ""),
            "source": pa.repeat("expert", count),
            "task": pa.repeat(self._task.name, count),
            "prompt_ids": plan.prompts.to_arrow(),
            "actions": logs.actions.to_arrow(),
            "realised": logs.realised_column(),
            "finish_reason": pc.if_else(pa.array(ends_in_eos), "eos", "max_length"),
            "actor": pa.repeat(self._actor, count),
            "created_at": pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", tz="UTC")), count),
        }
        absent = {
            field.name: pa.nulls(count, field.type) for field in self._schema if field.name not in columns
        }
        return pa.RecordBatch.from_pydict({**columns, **absent}, schema=self._schema)

    def draw(self, count: int) -> pa.RecordBatch:
        """The next `count` expert trajectories.

        Raises:
            ValueError: the noise is the policy's, which only an actor can draw.
        """
        if self._noise.kind == "policy":
            raise ValueError("noise.kind=policy: the actors draw the tokens; use plan() and realise()")
        plan = self.plan(count)
        candidates = self._candidates()
        tokens = candidates.draw(plan.position_groups, self._tokens.rng)
        self._tokens.count += len(tokens)
        return self.realise(plan, tokens)

    def state(self) -> dict[str, int]:
        """Counters for `load_state`; goes into a checkpoint."""
        return {
            **self._order.state(),
            "rows": self._serial,
            "choices": self._choices.count,
            "tokens": self._tokens.count,
        }

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken from a stream with the same task, noise and seed.

        Raises:
            ValueError: the state is not one of such a stream.
        """
        rows, choices, tokens = _counters(state, ("rows", "choices", "tokens"))
        self._order.load_state(state)
        self._serial = rows
        self._choices.load_count(choices)
        self._tokens.load_count(tokens)

    def _candidates(self) -> NoiseCandidates:
        return self._task.task_noise if self._noise.kind == "task" else self._task.random_noise


@dataclass(frozen=True)
class PromptBatch:
    """Prompts for rollouts. example_index: [R] rows of the data set they come from. prompts: R rows."""

    example_index: Int64
    prompts: Ragged


class PromptStream:
    """Prompts of a data set for one actor: every actor has an order of its own, the same in every run."""

    def __init__(self, examples: Dataset, seed: int, actor_index: int) -> None:
        self._order = EpochOrder(len(examples), (seed, 3, actor_index))
        self._prompts = examples.select_columns(["prompt_ids"]).with_format("arrow")

    def draw(self, count: int) -> PromptBatch:
        """The next `count` prompts."""
        rows = self._order.draw(count)
        return PromptBatch(rows, Ragged.from_arrow(self._prompts[rows].column("prompt_ids")))

    def state(self) -> dict[str, int]:
        """Counters for `load_state`."""
        return self._order.state()

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken."""
        self._order.load_state(state)


def _counters(state: Mapping[str, int], names: tuple[str, ...]) -> list[int]:
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"the stream's state lacks {missing}; it has {sorted(state)}")
    return [state[name] for name in names]
