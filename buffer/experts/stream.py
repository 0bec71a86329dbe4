"""Seeded, endless, resumable streams over the examples of a task: expert trajectories, and prompts for rollouts.

A stream is a function of its seed alone: the order of every epoch and the noise of every position do not depend on how
many rows are drawn at a time. So its state is a handful of counters, and a stream that is loaded with them goes on as
if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.experts.noise import NoiseCandidates, choose_noise_positions, insert_noise, prefixes_at
from buffer.experts.order import CountedUniforms, EpochOrder, read_counters
from buffer.experts.ragged import Int32, Int64, Ragged
from buffer.settings import NoiseSettings
from buffer.trajectory.schema import TokenContract, trajectory_schema

if TYPE_CHECKING:
    from datasets import Dataset


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
    """Expert trajectories of a task's examples, with fresh noise every epoch.

    With noise of kind `policy` the tokens come from the current policy: take a `plan`, have the engine
    continue each of its `prefixes` by one token (`<eos>` and backspace masked), and hand the tokens to
    `realise`. The other kinds do the same inside `draw`.

    Args:
        examples: columns `prompt_ids`, `target_ids` (not empty), and `noise_group` where there are candidates.
        task: its name.
        noise: kind and rate.
        contract: of the run's trajectories.
        seed: of order and noise.
        candidates: what noise of kind `random` or `task` is drawn from (`Task.noise_candidates`).
        actor: who draws; with the task and the seed it makes the trajectory ids, so that each run of an actor
            process needs its own.

    Raises:
        ValueError: there are no examples, or the candidates do not go with the kind of noise.
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
        self._order = EpochOrder(len(examples), (seed, 0))
        self._choices = CountedUniforms((seed, 1))
        self._tokens = CountedUniforms((seed, 2))
        self._serial = 0
        groups = [] if candidates is None else ["noise_group"]
        self._examples = _arrow_rows(examples, ["prompt_ids", "target_ids", *groups])

    @property
    def epoch(self) -> int:
        """Epoch of the next row."""
        return self._order.epoch

    @property
    def needs_policy(self) -> bool:
        """Whether a policy has to draw the noise tokens, so that there is no `draw`."""
        return self._kind == "policy"

    def plan(self, count: int) -> NoisePlan:
        """The next `count` examples with the positions that get a noise token."""
        rows = self._examples[self._order.draw(count)]
        targets = Ragged.from_arrow(rows.column("target_ids"))
        has_groups = self._candidates is not None
        plan = NoisePlan(
            serial=self._serial,
            prompts=Ragged.from_arrow(rows.column("prompt_ids")),
            targets=targets,
            groups=rows.column("noise_group").to_numpy() if has_groups else np.zeros(count, dtype=np.int64),
            positions=choose_noise_positions(len(targets.values), self._rate, self._choices.rng),
        )
        self._choices.count += len(targets.values)
        self._serial += count
        return plan

    def realise(self, plan: NoisePlan, tokens: Int32) -> pa.RecordBatch:
        """Expert trajectories of a plan with its noise tokens [K]; void ones are left out (buffer.experts.noise)."""
        logs = insert_noise(plan.targets, plan.positions, tokens, self._contract.backspace_id, self._contract.eos_ids)
        count = plan.targets.num_rows
        serials = pa.array(np.arange(plan.serial, plan.serial + count)).cast(pa.string())
        ends_in_eos = plan.targets.last_values == self._contract.eos_id
        columns = {
            "id": pc.binary_join_element_wise(self._id_prefix, serials, ""),
            "source": pa.repeat("expert", count),
            "task": pa.repeat(self._task, count),
            "prompt_ids": plan.prompts.to_arrow(),
            "actions": logs.actions.to_arrow(),
            "realised": logs.realised_column(),
            "finish_reason": pc.if_else(pa.array(ends_in_eos), "eos", "max_length"),
            "actor": pa.repeat(self._actor, count),
            "created_at": pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", tz="UTC")), count),
        }
        absent = {field.name: pa.nulls(count, field.type) for field in self._schema if field.name not in columns}
        return pa.RecordBatch.from_pydict({**columns, **absent}, schema=self._schema)

    def draw(self, count: int) -> pa.RecordBatch:
        """The next `count` expert trajectories.

        Raises:
            ValueError: the noise is the policy's, which only an actor can draw.
        """
        if self.needs_policy:
            raise ValueError("noise.kind=policy: the actors draw the tokens; use plan() and realise()")
        plan = self.plan(count)
        if self._candidates is None:
            return self.realise(plan, np.empty(0, dtype=np.int32))
        tokens = self._candidates.draw(plan.position_groups, self._tokens.rng)
        self._tokens.count += len(tokens)
        return self.realise(plan, tokens)

    def state(self) -> dict[str, int]:
        """Counters for `load_state`; goes into a checkpoint."""
        counters = {"rows": self._serial, "choices": self._choices.count, "tokens": self._tokens.count}
        return {**self._order.state(), **counters}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken from a stream with the same task, noise and seed.

        Raises:
            ValueError: the state is not one of such a stream.
        """
        rows, choices, tokens = read_counters(state, ("rows", "choices", "tokens"))
        self._order.load_state(state)
        self._serial = rows
        self._choices.load_count(choices)
        self._tokens.load_count(tokens)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts for rollouts; iterates over the prompts, one array of ids each.

    example_index: [R] rows of the examples they come from. prompts: R rows.
    """

    example_index: Int64
    prompts: Ragged

    def __len__(self) -> int:
        return self.prompts.num_rows

    def __iter__(self) -> Iterator[Int32]:
        return iter(self.prompts.rows())


class PromptStream:
    """Prompts of a task's examples, in an order of the seed; every actor has a seed of its own."""

    def __init__(self, examples: Dataset | pa.Table, seed: int) -> None:
        self._order = EpochOrder(len(examples), (seed, 3))
        self._prompts = _arrow_rows(examples, ["prompt_ids"])

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


def _arrow_rows(examples: Dataset | pa.Table, columns: list[str]) -> Dataset:
    """The columns as a data set that gives Arrow tables: its row look-up copies nothing but the rows asked for."""
    from datasets import Dataset

    # A table's own `take` joins all chunks of a column first.
    rows = Dataset(examples) if isinstance(examples, pa.Table) else examples
    return rows.select_columns(columns).with_format("arrow")
