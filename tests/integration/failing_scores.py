"""A user's own scorer that fails as those of users do; actors import it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def last_digit_is_small(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 where an answer ends with a digit below 5; nan for an empty one, and none at all for what is not a number."""
    return [math.nan if not answer else float(int(answer[-1]) < 5) for answer in answers]
