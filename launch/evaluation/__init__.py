"""Evaluation of checkpoints: what is generated, what is measured of it, and how it is shown."""

from launch.evaluation.results import CheckpointResult, Evaluation, ShownRollout, Target
from launch.evaluation.run import check_evaluation, evaluate
from launch.settings.decodings import GREEDY, RECOVERY, SAMPLED

__all__ = [
    "GREEDY",
    "RECOVERY",
    "SAMPLED",
    "CheckpointResult",
    "Evaluation",
    "ShownRollout",
    "Target",
    "check_evaluation",
    "evaluate",
]
