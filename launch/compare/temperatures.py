"""Numbers of an evaluation over the sampling temperature, as curves of the objectives.

A policy that is merely sharper scores like one that is sampled at a lower temperature. Compared with the others at
every temperature, and by what it loses in diversity, it does not pass for a better one.
"""

from __future__ import annotations

from collections.abc import Sequence

from launch.compare.results import ComparedMetric
from launch.report.evaluation import METRICS, MetricInfo
from launch.report.plots import COLORS, Plot, Series
from launch.settings.decodings import SAMPLED
from launch.statistics import Spread

_PREFIX = "temperature="
_OVER_TEMPERATURE = ("accuracy", "mauve", "diversity", "self_bleu", "backspace_rate", "rewritten_rate")
_QUALITY, _DIVERSITY = "mauve", "diversity"

_Curves = dict[str, dict[float, Spread]]
"""Objective -> temperature -> number."""


def temperature_plots(objectives: Sequence[str], metrics: Sequence[ComparedMetric]) -> list[Plot]:
    """A plot for each number that was measured at two temperatures or more, and MAUVE against diversity."""
    curves: dict[str, _Curves] = {}
    for metric in metrics:
        temperature = temperature_of(metric.group)
        if temperature is not None:
            for label, spread in metric.spreads.items():
                curves.setdefault(metric.metric, {}).setdefault(label, {})[temperature] = spread
    curves = {name: found for name, found in curves.items() if any(len(each) > 1 for each in found.values())}
    plots = []
    for name in _OVER_TEMPERATURE:
        if name in curves:
            info = METRICS[name]
            points = {label: sorted(found.items(), key=lambda point: point[0]) for label, found in curves[name].items()}
            title, caption = f"{info.title} over temperature", "Bands: one standard error."
            plots.append(Plot(title, _unit(info), caption, "temperature", _series(objectives, points, info)))
    if _QUALITY in curves and _DIVERSITY in curves:
        info, across = METRICS[_QUALITY], METRICS[_DIVERSITY]
        points = {
            label: [(_scaled(diversity[at].mean, across), quality[at]) for at in sorted({*quality} & {*diversity})]
            for label, quality in curves[_QUALITY].items()
            if (diversity := curves[_DIVERSITY].get(label))
        }
        caption = (
            "A point for each temperature, joined in their order. Higher at the same diversity is better; further "
            "along the same curve is only sharper."
        )
        title = f"{info.title} against diversity"
        plots.append(Plot(title, _unit(info), caption, "diversity %", _series(objectives, points, info)))
    return plots


def temperature_of(group: str) -> float | None:
    """At which a group of rollouts was sampled; None of greedy and other ones, and of those with the ban changed."""
    if group == SAMPLED:
        return 1.0
    return float(group.removeprefix(_PREFIX)) if group.startswith(_PREFIX) and "," not in group else None


def _series(
    objectives: Sequence[str], points: dict[str, list[tuple[float, Spread]]], info: MetricInfo
) -> tuple[Series, ...]:
    """points: by objective, (x, number)."""
    series = []
    for index, label in enumerate(objectives):
        if found := points.get(label):
            ends = [(spread.mean, spread.standard_error or 0.0) for _, spread in found]
            series.append(
                Series(
                    name=label,
                    x=[x for x, _ in found],
                    y=[_scaled(mean, info) for mean, _ in ends],
                    low=[_scaled(mean - error, info) for mean, error in ends],
                    high=[_scaled(mean + error, info) for mean, error in ends],
                    color=index,
                    dash=index // COLORS,
                )
            )
    return tuple(series)


def _unit(info: MetricInfo) -> str:
    return "%" if info.is_share else ""


def _scaled(value: float, info: MetricInfo) -> float:
    return 100 * value if info.is_share else value
