"""The report as one HTML file: template, style and script of `assets/`, and nothing that is loaded from elsewhere.

Everything that a model or a data set wrote is escaped by the template (Jinja's autoescape; `tojson` for the script's
data), and the page's own policy lets only the two inlined assets run, known by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from itertools import groupby
from math import log

import jinja2
from markupsafe import Markup

from launch.report import formatting, wording
from launch.report.charts import OTHERS
from launch.report.evaluation import GROUPS, change_outcome
from launch.report.gather import Report
from launch.report.page_data import MAX_ACTORS, actor_indices, chart_id, page_data, thinned
from launch.report.rollouts import Rollout

SHOWN_EXAMPLES = 4
SHOWN_PUSHES = 300
PROBABILITY_BOUNDS = (0.01, 0.1, 0.5, 0.9)
"""Between the five colours of deleted tokens; the script has the same ones."""

_SCRIPTS = ("charts.js", "rollouts.js")
_AXIS_LEFT, _AXIS_RIGHT = 4.0, 148.0  # of the drawing of an interval, in the units of its view box


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that look the same. classes: of CSS."""

    text: str
    classes: str


def render(report: Report) -> str:
    """The page."""
    style, script = _asset("report.css"), "\n".join(map(_asset, _SCRIPTS))
    timeline, rollouts = report.timeline, report.rollouts
    pushes = timeline.pushes if timeline else []
    shown = rollouts.rollouts if rollouts else ()
    actors = actor_indices(timeline) if timeline else []
    drawn = wording.drawn_actors(len(actors), min(len(actors), MAX_ACTORS))
    return _template().render(
        report=report,
        style=Markup(style),  # ours, and under a hash
        script=Markup(script),
        policy=_policy(style, script),
        data=page_data(report),
        state=wording.state(report),
        model=wording.model(report.settings),
        task=wording.task(report.settings),
        noise=wording.noise(report.settings),
        rollouts=rollouts if shown else None,
        examples=sorted(shown, key=lambda rollout: (not rollout.takes_back, -rollout.created_at))[:SHOWN_EXAMPLES],
        deleting_share=formatting.share(rollouts.num_deleting / rollouts.num_stored) if rollouts and shown else "",
        has_noise=any(action.noise for rollout in shown for action in rollout.actions),
        histograms=report.draws.histograms if report.draws else (),
        pushes=pushes,
        shown_pushes=thinned(pushes, SHOWN_PUSHES),
        push_caption=wording.pushes(timeline) + drawn if timeline else "",
        rates_caption=f"{wording.RATES}{drawn}",
        actors=actors[:MAX_ACTORS],
        has_rates=bool(timeline and timeline.rates),
        warnings=timeline.warnings if timeline else [],
        group_titles=GROUPS,
        others=OTHERS,
    )


def pieces(rollout: Rollout) -> list[Piece]:
    """The text of a rollout in the order in which it was written, deleted tokens included."""
    written = [
        (action.text, _classes(action.kept, action.noise, action.logprob)) for action in rollout.actions if action.text
    ]
    return [
        Piece("".join(text for text, _ in group), classes)
        for classes, group in groupby(written, key=lambda piece: piece[1])
    ]


def _classes(kept: bool, noise: bool, logprob: float) -> str:
    names = [] if kept else ["gone", f"p{sum(logprob > log(bound) for bound in PROBABILITY_BOUNDS)}"]
    return " ".join([*names, *(["noise"] if noise else [])])


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_asset),
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "number": formatting.number,
        "measured": formatting.measured,
        "interval": formatting.interval_ends,
        "change": formatting.change,
        "duration": formatting.duration,
        "moment": formatting.moment,
    }
    environment.globals |= {
        "axis": lambda span: partial(_axis, *span),
        "chart_id": chart_id,
        "outcome": lambda cell, measure: change_outcome(cell.change, measure.info) or "",
        "pieces": pieces,
        "taken": wording.taken,
        "unit": wording.chart_unit,
        "versions": wording.versions,
    }
    return environment.get_template("report.html.j2")


def _asset(name: str) -> str:
    return (resources.files("launch.report") / "assets" / name).read_text(encoding="utf-8")


def _axis(low: float, high: float, value: float) -> float:
    """Where a value lies in the drawing of an interval; beyond the ends of its axis, at the nearer one."""
    share = min(1.0, max(0.0, (value - low) / (high - low)))
    return round(_AXIS_LEFT + share * (_AXIS_RIGHT - _AXIS_LEFT), 2)


def _policy(style: str, script: str) -> str:
    """Content security policy that lets nothing in but this style and this script."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
