"""Small random trajectories with backspaces, for tests of training where the data do not matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from learner.state_tree.batch import TreeSettings
from tests.trajectories import BACKSPACE, EOS, VOCAB, batch_of, expert_row, row

MATCHING = {"name": "sequencematch", "alpha": 0.05, "bc_weight_start": 0.9, "bc_weight_end": 0.1, "bc_weight_steps": 4}
CLONING = {"name": "behavior_cloning"}
TREES = TreeSettings(backspace_id=BACKSPACE, eos_id=EOS, max_tokens_per_micro_batch=48, max_positions=64)


@dataclass
class RandomTrajectories:
    """A batch source whose every draw is a function of its number."""

    source: str
    draws: int = 0

    def sample(self, count: int) -> pa.RecordBatch:
        self.draws += 1
        return random_trajectories(self.source, count, seed=self.draws)


def random_trajectories(source: str, count: int, seed: int) -> pa.RecordBatch:
    """Logs of 1 to 12 actions with backspaces on prompts that some of them share; those of the policy with scores."""
    generator = np.random.default_rng((seed, source == "expert"))
    rows = []
    for number in range(count):
        actions, depth = [], 0
        for _ in range(int(generator.integers(1, 13))):
            back = depth > 0 and generator.random() < 0.3
            actions.append(BACKSPACE if back else int(generator.integers(3, VOCAB)))
            depth += -1 if back else 1
        if generator.random() < 0.7:
            actions.append(EOS)
        prompt = [7] * int(generator.integers(1, 4))
        finish = "eos" if actions[-1] == EOS else "max_actions"
        given: dict[str, object] = {"prompt_ids": prompt, "finish_reason": finish}
        if source == "expert":
            rows.append(expert_row(f"{source}-{number}", actions, **given))
        else:
            scored = {"logprobs": [-5.0] * len(actions), "reward": 1.0 + number % 3, "features": [number % 2]}
            rows.append(row(f"{source}-{number}", actions, **given, **scored))
    return batch_of(rows)
