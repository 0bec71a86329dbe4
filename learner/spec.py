"""What a learner is told when it is born, and what it tells in turn."""

from __future__ import annotations

from dataclasses import dataclass

from buffer.experts.tasks import Task
from buffer.settings import NoiseSettings, TaskSettings
from buffer.trajectory.schema import TokenContract
from learner.metrics.trackers import TrackerName
from learner.settings.model import ModelSettings
from learner.settings.stages import LearnerSettings


@dataclass(frozen=True)
class LearnerSpec:
    """What the learner is born with. prioritised_replay: whether the buffer draws by priorities and is told them.
    features: names of those that rollouts have, in their order. offers_backspace: whether backspace is an action at
    all, of experts as of rollouts.
    """

    model: ModelSettings
    task: TaskSettings
    noise: NoiseSettings
    settings: LearnerSettings
    run_folder: str
    seed: int
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    prioritised_replay: bool = False
    features: tuple[str, ...] = ()
    offers_backspace: bool = True


@dataclass(frozen=True)
class PreparedRun:
    """What the other processes need to know of model and task. max_length: longest text, in tokens."""

    config_json: str
    contract: TokenContract
    task: Task
    num_parameters: int
    max_length: int
