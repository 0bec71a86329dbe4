"""A page as one HTML file: a template with the style and the script of `assets/`, which loads nothing from elsewhere.

Everything that a model or a data set wrote is escaped by the template (Jinja's autoescape; `tojson` for the script's
data), and the page's own policy lets only the inlined assets run, known by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import time
from functools import cache
from importlib import resources

import jinja2
from markupsafe import Markup

from launch.monitoring.live_view import clock
from launch.report.evaluation import MetricInfo
from launch.statistics import Interval

MINUS = "\N{MINUS SIGN}"


def render_document(package: str, template: str, script: str = "", **names: object) -> str:
    """The page.

    package: whose folder `assets` has the template; the style, the script and `parts.html.j2` are the report's.
    script: file name of the page's script, if it has one.
    names: what the template asks for, besides `style`, `script` and `policy`. A template shows a
        `launch.report.plots.Plot` with the macro `figure`.
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
    return f"{_bare(value, info)}\N{NO-BREAK SPACE}%" if info.is_share else number(value)


def interval_ends(interval: Interval, info: MetricInfo) -> str:
    """`83.1 to 88.4`; empty where there is no interval."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{_bare(interval.low, info)} to {_bare(interval.high, info)}"


def change(interval: Interval, info: MetricInfo) -> str:
    """A difference with its sign: `+75.6 points`."""
    sign = "+" if interval.value > 0 else MINUS if interval.value < 0 else "±"
    return f"{sign}{_bare(abs(interval.value), info)}{' points' if info.is_share else ''}"


def moment(seconds: float) -> str:
    """A time since 1970, in UTC: a page is read elsewhere than where it was made."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _bare(value: float, info: MetricInfo) -> str:
    return f"{100 * value:.1f}".replace("-", MINUS) if info.is_share else number(value)


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
