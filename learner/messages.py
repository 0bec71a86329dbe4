"""Messages between the driver and the learner's processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from buffer.experts.tasks import Task
from buffer.settings import NoiseSettings, TaskSettings
from buffer.trajectory.schema import TokenContract
from learner.metrics.log import TrackerName
from learner.settings.held_out import HeldOutSettings
from learner.settings.model import ModelSettings
from learner.settings.stages import LearnerSettings


@dataclass(frozen=True)
class LearnerSpec:
    """What each rank starts with. prioritized_replay: whether the buffer samples by priorities, which the
    learner reports. features: names of the rollouts' features, in their order. offers_backspace: whether backspace is
    an action at all, of experts as of rollouts.
    """

    model: ModelSettings
    task: TaskSettings
    noise: NoiseSettings
    settings: LearnerSettings
    run_folder: str
    seed: int
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    prioritized_replay: bool = False
    features: tuple[str, ...] = ()
    offers_backspace: bool = True
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)


@dataclass(frozen=True)
class PreparedRun:
    """Model and task, for the other processes. max_length: longest text, in tokens."""

    config_json: str
    contract: TokenContract
    task: Task
    max_length: int


@dataclass(frozen=True)
class LearnerStatus:
    """The progress of the learner."""

    stage: str
    step: int
    stage_steps: int
    seconds_per_step: float  # running mean
    policy_version: int  # newest published; -1 before the first
    activity: str
    metrics: dict[str, float]  # of the newest step
    warnings: tuple[str, ...] = ()  # of the whole run, oldest first
    notes: tuple[str, ...] = ()  # likewise; what the learner did by itself
    held_out: dict[str, float] = field(default_factory=dict)  # of the stage: `StageEvaluation.state`
    questions_version: int = -1  # newest weights with which an actor has to answer held-out questions


@dataclass(frozen=True)
class StageResult:
    """How a stage ended."""

    stage: str
    step: int
    finished: bool  # also where it stopped early; False: stopped on request, resumable
    checkpoint: str  # folder of its newest checkpoint
    seconds: float
