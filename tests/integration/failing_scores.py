"""Scorers of a user's own that fail as those of users do; actors import them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

from actors.scoring import Answer


class LastDigitIsSmall:
    """1 where an answer ends with a digit below 5; nan for an empty one, and none at all for what is not a number."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [math.nan if not answer.text else float(int(answer.text[-1]) < 5) for answer in answers]


class AlwaysRaises:
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        raise RuntimeError("no connection to the judge")


class NeverReturns:
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        threading.Event().wait()
        return [0.0 for _ in answers]
