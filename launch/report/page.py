"""The report of a run as a page."""

from __future__ import annotations

import numpy as np

from launch.report import formatting
from launch.report.document import render_document
from launch.report.evaluation import GROUPS
from launch.report.gather import Report
from launch.report.metrics import OTHERS, metric_plots
from launch.report.plots import MAX_POINTS
from launch.report.timeline import MAX_ACTORS, timeline_plots
from launch.settings.recipe import to_yaml
from launch.settings.run import RunSettings
from learner.settings.model import PretrainedModelSettings

SHOWN_EXAMPLES = 4
SHOWN_PUSHES = 300
ALL_POINTS = 12_000
"""Of all lines of metrics together, as long as each has `MIN_POINTS`: what bounds the size of the page."""
MIN_POINTS = 20


def render(report: Report) -> str:
    """The page."""
    timeline, sample = report.timeline, report.rollouts
    shown = sample.rollouts if sample else ()
    pushes = timeline.pushes if timeline else []
    evenly = np.linspace(0, len(pushes) - 1, min(len(pushes), SHOWN_PUSHES)).round().astype(int).tolist()
    badge, details = _state(report)
    names = [stage.name for stage in report.stages]
    starting = [stage.name for stage in report.starting_points]
    logged = [stage.metrics for stage in report.stages if stage.metrics]
    max_points = min(MAX_POINTS, max(MIN_POINTS, ALL_POINTS // max(1, sum(len(each.values) for each in logged))))
    return render_document(
        "launch.report",
        "report.html.j2",
        ("plots.js", "rollouts.js"),
        report=report,
        config=to_yaml(report.settings),
        badge=badge,
        state_details=details,
        model=_model(report.settings),
        task=_task(report.settings),
        noise=_noise(report.settings),
        rollouts=sample if shown else None,
        examples=sorted(shown, key=lambda rollout: (not rollout.takes_back, -rollout.created_at))[:SHOWN_EXAMPLES],
        deleting=formatting.share(sample.num_deleting / sample.num_stored) if sample and shown else "",
        has_noise=any(action.noise for rollout in shown for action in rollout.actions),
        rollout_data=[[rollout.prompt, [[*each, each.shade] for each in rollout.actions]] for rollout in shown],
        plots=metric_plots([each for each in logged if each.stage not in starting], names, max_points),
        starting_plots={
            each.stage: [plot for group in metric_plots([each], names, max_points).values() for plot in group]
            for each in logged
            if each.stage in starting
        },
        timeline_plots=timeline_plots(timeline) if timeline else [],
        pushes=pushes,
        shown_pushes=[pushes[index] for index in evenly],
        actors=timeline.actors[:MAX_ACTORS] if timeline else [],
        warnings=timeline.warnings if timeline else [],
        group_titles=GROUPS,
        others=OTHERS,
    )


def _state(report: Report) -> tuple[str, str]:
    """Whether the run is done, and what else is to say of it. A run without recent lines may be alive or dead."""
    timeline = report.timeline
    last = timeline.state if timeline else "open"
    if last == "finished" or report.is_complete:
        return "finished", ""
    if timeline and last == "failed":
        return "failed", timeline.cause
    if last == "stopped":
        return "stopped", f"Stopped on request. It goes on with: sequencematch train --resume {report.name}"
    silent = formatting.duration(max(0.0, report.made_at - report.last_at))
    return "open", f"Under way, or killed: its last line was written {silent} before this report."


def _model(settings: RunSettings) -> str:
    chosen = settings.model
    if not isinstance(chosen, PretrainedModelSettings):
        layers = "1 layer" if chosen.num_layers == 1 else f"{chosen.num_layers} layers"
        return f"{chosen.architecture}, {layers} of width {chosen.hidden_size}, from scratch"
    trained = "every weight trained" if chosen.adapter is None else "low-rank adapters trained"
    frozen = "" if chosen.quantization is None else f", frozen layers in {chosen.quantization}"
    return f"{chosen.name}, {trained}{frozen}"


def _task(settings: RunSettings) -> str:
    chosen = settings.task
    if chosen.name == "arithmetic":
        bases = ", ".join(map(str, chosen.bases))
        return f"arithmetic in base {bases}, up to {chosen.max_digits} digits, {chosen.train_questions:,} questions"
    source = ", ".join(chosen.files) or chosen.dataset
    return f"text of {source}: {chosen.prompt_tokens} tokens of prompt, {chosen.target_tokens} to continue"


def _noise(settings: RunSettings) -> str:
    """What is mixed into the expert's texts to be taken back."""
    chosen = settings.noise
    return "none" if chosen.kind == "none" else f"{chosen.kind}, at {formatting.share(chosen.rate)} of the positions"
