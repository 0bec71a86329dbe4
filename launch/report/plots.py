"""Plots of a page: lines, stairs and bars, drawn by matplotlib as SVG that takes its colors from the page's style.

The page's content policy forbids style attributes, so the drawing's styles become plain SVG attributes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from launch.report.formatting import MINUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Json: TypeAlias = str | int | float | bool | Sequence["Json"] | dict[str, "Json"] | None
Float64 = npt.NDArray[np.float64]

COLORS = 7
"""Colors of the page's style; a series beyond them has the first color again."""
MAX_POINTS = 200
"""Points of a series, at most; a plot is a few hundred pixels wide."""
LOG_RANGE = 100.0
"""A plot of positive lines whose largest value is more than so many times the smallest has a logarithmic axis."""

_SIZE = 340, 185
_LEFT, _RIGHT, _BOTTOM, _TOP = 46, 324, 24, 179  # of the axes, in the same units
_DASHES = ((), (5.0, 2.5), (1.2, 1.8), (6.0, 2.0, 1.2, 2.0))
_SMOOTHING = 25  # a smoothed line is a mean over this fraction of its points
_STEPS = (1, 2, 5, 10)  # between ticks, times a power of ten
_INK = "#123456"  # stands for the color of the surrounding element


@dataclass(frozen=True)
class Series:
    """x, y: [n] with NaN where nothing was measured; for stairs and bars x has the n + 1 edges of the values.

    low, high: [n] ends of a band, or empty. color, dash: indices. stage: of the run, which the reader can hide.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    color: int = 0
    dash: int = 0
    smooth: bool = False
    stage: str = ""


@dataclass(frozen=True)
class Plot:
    """unit: of the values. x_name: what the horizontal axis counts."""

    title: str
    unit: str
    caption: str
    x_name: str
    series: tuple[Series, ...]
    kind: Literal["lines", "stairs", "bars"] = "lines"

    @property
    def logarithmic(self) -> bool:
        """Whether a linear axis would squeeze most of the lines together at its bottom."""
        values = _finite(value for each in self.series for value in each.y)
        return self.kind == "lines" and len(values) > 0 and 0.0 < LOG_RANGE * values.min() < values.max()

    @property
    def legend(self) -> list[Series]:
        """One series for each name, where there are several."""
        names = {each.name: each for each in reversed(self.series)}
        return list(names.values())[::-1] if len(names) > 1 else []

    @property
    def readings(self) -> Json:
        """What the page's script shows of the point under the pointer."""
        left, right = _ends(value for each in self.series for value in each.x)
        return {
            "kind": self.kind,
            "name": self.x_name,
            "left": _LEFT / _SIZE[0],
            "right": _RIGHT / _SIZE[0],
            "from": left,
            "to": right,
            "series": [
                {
                    "name": each.name,
                    "color": each.color,
                    "stage": each.stage,
                    "x": _rounded(each.x, digits=7),
                    "y": _rounded(each.y),
                    "low": _rounded(each.low),
                    "high": _rounded(each.high),
                }
                for each in self.series
            ],
        }

    @property
    def svg(self) -> Markup:
        """The drawing."""
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        width, height = _SIZE
        with rc_context({"svg.fonttype": "none", "font.size": 11, "figure.dpi": 72, "path.simplify": False}):
            figure = Figure(figsize=(width / 72, height / 72), frameon=False)
            box = (_LEFT / width, _BOTTOM / height, (_RIGHT - _LEFT) / width, (_TOP - _BOTTOM) / height)
            self._draw(figure.add_axes(box))
            file = io.StringIO()
            figure.savefig(file, format="svg")
        return _as_part_of_page(file.getvalue())

    def _draw(self, axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

        axes.patch.set_visible(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(left=False, bottom=False)
        axes.grid(axis="y", color=_INK)
        bars = self.kind == "bars"
        for each in self.series:
            if self.kind == "lines":
                _draw_line(axes, each, self.logarithmic)
            else:
                classes = _classes(each, "bars" if bars else "curve")
                axes.stairs(each.y, each.x, fill=bars, baseline=0 if bars else None, color=_INK, gid=classes)
        left, right = _ends(value for each in self.series for value in each.x)
        axes.set_xlim(left, right)
        if self.logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=5))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            whole = self.kind == "stairs" and _are_whole(value for each in self.series for value in each.y)
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS, integer=whole))
        if bars:
            axes.set_ylim(bottom=0)
        else:
            axes.figure.text(0.0, (_BOTTOM - 5.0) / _SIZE[1], self.x_name, ha="left", va="top")
        whole = _are_whole(2 * value if bars else value for each in self.series for value in each.x)
        count, prune = 3 if right >= 1e5 else 5, None if bars else "lower"  # the axis' name stands at its left end
        axes.xaxis.set_major_locator(MaxNLocator(count, steps=_STEPS, integer=whole, prune=prune))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}".replace("-", MINUS)))


def thin(
    x: Float64, y: Float64, max_points: int = MAX_POINTS
) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, y, low and high of at most `max_points` buckets of consecutive points of `y` [n] at ascending `x` [n].

    x: the last of a bucket. y, low, high: mean and ends of its finite values, NaN where it has none; low and high are
    empty where each bucket has a single point.
    """
    if len(x) <= max_points:
        return x.tolist(), np.where(np.isfinite(y), y, np.nan).tolist(), [], []
    starts = np.linspace(0, len(x), max_points, endpoint=False).astype(np.int64)
    finite = np.isfinite(y)
    known = np.where(finite, y, np.nan)
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(finite, y, 0.0), starts)
    mean = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    lasts = np.append(starts[1:], len(x)) - 1
    low, high = np.fmin.reduceat(known, starts), np.fmax.reduceat(known, starts)
    return x[lasts].tolist(), mean.tolist(), low.tolist(), high.tolist()


def _draw_line(axes: Axes, series: Series, logarithmic: bool) -> None:
    x, y = np.asarray(series.x, dtype=np.float64), np.asarray(series.y, dtype=np.float64)
    if len(series.low):
        axes.fill_between(x, series.low, series.high, color=_INK, linewidth=0, gid=_classes(series, "band"))
    smoothed = _smooth(np.log(y) if logarithmic else y) if series.smooth and len(y) > 2 * _SMOOTHING else None
    if smoothed is not None:
        if not len(series.low):
            axes.plot(x, y, color=_INK, gid=_classes(series, "raw"))
        y = np.exp(smoothed) if logarithmic else smoothed
    marker = "o" if len(x) == 1 else None
    dashes = _DASHES[series.dash % len(_DASHES)]
    style = (0, dashes) if dashes else "-"
    axes.plot(x, y, marker=marker, linestyle=style, color=_INK, gid=_classes(series, "curve"))


def _smooth(values: Float64) -> Float64:
    """Mean of the finite values around each, as many on either side, so that a slope stays one; NaN stays NaN."""
    known, places = np.isfinite(values), np.arange(len(values))
    reach = np.minimum(len(values) // _SMOOTHING // 2, np.minimum(places, places[::-1]))
    sums, counts = (np.append(0.0, np.cumsum(each)) for each in (np.where(known, values, 0.0), known))
    ends, starts = places + reach + 1, places - reach
    means = (sums[ends] - sums[starts]) / np.maximum(counts[ends] - counts[starts], 1.0)
    return np.where(known, means, np.nan)


def _classes(series: Series, *names: str) -> str:
    return " ".join(["class:", f"s{series.color % COLORS} n{series.color}", *names])


def _as_part_of_page(svg: str) -> Markup:
    """The element alone, without styles, and with as many digits as pixels need."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|\n", " ", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    text = re.sub(r'\bid="class: ([^"]*)"', r'class="\1"', text)
    text = re.sub(r' id="(?:\w+_\d+|matplotlib[^"]*)"| transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r'style="([^"]*)"', _attributes, text)
    text = re.sub(r'\b(?:d|x|y)="[^"]*"', lambda found: re.sub(r"\d+\.\d+", _as_pixels, found[0]), text)
    return Markup(re.sub(r"\s+", " ", text).replace("> <", "><").replace(_INK, "currentColor"))


def _as_pixels(coordinate: re.Match[str]) -> str:
    return f"{float(coordinate[0]):.1f}".removesuffix(".0")


def _attributes(style: re.Match[str]) -> str:
    pairs = (declaration.split(": ", 1) for declaration in style[1].split("; "))
    return " ".join(f'{name}="{value}"' for name, value in pairs if not name.startswith("font"))


def _finite(values: Iterable[float]) -> Float64:
    array: Float64 = np.fromiter(values, dtype=np.float64)
    return np.compress(np.isfinite(array), array)


def _are_whole(values: Iterable[float]) -> bool:
    return all(float(value).is_integer() for value in values)


def _ends(values: Iterable[float]) -> tuple[float, float]:
    """Ends of a horizontal axis, never the same."""
    known = _finite(values)
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _rounded(values: Sequence[float], digits: int = 4) -> list[Json]:
    """None where nothing was measured, which JSON has no number for."""
    array = np.asarray(values, dtype=np.float64)
    pairs = zip(array.tolist(), np.isfinite(array).tolist(), strict=True)
    return [float(f"{value:.{digits}g}") if known else None for value, known in pairs]
