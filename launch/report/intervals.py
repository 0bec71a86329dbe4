"""95 % intervals of measured numbers and of their differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959964
"""97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Interval:
    """A number with the ends of its 95 % interval, which are None where nothing says how sure it is."""

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.low is not None and self.high is not None and (self.low > 0.0 or self.high < 0.0)


def normal_interval(value: float, standard_error: float | None) -> Interval:
    """value -+ 1.96 standard errors."""
    if standard_error is None:
        return Interval(value, None, None)
    return Interval(value, value - Z * standard_error, value + Z * standard_error)


def share_interval(share: float, count: int) -> Interval:
    """Wilson's score interval of a share of `count` > 0 cases: unlike the normal one it is not empty at 0 and 1."""
    spread = Z * Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def difference(first: Interval, second: Interval) -> Interval:
    """first - second, from the intervals of the two as independent numbers (MOVER: Zou and Donner, Statistics in
    Medicine 27, 2008; of two shares it is Newcombe's interval).
    """
    value = first.value - second.value
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Interval(value, None, None)
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - below, value + above)
