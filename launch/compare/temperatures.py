"""Numbers of an evaluation over the sampling temperature, as curves of the arms.

A policy that is merely sharper scores like one that is sampled colder. Held against the others at every temperature,
and by what it loses in diversity, it does not pass for a better one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.compare.results import ComparedMetric
from launch.report.evaluation import METRICS, MetricInfo
from launch.report.page_data import Json
from launch.settings.decodings import SAMPLED
from launch.statistics import Spread

COLORS = 7
"""Arms beyond these have the colours again, with another dash."""

_PREFIX = "temperature="
_OVER_TEMPERATURE = ("accuracy", "mauve", "diversity", "self_bleu", "backspace_rate", "rewritten_rate")
_QUALITY, _DIVERSITY = "mauve", "diversity"

_Curves = dict[str, dict[float, Spread]]
"""Arm -> temperature -> number."""


@dataclass(frozen=True)
class TemperatureChart:
    """A chart of the page. data: as the page's script takes it."""

    id: str
    title: str
    unit: str
    caption: str
    data: dict[str, Json]


def temperature_charts(arms: Sequence[str], metrics: Sequence[ComparedMetric]) -> list[TemperatureChart]:
    """One chart for each number that was measured at two temperatures or more; none where nothing was."""
    curves = _by_temperature(metrics)
    charts = [
        _chart(f"temperature-{name}", METRICS[name], curves[name], arms) for name in _OVER_TEMPERATURE if name in curves
    ]
    if _QUALITY in curves and _DIVERSITY in curves:
        charts.append(_trade_off(curves[_QUALITY], curves[_DIVERSITY], arms))
    return charts


def temperature_of(group: str) -> float | None:
    """At which a group of rollouts was sampled; None of greedy and other ones, and of those with the ban changed."""
    if group == SAMPLED:
        return 1.0
    if not group.startswith(_PREFIX) or "," in group:
        return None
    return float(group.removeprefix(_PREFIX))


def _by_temperature(metrics: Sequence[ComparedMetric]) -> dict[str, _Curves]:
    found: dict[str, _Curves] = {}
    for metric in metrics:
        group, _, name = metric.name.rpartition(".")
        temperature = temperature_of(group)
        if temperature is None or name not in METRICS:
            continue
        for arm, spread in metric.spreads.items():
            found.setdefault(name, {}).setdefault(arm, {})[temperature] = spread
    return {name: curves for name, curves in found.items() if any(len(each) > 1 for each in curves.values())}


def _chart(id_: str, info: MetricInfo, curves: _Curves, arms: Sequence[str]) -> TemperatureChart:
    series: list[Json] = []
    for index, arm in enumerate(arms):
        points = sorted(curves.get(arm, {}).items())
        if points:
            spreads = [spread for _, spread in points]
            series.append(_series(arm, index, [at for at, _ in points], spreads, info))
    title = f"{info.title} over temperature"
    return TemperatureChart(id_, title, _unit(info), "Bands: one standard error.", _data("temperature", info, series))


def _trade_off(quality: _Curves, diversity: _Curves, arms: Sequence[str]) -> TemperatureChart:
    """Each arm's temperatures as points of (diversity, quality)."""
    info, across = METRICS[_QUALITY], METRICS[_DIVERSITY]
    series: list[Json] = []
    for index, arm in enumerate(arms):
        of_quality, of_diversity = quality.get(arm, {}), diversity.get(arm, {})
        points = sorted((of_diversity[at].mean, of_quality[at]) for at in of_quality.keys() & of_diversity.keys())
        if points:
            spreads = [spread for _, spread in points]
            series.append(_series(arm, index, [_scaled(at, across) for at, _ in points], spreads, info))
    return TemperatureChart(
        "trade-off",
        f"{info.title} against diversity",
        _unit(info),
        "A point for each temperature, the coldest on the left. Higher at the same diversity is better; further along "
        "the same curve is only sharper.",
        _data("diversity %", info, series),
    )


def _series(arm: str, index: int, x: list[float], spreads: Sequence[Spread], info: MetricInfo) -> dict[str, Json]:
    ends = [(spread.mean, spread.standard_error or 0.0) for spread in spreads]
    return {
        "name": arm,
        "color": index,
        "dash": index // COLORS,
        "x": x,
        "y": [_scaled(mean, info) for mean, _ in ends],
        "low": [_scaled(mean - error, info) for mean, error in ends],
        "high": [_scaled(mean + error, info) for mean, error in ends],
    }


def _data(x_name: str, info: MetricInfo, series: list[Json]) -> dict[str, Json]:
    return {
        "kind": "lines",
        "x_name": x_name,
        "unit": _unit(info),
        "log": False,
        "zero": False,
        "series": series,
        "legend": [],
    }


def _unit(info: MetricInfo) -> str:
    return "%" if info.is_share else ""


def _scaled(value: float, info: MetricInfo) -> float:
    return float(f"{100 * value if info.is_share else value:.6g}")
