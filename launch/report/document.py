"""What pages are made of: one HTML file that loads nothing, its numbers, and its plots.

Everything that a model or a data set wrote is escaped by the template (Jinja's autoescape; `tojson` for the script's
data), and the page's own policy lets only the inlined assets run, known by their hashes. Plots are SVG images by
matplotlib, which run no script.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import jinja2
import numpy as np
from markupsafe import Markup

from launch.monitoring.live_view import clock
from launch.report.evaluation import MetricInfo
from launch.statistics import Float64, Interval

MINUS = "\N{MINUS SIGN}"

MAX_POINTS = 150
"""Points of a series, at most; a plot is a few hundred pixels wide."""
LOG_RANGE = 100.0
"""A plot of positive values whose largest is more than so many times the smallest has a logarithmic axis."""

# Okabe and Ito's palette, darkened where it would be too faint on white.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b4558f", "#b87f00", "#3a9bd4", "#6b6e76")
COLORS = len(_PALETTE)
"""A series beyond them has the first color again."""
_DASHES = ("-", "--", ":", "-.")
_SIZE = 4.2, 2.3  # inches, without the legend
_AXES_HEIGHT, _LEGEND_ROW = 1.9, 0.19


def render_document(package: str, template: str, script: str = "", **names: object) -> str:
    """The page of a template in `assets` of a package; its style, script and `parts.html.j2` are the report's.

    script: file name, if there is one. names: what the template asks for, besides `style`, `script` and `policy`.
    """
    style, code = _asset("report.css"), _asset(script) if script else ""
    page = _environment(package).get_template(template)
    # Style and script are ours, and under a hash.
    return page.render(style=Markup(style), script=Markup(code), policy=_policy(style, code), **names)


def number(value: float) -> str:
    """Three significant digits, thousands apart: `0.123`, `1,230`."""
    if value == 0.0:
        return "0"
    return (f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}").replace("-", MINUS)


def measured(value: float, info: MetricInfo) -> str:
    """A value of a metric: shares in per cent, `8.9 %`."""
    return f"{_bare(value, info)}\N{NO-BREAK SPACE}%" if info.is_fraction else number(value)


def interval_ends(interval: Interval, info: MetricInfo) -> str:
    """`83.1 to 88.4`; empty where there is no interval."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{_bare(interval.low, info)} to {_bare(interval.high, info)}"


def change(interval: Interval, info: MetricInfo) -> str:
    """A difference with its sign: `+75.6 points`."""
    sign = "+" if interval.value > 0 else MINUS if interval.value < 0 else "±"
    return f"{sign}{_bare(abs(interval.value), info)}{' points' if info.is_fraction else ''}"


def moment(seconds: float) -> str:
    """A time since 1970, in UTC: a page is read elsewhere than where it was made."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _bare(value: float, info: MetricInfo) -> str:
    return f"{100 * value:.1f}".replace("-", MINUS) if info.is_fraction else number(value)


@cache
def _environment(package: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(each, "assets") for each in (package, __package__)]),
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {each.__name__: each for each in (number, measured, change, moment)}
    environment.filters |= {"interval": interval_ends, "duration": clock}
    return environment


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Content security policy that admits nothing but this style, this script and images that the page holds."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


@dataclass(frozen=True)
class Series:
    """x, y: [n] with NaN where nothing was measured. low, high: [n] ends of a band, or empty. color, dash: indices."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    color: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Plot:
    """unit: of the values. x_name: what the horizontal axis counts. is_stairs: a value holds until the next one."""

    title: str
    unit: str
    caption: str
    x_name: str
    series: tuple[Series, ...]
    is_stairs: bool = False

    @property
    def logarithmic(self) -> bool:
        """Whether a linear axis would squeeze most of the lines together at its bottom."""
        values = np.concatenate([np.asarray(each.y, dtype=np.float64) for each in self.series])
        values = values[np.isfinite(values)]
        return not self.is_stairs and len(values) > 0 and 0.0 < LOG_RANGE * values.min() < values.max()

    @property
    def image(self) -> str:
        """The drawing, as the address of an image that holds it."""
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

        columns = 2 if all(len(each.name) < 25 for each in self.series) else 1
        rows = -(-len(self.series) // columns) if len(self.series) > 1 else 0
        height = _SIZE[1] + rows * _LEGEND_ROW
        with rc_context({"svg.fonttype": "none", "font.size": 8.5}):
            figure = Figure(figsize=(_SIZE[0], height))
            box = (0.16, 1.0 - _AXES_HEIGHT / height, 0.82, (_AXES_HEIGHT - 0.06) / height)
            axes = figure.add_axes(box, xlabel=self.x_name, yscale="log" if self.logarithmic else "linear")
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            short = EngFormatter(sep="")  # 15k
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda at, _: short(at) if abs(at) >= 1e4 else f"{at:.4g}"))
            if self.is_stairs:
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            for each in self.series:
                color, dash = _PALETTE[each.color % COLORS], _DASHES[each.dash % len(_DASHES)]
                if len(each.low):
                    axes.fill_between(each.x, each.low, each.high, color=color, alpha=0.18, linewidth=0)
                (line,) = axes.plot(each.x, each.y, label=each.name, color=color, linestyle=dash)
                line.set_marker("o" if len(each.x) == 1 else "None")
                line.set_drawstyle("steps-post" if self.is_stairs else "default")
            if rows:
                figure.legend(loc="lower left", borderaxespad=0.0, ncols=columns, frameon=False)
            file = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        # As many digits as pixels need.
        svg = re.sub(r"\d+\.\d{2,}", lambda found: f"{float(found[0]):.4g}", re.sub(r"\s+", " ", file.getvalue()))
        return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def thin(
    x: Float64, y: Float64, max_points: int = MAX_POINTS
) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, y, low and high of at most `max_points` buckets of consecutive points of `y` [n] at ascending `x` [n].

    x: the last of a bucket. y, low, high: mean and ends of its finite values, NaN where it has none; low and high are
    empty where each bucket has a single point.
    """
    known = np.where(np.isfinite(y), y, np.nan)
    if len(x) <= max_points:
        return x.tolist(), known.tolist(), [], []
    starts = np.linspace(0, len(x), max_points, endpoint=False).astype(np.int64)
    counts = np.add.reduceat(np.isfinite(y).astype(np.float64), starts)
    sums = np.add.reduceat(np.nan_to_num(known), starts)
    mean = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    lasts = np.append(starts[1:], len(x)) - 1
    low, high = np.fmin.reduceat(known, starts), np.fmax.reduceat(known, starts)
    return x[lasts].tolist(), mean.tolist(), low.tolist(), high.tolist()
