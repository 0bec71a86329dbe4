"""A user's own scorer that fails as those of users do; actors import it."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence


def last_digit_is_small(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 where an answer ends with a digit below 5; nan for an empty one, and none at all for what is not a number."""
    return [math.nan if not answer else float(int(answer[-1]) < 5) for answer in answers]


def always_raises(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    raise RuntimeError("no connection to the judge")


def never_returns(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    threading.Event().wait()
    return [0.0 for _ in answers]
