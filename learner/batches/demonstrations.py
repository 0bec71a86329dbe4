"""Demonstrations of backspace, to which the row of a model that has never seen it is fitted before it is trained."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from buffer.experts.tasks import Task
from buffer.schema import TokenContract
from buffer.settings import NoiseSettings
from learner.batches.micro_batches import TreeSettings, build_micro_batches
from learner.model.backspace_row import fit_backspace_row
from learner.state_tree.policy import TreePolicy

NUM_BACKSPACES = 256
"""Backspaces that a row is fitted to; of a row's hundreds of coordinates the prior knows the rest."""

MAX_ACTIONS = 2**14
"""Of demonstrations, where noise is rare: their states are in memory together."""

_LOGS_PER_DRAW = 8
_SEED_OFFSET = 1  # from the seed of a stage's own stream, whose examples are not used up


def teach_backspace_row(
    policy: TreePolicy, task: Task, noise: NoiseSettings, contract: TokenContract, settings: TreeSettings, seed: int
) -> None:
    """Fit the backspace row of `policy`, in place, to demonstrations of its own; each rank does the same. Without a
    backspace in them it stays as it is.
    """
    stream = task.expert_stream(noise, contract, (seed << 32) + _SEED_OFFSET)
    batches: list[pa.RecordBatch] = []
    num_backspaces = num_actions = 0
    while num_backspaces < NUM_BACKSPACES and num_actions < MAX_ACTIONS:
        batches.append(stream.draw(_LOGS_PER_DRAW))
        actions = batches[-1].column("actions").flatten()
        num_actions += len(actions)
        num_backspaces += pc.sum(pc.equal(actions, contract.backspace_id)).as_py()
    if num_backspaces > 0:
        fit_backspace_row(policy, build_micro_batches(pa.concat_batches(batches), settings))
