"""Seeded, endless, resumable streams over the examples of a task: expert trajectories, and prompts for rollouts.

A stream is a function of its seed alone: the order of every epoch and the noise of every position do not depend on how
many rows are drawn at a time. So its state is a handful of counters, and a stream that is loaded with them goes on as
if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.experts.noise import NoiseCandidates, insert_noise
from buffer.experts.ragged import Int32, Int64, Ragged, index_ranges
from buffer.settings import NoiseSettings
from buffer.trajectory.schema import TokenContract, trajectory_schema

if TYPE_CHECKING:
    from datasets import Dataset


class _Examples:
    """Rows of one epoch after the other, each epoch in an order of its own."""

    def __init__(self, examples: Dataset | pa.Table, columns: list[str], seed: tuple[int, ...]) -> None:
        from datasets import Dataset

        if len(examples) < 1:
            raise ValueError("a stream needs at least one example")
        # Its row look-up copies nothing but the rows asked for; a table's `take` joins all chunks of a column first.
        rows = Dataset(examples) if isinstance(examples, pa.Table) else examples
        self._rows = rows.select_columns(columns).with_format("arrow")
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, first: int, count: int) -> pa.Table:
        """The rows that come as number `first` and after it; may run over the end of an epoch."""
        epochs, places = np.divmod(np.arange(first, first + count), len(self))
        rows = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([*self._seed, epoch]).permutation(len(self))
            rows[epochs == epoch] = self._order[places[epochs == epoch]]
        return self._rows[rows]


def _uniforms(seed: tuple[int, ...], used: int) -> np.random.Generator:
    """The seeded generator of doubles, after the first `used` ones."""
    return np.random.Generator(np.random.PCG64(seed).advance(used))


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
    def position_rows(self) -> Int64:
        """[K] row of each position."""
        return np.searchsorted(self.targets.offsets, self.positions, side="right") - 1

    def prefixes(self) -> Ragged:
        """K rows: the text (prompt and answer so far) that each noise token continues."""
        row, answers_begin = self.position_rows, len(self.prompts.values)
        starts = np.stack([self.prompts.offsets[row], answers_begin + self.targets.offsets[row]], axis=1)
        lengths = np.stack([self.prompts.lengths[row], self.positions - self.targets.offsets[row]], axis=1)
        values = np.concatenate([self.prompts.values, self.targets.values])
        return Ragged.from_lengths(lengths.sum(axis=1), values[index_ranges(starts.ravel(), lengths.ravel())])


class ExpertStream:
    """Expert trajectories of a task's examples, with fresh noise every epoch.

    With noise of kind `policy` the tokens come from the current policy: take a `plan`, have the engine
    continue each of its `prefixes` by one token (`<eos>` and backspace masked), and hand the tokens to
    `execute`. The other kinds do the same inside `draw`.

    Args:
        examples: columns `prompt_ids`, `target_ids` (not empty), and `noise_group` where there are candidates.
        candidates: what noise of kind `random` or `task` is drawn from.
        actor: who draws; with the task and the seed it makes the trajectory ids, so that each run of an actor
            process needs its own.
    """

    def __init__(
        self,
        examples: Dataset | pa.Table,
        *,
        task: str,
        noise: NoiseSettings,
        contract: TokenContract,
        seed: int,
        candidates: NoiseCandidates | None = None,
        actor: str = "expert",
    ) -> None:
        if (candidates is not None) != (noise.kind in ("random", "task")):
            raise ValueError("noise of kind random or task needs candidates, and no other kind does")
        self._task = task
        self._kind = noise.kind
        self._rate = 0.0 if noise.kind == "none" else noise.rate
        self._candidates = candidates
        self._contract = contract
        self._schema = trajectory_schema(contract)
        self._id_prefix = f"{actor}/{task}/{seed}/"
        self._actor = actor
        self._seed = seed
        groups = [] if candidates is None else ["noise_group"]
        self._examples = _Examples(examples, ["prompt_ids", "target_ids", *groups], (seed, 0))
        self._num_rows = self._num_choices = self._num_tokens = 0

    @property
    def needs_policy(self) -> bool:
        """Whether a policy has to draw the noise tokens, so that there is no `draw`."""
        return self._kind == "policy"

    def plan(self, count: int) -> NoisePlan:
        """The next `count` examples with the positions that get a noise token."""
        rows = self._examples.take(self._num_rows, count)
        targets = Ragged.from_arrow(rows.column("target_ids"))
        chances = _uniforms((self._seed, 1), self._num_choices).random(len(targets.values))
        plan = NoisePlan(
            serial=self._num_rows,
            prompts=Ragged.from_arrow(rows.column("prompt_ids")),
            targets=targets,
            groups=np.zeros(count, np.int64) if self._candidates is None else rows.column("noise_group").to_numpy(),
            positions=np.flatnonzero(chances < self._rate),
        )
        self._num_choices += len(targets.values)
        self._num_rows += count
        return plan

    def execute(self, plan: NoisePlan, tokens: Int32) -> pa.RecordBatch:
        """Expert trajectories of a plan with its noise tokens [K]; void ones are left out."""
        contract, targets, count = self._contract, plan.targets, plan.targets.num_rows
        actions, executed = insert_noise(targets, plan.positions, tokens, contract.backspace_id, contract.eos_ids)
        serials = pa.array(np.arange(plan.serial, plan.serial + count)).cast(pa.string())
        ends_in_eos = targets.last_values == contract.eos_id
        columns = {
            "id": pc.binary_join_element_wise(self._id_prefix, serials, ""),
            "source": pa.repeat("expert", count),
            "task": pa.repeat(self._task, count),
            "prompt_ids": plan.prompts.to_arrow(),
            "actions": actions.to_arrow(),
            "executed": executed,
            "finish_reason": pc.if_else(pa.array(ends_in_eos), "eos", "max_length"),
            "actor": pa.repeat(self._actor, count),
            "created_at": pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", tz="UTC")), count),
        }
        absent = {field.name: pa.nulls(count, field.type) for field in self._schema if field.name not in columns}
        return pa.RecordBatch.from_pydict({**columns, **absent}, schema=self._schema)

    def sample(self, count: int) -> pa.RecordBatch:
        """The next `count` expert trajectories; ValueError where the noise is the policy's."""
        if self.needs_policy:
            raise ValueError("noise.kind=policy: the actors draw the tokens; use plan() and execute()")
        plan = self.plan(count)
        if self._candidates is None:
            return self.execute(plan, np.empty(0, dtype=np.int32))
        generator = _uniforms((self._seed, 2), self._num_tokens)
        tokens = self._candidates.sample(plan.groups[plan.position_rows], generator)
        self._num_tokens += len(tokens)
        return self.execute(plan, tokens)

    def state(self) -> dict[str, int]:
        """Counters for `load_state`; goes into a checkpoint."""
        counters = {"rows": self._num_rows, "choices": self._num_choices, "tokens": self._num_tokens}
        return {"examples": len(self._examples), **counters}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken from a stream with the same task, noise and seed; ValueError if it was not."""
        own = self.state()
        if state.keys() != own.keys() or state["examples"] != own["examples"]:
            raise ValueError(
                f"the state {dict(state)} is not one of a stream over {own['examples']} examples; resume with the task "
                "settings of the run"
            )
        self._num_rows, self._num_choices, self._num_tokens = state["rows"], state["choices"], state["tokens"]


def clean_trajectories(examples: Dataset, contract: TokenContract) -> pa.RecordBatch:
    """Examples as expert trajectories without noise, in their order; their ids end in the number of the example."""
    columns = examples.select_columns(["prompt_ids", "target_ids"]).with_format("arrow")[:]
    prompts, targets = (Ragged.from_arrow(columns.column(name)) for name in ("prompt_ids", "target_ids"))
    nothing = np.zeros(0, dtype=np.int64)
    plan = NoisePlan(0, prompts, targets, np.zeros(len(examples), dtype=np.int64), positions=nothing)
    none = NoiseSettings(kind="none")
    stream = ExpertStream(examples, task="held-out", noise=none, contract=contract, seed=0, actor="evaluation")
    return stream.execute(plan, np.zeros(0, dtype=np.int32))


class PromptStream:
    """Prompts of a task's examples, in an order of the seed; every actor has a seed of its own."""

    def __init__(self, examples: Dataset | pa.Table, seed: int) -> None:
        self._examples = _Examples(examples, ["prompt_ids"], (seed, 3))
        self._num_rows = 0

    def sample(self, count: int) -> Ragged:
        """The next `count` prompts."""
        rows = self._examples.take(self._num_rows, count)
        self._num_rows += count
        return Ragged.from_arrow(rows.column("prompt_ids"))
