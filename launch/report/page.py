"""The report of a run as a page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import log

from launch.report import formatting, wording
from launch.report.charts import OTHERS
from launch.report.document import axis_position, render_document
from launch.report.evaluation import GROUPS, change_outcome
from launch.report.gather import Report
from launch.report.page_data import MAX_ACTORS, actor_indices, chart_id, page_data, thinned
from launch.report.rollouts import Rollout

SHOWN_EXAMPLES = 4
SHOWN_PUSHES = 300
PROBABILITY_BOUNDS = (0.01, 0.1, 0.5, 0.9)
"""Between the five colours of deleted tokens; the script has the same ones."""

_SCRIPTS = ("charts.js", "rollouts.js")


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that look the same. classes: of CSS."""

    text: str
    classes: str


def render(report: Report) -> str:
    """The page."""
    timeline, rollouts = report.timeline, report.rollouts
    pushes = timeline.pushes if timeline else []
    shown = rollouts.rollouts if rollouts else ()
    actors = actor_indices(timeline) if timeline else []
    drawn = wording.drawn_actors(len(actors), min(len(actors), MAX_ACTORS))
    return render_document(
        "launch.report",
        "report.html.j2",
        _SCRIPTS,
        report=report,
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
        axis=lambda span: partial(axis_position, *span),
        chart_id=chart_id,
        outcome=lambda cell, measure: change_outcome(cell.change, measure.info) or "",
        pieces=pieces,
        taken=wording.taken,
        unit=wording.chart_unit,
        versions=wording.versions,
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
