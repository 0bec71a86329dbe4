"""Evaluation of checkpoints: what is generated, what is measured of it, and how it is shown."""

from launch.decodings import GREEDY, RECOVERY, SAMPLED
from launch.evaluation.estimates import Estimate
from launch.evaluation.results import CheckpointResult, Evaluation, ShownRollout, Target
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
