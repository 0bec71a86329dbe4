"""Rollouts as the policy that acted saw them, against what the learner says of them now.

For actions of the newest weights the difference of log-probabilities is what the engine computes otherwise than the
learner, and the steps that the learner took since. For older ones it is mostly the distance that the policy went.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from buffer.trajectory.replay import Int64
from learner.objectives.base import EvaluatedLogs, Metrics


@torch.no_grad()  # type: ignore[untyped-decorator]
def behaviour_metrics(rollouts: EvaluatedLogs, backspace_id: int, newest_version: int) -> Metrics:
    """This call's shares; `finish_behaviour_metrics` makes means of them once those of all calls are combined.

    newest_version: of all actions of the step's rollouts.
    """
    tree, values = rollouts.tree, rollouts.values
    metrics = {"backspace_rate": rollouts.mean_over_actions((tree.actions.label == backspace_id).to(values.v.dtype))}
    difference = (values.log_prob_at_temperature - tree.actions.behavior_log_prob).abs()
    compared = tree.actions.behavior_temperature > 0.0
    newest = tree.actions.behavior_version == newest_version
    for suffix, chosen in (("", compared & newest), ("_stale", compared & ~newest)):
        kept = difference.masked_fill(~chosen, 0.0)
        metrics[f"log_prob_mismatch{suffix}_mean"] = rollouts.mean_over_actions(kept)
        metrics[f"log_prob_mismatch{suffix}_max_abs"] = torch.cat([kept, kept.new_zeros(1)]).max()
        metrics[f"log_prob_compared{suffix}_share"] = rollouts.mean_over_actions(chosen.to(values.v.dtype))
    return metrics


def distribution_metrics(name: str, samples: Int64) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum of [n] samples, as scalars."""
    p50, p95 = np.quantile(samples, [0.5, 0.95])
    return {
        f"{name}_mean": float(samples.mean()),
        f"{name}_p50": float(p50),
        f"{name}_p95": float(p95),
        f"{name}_max": float(samples.max()),
    }


def finish_behaviour_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """From combined shares to means over the compared actions; 0 where none was compared, as their share then says."""
    finished = dict(metrics)
    for suffix in ("", "_stale"):
        share = finished.get(f"log_prob_compared{suffix}_share", 0.0)
        if share > 0.0:
            finished[f"log_prob_mismatch{suffix}_mean"] /= share
    return finished
