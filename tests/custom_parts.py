"""A user's own objective, task, scorer and sampler, as docs/api.md describes them; a run imports this module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from actors.scoring import Answer
from buffer.settings import Settings
from buffer.store.sampling import ReadColumn
from learner.objectives.base import EvaluatedTrajectories, Metrics, Objective
from learner.objectives.sequencematch import SequenceMatch
from learner.settings.objectives import BaseObjectiveSettings, SequenceMatchSettings


class Doubled(SequenceMatch):
    """SequenceMatch with another weight of the expert part."""

    class Options(SequenceMatchSettings):
        """As of SequenceMatch."""

        weight: float = 2.0

    settings: Options

    def data_loss(self, data: EvaluatedTrajectories, step: int) -> tuple[Tensor, Metrics]:
        loss, metrics = super().data_loss(data, step)
        return self.settings.weight * loss, metrics | {"loss": self.settings.weight * metrics["loss"]}


class Listed:
    """Sums of two digits, the larger digit first."""

    class Options(Settings):
        """held_out: how many sums."""

        held_out: int = 5

    def __init__(self, options: Options) -> None:
        if options.held_out > 50:
            raise ValueError(f"held_out={options.held_out} leaves nothing to train on")
        self._held_out = options.held_out

    def examples(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        pairs = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(a + 1)]
        return pairs[self._held_out :], pairs[: self._held_out]

    def is_correct(self, answer: str, example: dict[str, str]) -> bool:
        return answer == example["target"]


class Texts:
    """A task without right answers and without options."""

    def examples(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        return [("to be ", "or not")], [("not ", "to be")]


class Nothing(Texts):
    """A task that holds out nothing."""

    def examples(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        return super().examples()[0], []


class Near:
    """1 less the distance of the answer's length to that of the reference."""

    class Options(Settings):
        """scale: of the distance."""

        scale: float = 1.0

    def __init__(self, options: Options) -> None:
        self._scale = options.scale

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [1.0 - self._scale * abs(len(each.text) - len(each.reference)) for each in answers]


class Newest:
    """The newest rows, the newest first."""

    def choose(
        self, num_rows: int, count: int, generator: np.random.Generator, column: ReadColumn
    ) -> npt.NDArray[np.int64]:
        created = column("created_us")
        assert len(created) == num_rows
        assert (np.diff(created) >= 0).all()
        return np.arange(num_rows - 1, num_rows - 1 - count, -1)


class Repeating(Newest):
    """Gives a row twice."""

    def choose(
        self, num_rows: int, count: int, generator: np.random.Generator, column: ReadColumn
    ) -> npt.NDArray[np.int64]:
        return np.zeros(count, np.int64)


class Beyond(Newest):
    """Gives rows that are not there."""

    def choose(
        self, num_rows: int, count: int, generator: np.random.Generator, column: ReadColumn
    ) -> npt.NDArray[np.int64]:
        return num_rows + np.arange(count)


class Greedy(Objective):
    """Says that it needs all that an objective can need; it is never trained."""

    class Options(BaseObjectiveSettings):
        """No options, but needs."""

        needs_experts: ClassVar[bool] = False
        needs_rollouts: ClassVar[bool] = True
        needs_rollouts_as_sampled: ClassVar[bool] = True
        needs_reward: ClassVar[bool] = True
        needs_features: ClassVar[tuple[str, ...]] = ("brief",)
