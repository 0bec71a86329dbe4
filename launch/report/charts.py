"""Which metrics are drawn together, and what a reader is told about them (names: docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.report.curves import Curve, StageRows

LOG_RANGE = 100.0
"""Positive curves whose largest value is more than so many times the smallest are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class ChartPlan:
    """metrics: name -> what it is called in the legend. unit: of all of them, empty for a plain number."""

    title: str
    unit: str
    caption: str
    metrics: dict[str, str]


@dataclass(frozen=True)
class Chart:
    """A plan with the curves that a run has for it; all metrics of a stage share its colour, and differ in dash."""

    plan: ChartPlan
    logarithmic: bool
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class ChartGroup:
    """Charts of one question."""

    title: str
    charts: tuple[Chart, ...]


_PLANS: dict[str, tuple[ChartPlan, ...]] = {
    "Is it learning?": (
        ChartPlan(
            "Loss",
            "nats per action",
            "What the optimizer lowers. Follow a stage against itself: objectives have different losses.",
            {"loss": "loss"},
        ),
        ChartPlan(
            "Parts of the loss",
            "nats per action",
            "Cloning pulls towards the data; the other part is the stage's own objective.",
            {
                "loss_behaviour_cloning": "cloning",
                "loss_sequencematch": "sequencematch",
                "loss_unlikelihood": "unlikelihood",
                "loss_earth_mover": "earth mover",
                "loss_score_function": "score function",
                "loss_discriminator": "discriminator",
            },
        ),
        ChartPlan(
            "Log-probability of actions",
            "nats",
            "Under the newest weights: of the data's actions, and of what the actors wrote.",
            {"log_prob_mean": "data", "log_prob_mean_model": "rollouts"},
        ),
        ChartPlan(
            "Reward of rollouts",
            "",
            "As the rollouts were drawn, and reweighted to the policy of now.",
            {"reward_mean": "drawn", "reward_policy_mean": "policy of now"},
        ),
    ),
    "Does it take tokens back?": (
        ChartPlan(
            "Backspace",
            "share of actions",
            "Falling to 0: it never deletes. Above 0.35: it deletes for the sake of deleting.",
            {
                "backspace_prob": "probability on data",
                "backspace_prob_model": "probability on rollouts",
                "backspace_rate": "share in rollouts",
            },
        ),
        ChartPlan(
            "Texts cut off by a limit",
            "share",
            "Logs that did not end by themselves; a rise with backspaces means loops.",
            {"truncated_share": "data", "truncated_share_model": "rollouts"},
        ),
    ),
    "Rewards and values": (
        ChartPlan(
            "Reward r = Q - gamma V'",
            "nats",
            "What the model implies an action is worth: it should be higher on data than on rollouts.",
            {"r_mean": "data", "r_mean_model": "rollouts"},
        ),
        ChartPlan(
            "Largest |r|",
            "nats",
            "A steady climb is the first sign of divergence.",
            {"r_max_abs": "data", "r_model_max_abs": "rollouts"},
        ),
        ChartPlan(
            "Value V",
            "nats",
            "Log-sum-exp of the logits. A level is harmless, a drift that does not end is not.",
            {
                "value_mean": "data",
                "value_mean_model": "rollouts",
                "value_eos_mean": "data, at the end",
                "value_eos_mean_model": "rollouts, at the end",
            },
        ),
        ChartPlan(
            "Actions beyond the bound of r",
            "share",
            "Beyond 2/alpha, which the mixture's optimum never exceeds.",
            {"r_share_beyond_bound": "data", "r_share_beyond_bound_model": "rollouts"},
        ),
    ),
    "Is the optimizer calm?": (
        ChartPlan(
            "Gradient norm", "", "Before clipping; spikes are clipped, a climb is not.", {"gradient_norm": "norm"}
        ),
        ChartPlan("Learning rate", "", "As scheduled.", {"learning_rate": "rate"}),
    ),
    "How far off-policy is the data?": (
        ChartPlan(
            "Staleness of drawn rollouts",
            "publications",
            "How many weight pushes old the rollouts of a step were.",
            {"staleness_mean": "mean", "staleness_p95": "95 %", "staleness_max": "largest"},
        ),
        ChartPlan(
            "Engine against learner",
            "nats",
            "Log-probabilities of the same actions: the engine's against the learner's, which has taken steps since "
            "the push.",
            {"log_prob_mismatch_mean": "mean", "log_prob_mismatch_max_abs": "largest size"},
        ),
    ),
    "How fast is it?": (
        ChartPlan(
            "Time per step",
            "s",
            "Waiting close to the whole step: the actors are the bottleneck.",
            {"step_s": "step", "data_wait_s": "of it waiting for data"},
        ),
        ChartPlan(
            "Learner throughput",
            "per second",
            "Actions trained on, and distinct states evaluated for them.",
            {"actions_per_s": "actions", "nodes_per_s": "states"},
        ),
    ),
}
OTHERS = "All other metrics"


def planned_metrics() -> list[str]:
    """Every metric that a plan names, in order."""
    return [metric for plans in _PLANS.values() for plan in plans for metric in plan.metrics]


def chart_groups(stages: Sequence[StageRows]) -> list[ChartGroup]:
    """The charts that have at least one curve; metrics that no plan names come last, one chart each."""
    groups = [
        ChartGroup(title, tuple(chart for plan in plans if (chart := _fill(plan, stages)).curves))
        for title, plans in _PLANS.items()
    ]
    planned = set(planned_metrics())
    others = sorted({metric for stage in stages for metric in stage.curves} - planned)
    plans = [ChartPlan(metric, "", "See docs/metrics.md.", {metric: metric}) for metric in others]
    groups.append(ChartGroup(OTHERS, tuple(_fill(plan, stages) for plan in plans)))
    return [group for group in groups if group.charts]


def _fill(plan: ChartPlan, stages: Sequence[StageRows]) -> Chart:
    curves = tuple(stage.curves[metric] for stage in stages for metric in plan.metrics if metric in stage.curves)
    return Chart(plan, _is_wide(curves), curves)


def _is_wide(curves: Sequence[Curve]) -> bool:
    """Whether a linear axis would squeeze most of the curves into a line at the bottom."""
    values = [value for curve in curves for value in curve.mean if value is not None]
    return bool(values) and min(values) > 0.0 and max(values) > LOG_RANGE * min(values)
