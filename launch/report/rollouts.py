"""Stored rollouts as sequences of actions with their texts, to be read and stepped through."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.reading.reader import BufferSnapshot
from buffer.trajectory.replay import ActionLogs, replay, surviving_events
from buffer.trajectory.schema import TokenContract
from launch.rollout_view import continuation, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ROLLOUTS = 24
MAX_ACTIONS = 6000
"""Of all shown rollouts together: what bounds the size of the page."""
CONTEXT_TOKENS = 8
"""Tokens before an action that its text is decoded behind; what a tokenizer does to a token looks no further back."""
PROBABILITY_BOUNDS = (0.01, 0.1, 0.5, 0.9)
"""Between the five colors of deleted tokens."""

ActionKind = Literal["write", "backspace", "end"]


class Action(NamedTuple):
    """One action. text: of the token that was written. kept: whether it is there at the end. noise: the environment
    wrote another token than the policy chose. logprob: in nats, as the actor stored it.
    """

    kind: ActionKind
    text: str
    kept: bool
    noise: bool
    logprob: float
    version: int

    @property
    def shade(self) -> str:
        """Class of CSS: how probable the action was, in five steps."""
        return f"p{sum(self.logprob > math.log(bound) for bound in PROBABILITY_BOUNDS)}"

    @property
    def classes(self) -> str:
        """Classes of CSS of its token at the end."""
        return " ".join([*([] if self.kept else ["gone", self.shade]), *(["noise"] if self.noise else [])])


@dataclass(frozen=True)
class Rollout:
    """A stored rollout. reward: None where nothing scored it."""

    id: str
    actor: str
    created_at: float
    prompt: str
    finish_reason: str
    reward: float | None
    actions: tuple[Action, ...]

    @property
    def takes_back(self) -> bool:
        """Whether an action is a backspace."""
        return any(action.kind == "backspace" for action in self.actions)

    @property
    def pieces(self) -> list[tuple[str, str]]:
        """Text and classes of neighboring tokens that look the same, in the order in which they were written."""
        written = [(action.text, action.classes) for action in self.actions if action.text]
        return [("".join(text for text, _ in group), classes) for classes, group in groupby(written, itemgetter(1))]

    @property
    def versions(self) -> str:
        """Versions of the weights behind the actions: `v3`, or `v3 to v5`."""
        seen = sorted({action.version for action in self.actions})
        if not seen:
            return "no action"
        return f"v{seen[0]}" if len(seen) == 1 else f"v{seen[0]} to v{seen[-1]}"


@dataclass(frozen=True)
class RolloutSample:
    """rollouts: oldest first. num_stored: the policy's rollouts in the buffer's files; num_deleting: those of them that
    take a token back.
    """

    rollouts: tuple[Rollout, ...]
    num_stored: int
    num_deleting: int


def sample_rollouts(
    snapshot: BufferSnapshot, tokenizer: PreTrainedTokenizerBase, max_rollouts: int = MAX_ROLLOUTS
) -> RolloutSample:
    """Rollouts spread evenly over the stored ones: of as many stretches of equal length, the first that takes a token
    back, or the first of all where none does.
    """
    stored = snapshot.trajectories
    ours = np.flatnonzero(pc.equal(stored.column("source"), "policy").to_numpy())
    ours = ours[np.argsort(stored.column("created_at").cast(pa.int64()).to_numpy()[ours], kind="stable")]
    deletes = _deletes(stored, snapshot.contract.backspace_id)
    if len(ours) == 0:
        return RolloutSample((), 0, 0)
    chosen: list[Rollout] = []
    num_actions = 0
    for stretch in np.array_split(ours, min(max_rollouts, len(ours))):
        index = int(stretch[np.argmax(deletes[stretch])])
        row = stored.slice(index, 1).combine_chunks().to_batches()[0]
        num_actions += len(row.column("actions")[0])
        if chosen and num_actions > MAX_ACTIONS:
            break
        chosen.append(read_rollout(row, tokenizer, snapshot.contract))
    return RolloutSample(tuple(chosen), len(ours), int(deletes[ours].sum()))


def read_rollout(row: pa.RecordBatch, tokenizer: PreTrainedTokenizerBase, contract: TokenContract) -> Rollout:
    """The trajectory of a batch of one policy row.

    Raises:
        ValueError: the log takes a token back at the floor.
    """
    log = ActionLogs.from_batch(row)
    kept = surviving_events(log, replay(log, contract.backspace_id), contract.backspace_id)
    prompt_ids = log.prompt_ids.tolist()
    text = list(prompt_ids)
    actions = []
    for action, written, stays, logprob, version in zip(
        log.actions.tolist(),
        log.realised.tolist(),
        kept.tolist(),
        row.column("logprobs")[0].as_py(),
        row.column("policy_version")[0].as_py(),
        strict=True,
    ):
        shown, kind = "", _kind(written, contract)
        if kind == "write":
            shown = continuation(tokenizer, text[-CONTEXT_TOKENS:], [written])
            text.append(written)
        elif kind == "backspace":
            text.pop()
        actions.append(Action(kind, shown, stays, written != action, float(f"{logprob:.4g}"), version))
    values = row.select(["id", "actor", "created_at", "finish_reason", "reward"]).to_pylist()[0]
    return Rollout(
        values["id"],
        values["actor"],
        values["created_at"].timestamp(),
        decode(tokenizer, prompt_ids),
        values["finish_reason"],
        values["reward"],
        tuple(actions),
    )


def _kind(written: int, contract: TokenContract) -> ActionKind:
    if written == contract.backspace_id:
        return "backspace"
    return "end" if written in contract.eos_ids else "write"


def _deletes(stored: pa.Table, backspace_id: int) -> npt.NDArray[np.bool_]:
    """[n] whether each row takes a token back; file by file, since the actions of all may be many."""
    found = [np.zeros(0, dtype=np.bool_)]
    for actions in stored.column("actions").chunks:
        owners = pc.list_parent_indices(actions).to_numpy()
        deletes = np.zeros(len(actions), dtype=np.bool_)
        deletes[owners[pc.list_flatten(actions).to_numpy() == backspace_id]] = True
        found.append(deletes)
    return np.concatenate(found)
