"""Evaluation of checkpoints: what is generated, what is measured of it, and how it is shown."""

from launch.evaluation.results import CheckpointResult, Evaluation, ShownRollout, Target
from launch.evaluation.run import evaluate
from launch.settings.decodings import GREEDY, RECOVERY, SAMPLED
from launch.statistics import Estimate

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
