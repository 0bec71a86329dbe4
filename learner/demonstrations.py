"""Demonstrations of backspace, to which the row of a model that has never seen it is fitted before it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from buffer.experts.ragged import Int32
from buffer.experts.stream import ExpertStream, NoisePlan
from buffer.experts.tasks import Task
from buffer.settings import NoiseSettings
from buffer.trajectory.schema import TokenContract
from learner.batches import build_micro_batches
from learner.model.backspace_row import fit_backspace_row, gather_evidence
from learner.ranks import Ranks
from learner.state_tree.batch import TreeBatch, TreeSettings
from learner.state_tree.policy import StateLogits, TreePolicy

NUM_BACKSPACES = 256
"""Backspaces that a row is fitted to; of a row's hundreds of coordinates the prior knows the rest."""

MAX_ACTIONS = 2**14
"""Of demonstrations, where noise is rare: their states are in memory together."""

NUM_UNSEEN = 64
"""Demonstrations that a fit is judged by."""

_LOGS_PER_DRAW = 8
_SEED_OFFSET = 1  # from the seed of a stage's own stream, whose examples are not used up


@dataclass(frozen=True)
class TaughtRow:
    """num_trajectories: demonstrations that the row was fitted to. The rest: `BackspaceEvidence.odds` on NUM_UNSEEN
    others."""

    num_trajectories: int
    after_mistake: float
    after_right: float
    nats: float

    def __str__(self) -> str:
        after = {"after a mistake": self.after_mistake, "after a right token": self.after_right}
        # Targets of one token have no right token that could be taken back, and few demonstrations maybe no mistake.
        found = [f"{value:.2f} {where}" for where, value in after.items() if not math.isnan(value)]
        judged = f"its probability is {' and '.join(found)}, {self.nats:.2f} nats per action for backspace or not"
        return (
            f"the model has never seen backspace: its row is fitted to {self.num_trajectories} demonstrations; on "
            f"{NUM_UNSEEN} others {judged if found else 'backspace could never be taken'}"
        )


class Demonstrations:
    """Expert trajectories of a task with noise of any kind; noise of kind `policy` is drawn by the learner's model."""

    def __init__(
        self, policy: TreePolicy, stream: ExpertStream, settings: TreeSettings, ranks: Ranks, seed: int
    ) -> None:
        """stream: the same at every rank. seed: of the tokens that the policy draws, if it does."""
        self._policy = policy
        self._stream = stream
        self._settings = settings
        self._ranks = ranks
        self._generator = torch.Generator(policy.device).manual_seed(seed)

    def sample(self, count: int) -> pa.RecordBatch:
        """The next `count`. All ranks call this together, and get the same."""
        if not self._stream.needs_policy:
            return self._stream.sample(count)
        plan = self._stream.plan(count)
        return self._stream.execute(plan, self._own_mistakes(plan))

    def _own_mistakes(self, plan: NoisePlan) -> Int32:
        """[K] what the policy writes in place of the right tokens at the positions of `plan`, by one pass over them."""
        clean = self._stream.execute(replace(plan, positions=plan.positions[:0]), np.empty(0, dtype=np.int32))
        first = dict(zip(clean.column("id").to_pylist(), plan.targets.offsets[:-1].tolist(), strict=True))
        tokens = np.zeros(len(plan.targets.values), dtype=np.int64)

        def draw(tree: TreeBatch, logits: StateLogits) -> Tensor:
            # An action of a clean trajectory is a token of its target.
            places = (
                torch.tensor([first[name] for name in tree.trajectories.ids])[tree.actions.trajectory.cpu()]
                + tree.actions.time.cpu()
            )
            chosen = np.isin(places.numpy(), plan.positions)
            rows = tree.actions.state[torch.from_numpy(chosen).to(tree.actions.state.device)]
            tokens[places.numpy()[chosen]] = logits.sample_tokens(rows, self._generator).cpu().numpy()
            return logits.v_floor

        for tree in build_micro_batches(clean, self._settings):
            self._policy.measure(tree.to(self._policy.device), draw)
        # Rank 0 decides: a difference of rounding may be another token, and then ranks would hold other trees.
        drawn = self._ranks.broadcast_numbers(tokens[plan.positions].tolist())
        return np.array(drawn, dtype=np.int32)


def teach_backspace_row(
    policy: TreePolicy,
    task: Task,
    noise: NoiseSettings,
    contract: TokenContract,
    settings: TreeSettings,
    ranks: Ranks,
    seed: int,
) -> TaughtRow | None:
    """Fit the backspace row of `policy`, in place, to demonstrations of its own; each rank does the same. None, and the
    row as it was, where they hold no backspace."""
    stream = task.expert_stream(noise, contract, (seed << 32) + _SEED_OFFSET)
    demonstrations = Demonstrations(policy, stream, settings, ranks, seed)
    batches: list[pa.RecordBatch] = []
    num_backspaces = num_actions = 0
    while num_backspaces < NUM_BACKSPACES and num_actions < MAX_ACTIONS:
        batches.append(demonstrations.sample(_LOGS_PER_DRAW))
        actions = batches[-1].column("actions").flatten()
        num_actions += len(actions)
        num_backspaces += pc.sum(pc.equal(actions, contract.backspace_id)).as_py()
    if num_backspaces == 0:
        return None
    row = fit_backspace_row(policy, build_micro_batches(pa.concat_batches(batches), settings))
    unseen = gather_evidence(policy, build_micro_batches(demonstrations.sample(NUM_UNSEEN), settings))
    return TaughtRow(len(batches) * _LOGS_PER_DRAW, *unseen.odds(row))
