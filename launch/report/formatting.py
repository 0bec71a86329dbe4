"""Numbers, durations and intervals as the page writes them."""

from __future__ import annotations

import math
import time

from launch.report.evaluation import MetricInfo
from launch.statistics import Interval

MINUS = "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Three significant digits, thousands apart: `0.123`, `1,230`."""
    if value == 0.0 or not math.isfinite(value):
        return "0" if value == 0.0 else str(value)
    if abs(value) >= 100.0:
        text = f"{value:,.0f}"
    elif abs(value) >= 1e-4:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    else:
        text = f"{value:.2e}"
    return text.replace("-", MINUS)


def measured(value: float, info: MetricInfo) -> str:
    """A value of a metric: shares in per cent."""
    return share(value) if info.is_share else number(value)


def share(value: float) -> str:
    """`8.9 %`."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%".replace("-", MINUS)


def interval_ends(interval: Interval, info: MetricInfo) -> str:
    """`83.1 to 88.4`; empty where there is no interval."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{_bare(interval.low, info)} to {_bare(interval.high, info)}"


def change(interval: Interval, info: MetricInfo) -> str:
    """A difference with its sign: `+75.6 points`."""
    sign = "+" if interval.value > 0 else MINUS if interval.value < 0 else "±"
    size = abs(interval.value)
    return f"{sign}{100 * size:.1f} points" if info.is_share else f"{sign}{number(size)}"


def duration(seconds: float) -> str:
    """`12 s`, `3 min 26 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(seconds: float) -> str:
    """A time since 1970, in UTC: a page is read elsewhere than where it was made."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _bare(value: float, info: MetricInfo) -> str:
    return f"{100 * value:.1f}".replace("-", MINUS) if info.is_share else number(value)
