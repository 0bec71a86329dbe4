"""What the learner tells about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LearnerStatus:
    """Where the learner is now."""

    stage: str
    step: int
    stage_steps: int
    seconds_per_step: float  # running mean
    policy_version: int  # newest published; -1 before the first
    activity: str
    metrics: dict[str, float]  # of the newest step
    warnings: tuple[str, ...] = ()  # of the whole run, oldest first
    notes: tuple[str, ...] = ()  # likewise; what it did that nobody asked for


@dataclass(frozen=True)
class StageResult:
    """How a stage ended."""

    stage: str
    step: int
    finished: bool  # False: stopped on request, resumable
    checkpoint: str  # folder of its newest checkpoint
    seconds: float
