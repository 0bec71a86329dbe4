"""A page as one HTML file: a template with the style and the scripts of `assets/`, and nothing that is loaded from
elsewhere.

Everything that a model or a data set wrote is escaped by the template (Jinja's autoescape; `tojson` for the script's
data), and the page's own policy lets only the inlined assets run, known by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources

import jinja2
from markupsafe import Markup

from launch.report import formatting

_STYLE = "report.css"
_AXIS_LEFT, _AXIS_RIGHT = 4.0, 148.0  # of the drawing of an interval, in the units of its view box


def render_document(package: str, template: str, scripts: Sequence[str], **names: object) -> str:
    """The page.

    package: whose folder `assets` has the template; the style, the scripts and `parts.html.j2` are the report's.
    names: what the template asks for, besides `style`, `script` and `policy`. A template draws a
        `launch.report.plots.Plot` with the macro `figure`, and an interval with `position` on its axis.
    """
    style, script = _asset(_STYLE), "\n".join(map(_asset, scripts))
    return (
        _environment(package)
        .get_template(template)
        .render(
            style=Markup(style),  # ours, and under a hash
            script=Markup(script),
            policy=_policy(style, script),
            **names,
        )
    )


def axis_position(value: float, span: tuple[float, float]) -> float:
    """Where a value lies in the drawing of an interval; beyond the ends of its axis, at the nearer one."""
    low, high = span
    fraction = min(1.0, max(0.0, (value - low) / (high - low)))
    return round(_AXIS_LEFT + fraction * (_AXIS_RIGHT - _AXIS_LEFT), 2)


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
    environment.filters |= {
        "number": formatting.number,
        "measured": formatting.measured,
        "interval": formatting.interval_ends,
        "change": formatting.change,
        "duration": formatting.duration,
        "moment": formatting.moment,
        "position": axis_position,
    }
    return environment


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Content security policy that admits nothing but this style and this script."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
