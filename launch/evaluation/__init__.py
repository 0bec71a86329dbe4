"""Evaluation of checkpoints: what is generated, what is measured of it, and how it is shown."""

from launch.evaluation.estimates import Estimate
from launch.evaluation.results import GREEDY, RECOVERY, SAMPLED, CheckpointResult, Evaluation, ShownRollout, Target
from launch.evaluation.run import evaluate

__all__ = [
    "GREEDY",
    "RECOVERY",
    "SAMPLED",
    "CheckpointResult",
    "Estimate",
    "Evaluation",
    "ShownRollout",
    "Target",
    "evaluate",
]
