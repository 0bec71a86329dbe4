"""A run in a reader's words: what was trained on what, how it ended, how fast its weights travelled."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from launch.report import formatting
from launch.report.charts import Chart
from launch.report.gather import Report
from launch.report.rollouts import Rollout
from launch.report.timeline import Push, Timeline
from launch.settings.run import RunSettings
from learner.settings.model import PretrainedModelSettings

RATES = "Actions that each actor sampled per second, from one push of weights to the next; pauses and waits are in it."


@dataclass(frozen=True)
class State:
    """badge: a class of CSS. details: empty where the title says all."""

    badge: str
    title: str
    details: str


def state(report: Report) -> State:
    """Whether the run is done. A run that fell silent is not taken for a live one, nor for a dead one."""
    timeline = report.timeline
    last = timeline.state if timeline else "open"
    if last == "finished" or report.is_complete:
        return State("finished", "finished", "")
    if timeline and last == "failed":
        return State("failed", "failed", timeline.ended)
    if last == "stopped":
        return State("stopped", "stopped on request", f"It goes on with: sequencematch train --resume {report.name}")
    silent = formatting.duration(max(0.0, report.made_at - report.last_at))
    return State(
        "open", "not finished", f"Under way, or killed: its last sign of life was {silent} before this report."
    )


def model(settings: RunSettings) -> str:
    """The model in a line."""
    chosen = settings.model
    if not isinstance(chosen, PretrainedModelSettings):
        layers = "1 layer" if chosen.num_layers == 1 else f"{chosen.num_layers} layers"
        return f"{chosen.architecture}, {layers} of width {chosen.hidden_size}, from scratch"
    parts = [chosen.name]
    parts.append("every weight trained" if chosen.adapter is None else "low-rank adapters trained")
    if chosen.quantization is not None:
        parts.append(f"frozen layers in {chosen.quantization}")
    return ", ".join(parts)


def task(settings: RunSettings) -> str:
    """The task in a line."""
    chosen = settings.task
    if chosen.name == "arithmetic":
        bases = ", ".join(map(str, chosen.bases))
        return f"arithmetic in base {bases}, up to {chosen.max_digits} digits, {chosen.train_questions:,} questions"
    source = ", ".join(chosen.files) or chosen.dataset
    return f"text of {source}: {chosen.prompt_tokens} tokens of prompt, {chosen.target_tokens} to continue"


def noise(settings: RunSettings) -> str:
    """What is mixed into the expert's texts to be taken back."""
    chosen = settings.noise
    if chosen.kind == "none":
        return "none"
    return f"{chosen.kind}, at {100 * chosen.rate:g}\N{NO-BREAK SPACE}% of the positions"


def pushes(timeline: Timeline) -> str:
    """How long weights took from the learner to the actors; an actor's first weights, which it was born into, are not
    counted.
    """
    first: dict[int, int] = {}
    for push in timeline.pushes:
        for actor in push.taken_s:
            first.setdefault(actor, push.version)
    lags = [
        taken - push.published_s
        for push in timeline.pushes
        for actor, taken in push.taken_s.items()
        if push.published_s is not None and push.version > first[actor]
    ]
    text = f"{len(timeline.pushes):,} versions, as the driver saw them, a few times a second; drawn from the second on."
    if not lags:
        return text
    median, longest = (formatting.duration(max(0.0, lag)) for lag in (statistics.median(lags), max(lags)))
    return f"{text} From the learner's push until an actor had the weights: {median} (median), {longest} at most."


def drawn_actors(num_actors: int, num_drawn: int) -> str:
    """What is left out of charts of actors; empty where nothing is."""
    return f" Drawn are the first {num_drawn} of {num_actors:,} actors." if num_drawn < num_actors else ""


def taken(push: Push, actor: int) -> str:
    """When an actor had the weights of a push; a dash where it never had them."""
    at = push.taken_s.get(actor)
    if at is None:
        return "–"  # noqa: RUF001
    if push.published_s is None:
        return f"at {formatting.duration(at)}"
    return f"+{formatting.duration(max(0.0, at - push.published_s))}"


def versions(rollout: Rollout) -> str:
    """Versions of the weights behind a rollout's actions: `v3`, or `v3 to v5`."""
    seen = [action.version for action in rollout.actions]
    if not seen:
        return "no action"
    return f"v{min(seen)}" if min(seen) == max(seen) else f"v{min(seen)} to v{max(seen)}"


def chart_unit(chart: Chart) -> str:
    """Unit and scale."""
    return ", ".join(part for part in (chart.plan.unit, "log scale" if chart.logarithmic else "") if part)
