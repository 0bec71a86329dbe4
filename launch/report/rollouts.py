"""Stored rollouts as sequences of actions with their texts, to be read and stepped through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.reading.snapshot import BufferSnapshot
from buffer.trajectory.replay import ActionLogs
from buffer.trajectory.schema import TokenContract
from launch.rollout_view import continuation, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ROLLOUTS = 24
MAX_ACTIONS = 6000
"""Of all shown rollouts together: what bounds the size of the page."""
CONTEXT_TOKENS = 8
"""Tokens before an action that its text is decoded behind; what a tokenizer does to a token looks no further back."""

ActionKind = Literal["write", "backspace", "end"]


class Action(NamedTuple):
    """One action. text: of the token that was written. noise: the environment wrote another token than the policy
    chose. logprob: in nats, as the actor stored it.
    """

    kind: ActionKind
    text: str
    noise: bool
    logprob: float
    version: int


@dataclass(frozen=True)
class Rollout:
    """A stored rollout. reward: None where nothing scored it."""

    actor: str
    created_at: float
    prompt: str
    finish_reason: str
    reward: float | None
    actions: tuple[Action, ...]


def sample_rollouts(
    snapshot: BufferSnapshot, tokenizer: PreTrainedTokenizerBase, max_rollouts: int = MAX_ROLLOUTS
) -> list[Rollout]:
    """Rollouts spread evenly over the stored ones, oldest first: of as many stretches of equal length, the first that
    takes a token back, or the first of all where none does.
    """
    stored = snapshot.trajectories
    ours = np.flatnonzero(pc.equal(stored.column("source"), "policy").to_numpy())
    ours = ours[np.argsort(stored.column("created_at").cast(pa.int64()).to_numpy()[ours], kind="stable")]
    deletes = _deletes(stored, snapshot.contract.backspace_id)
    chosen: list[Rollout] = []
    num_actions = 0
    for stretch in np.array_split(ours, min(max_rollouts, len(ours))) if len(ours) else ():
        index = int(stretch[np.argmax(deletes[stretch])])
        row = stored.slice(index, 1).combine_chunks().to_batches()[0]
        num_actions += len(row.column("actions")[0])
        if chosen and num_actions > MAX_ACTIONS:
            break
        chosen.append(read_rollout(row, tokenizer, snapshot.contract))
    return chosen


def read_rollout(row: pa.RecordBatch, tokenizer: PreTrainedTokenizerBase, contract: TokenContract) -> Rollout:
    """The trajectory of a batch of one policy row, which the buffer has validated."""
    log, values = ActionLogs.from_batch(row), row.to_pylist()[0]
    text, actions = list(values["prompt_ids"]), []
    columns = (values["actions"], log.realised.tolist(), values["logprobs"], values["policy_version"])
    special: dict[int, ActionKind] = dict.fromkeys(contract.eos_ids, "end")
    special[contract.backspace_id] = "backspace"
    for action, written, logprob, version in zip(*columns, strict=True):
        kind, shown = special.get(written, "write"), ""
        if kind == "write":
            shown = continuation(tokenizer, text[-CONTEXT_TOKENS:], [written])
            text.append(written)
        elif kind == "backspace":
            text.pop()
        actions.append(Action(kind, shown, written != action, float(f"{logprob:.4g}"), version))
    return Rollout(
        values["actor"],
        values["created_at"].timestamp(),
        decode(tokenizer, values["prompt_ids"]),
        values["finish_reason"],
        values["reward"],
        tuple(actions),
    )


def _deletes(stored: pa.Table, backspace_id: int) -> npt.NDArray[np.bool_]:
    """[n] whether each row takes a token back; file by file, since the actions of all may be many."""
    deletes = [np.zeros(0, dtype=np.bool_)]
    for actions in stored.column("actions").chunks:
        owners = pc.list_parent_indices(actions).to_numpy()[pc.list_flatten(actions).to_numpy() == backspace_id]
        deletes.append(np.isin(np.arange(len(actions)), owners))
    return np.concatenate(deletes)
