"""The metrics of every step as plots: which are drawn together, and what a reader is told about them.

Names: docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from launch.errors import UserError
from launch.report.plots import Plot, Series, thin
from launch.run_folder.folder import METRICS_FILE

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

OTHERS = "All other metrics"

_KEYS = pa.schema([("time", pa.float64()), ("stage", pa.string()), ("step", pa.int64())])
_Plan = tuple[str, str, dict[str, str], str]
_PLANS: dict[str, list[_Plan]] = {  # title, unit, metrics with their names in the legend, caption
    "Is it learning?": [
        (
            "Loss",
            "nats per action",
            {"loss": "loss"},
            "What the optimizer lowers. Compare a stage with itself only: objectives have different losses.",
        ),
        (
            "Parts of the loss",
            "nats per action",
            {
                "loss_behaviour_cloning": "cloning",
                "loss_sequencematch": "sequencematch",
                "loss_unlikelihood": "unlikelihood",
                "loss_earth_mover": "earth mover",
                "loss_score_function": "score function",
                "loss_discriminator": "discriminator",
            },
            "Cloning pulls towards the data; the other part is the stage's own objective.",
        ),
        (
            "Log-probability of actions",
            "nats",
            {"log_prob_mean": "data", "log_prob_mean_model": "rollouts"},
            "Under the newest weights: of the data's actions, and of what the actors wrote.",
        ),
        (
            "Reward of rollouts",
            "",
            {"reward_mean": "sampled", "reward_policy_mean": "current policy"},
            "As the rollouts were sampled, and reweighted to the current policy.",
        ),
    ],
    "Does it take tokens back?": [
        (
            "Backspace",
            "fraction of actions",
            {
                "backspace_prob": "probability on data",
                "backspace_prob_model": "probability on rollouts",
                "backspace_rate": "fraction in rollouts",
            },
            "Falling to 0: it never deletes. Above 0.35: it deletes for the sake of deleting.",
        ),
        (
            "Texts cut off by a limit",
            "fraction",
            {"truncated_share": "data", "truncated_share_model": "rollouts"},
            "Texts that did not end by themselves; a rise with backspaces means loops.",
        ),
    ],
    "Rewards and values": [
        (
            "Reward r = Q - gamma V'",
            "nats",
            {"r_mean": "data", "r_mean_model": "rollouts"},
            "What the model implies an action is worth: it should be higher on data than on rollouts.",
        ),
        (
            "Largest |r|",
            "nats",
            {"r_max_abs": "data", "r_model_max_abs": "rollouts"},
            "A steady climb is the first sign of divergence.",
        ),
        (
            "Value V",
            "nats",
            {
                "value_mean": "data",
                "value_mean_model": "rollouts",
                "value_eos_mean": "data, at the end",
                "value_eos_mean_model": "rollouts, at the end",
            },
            "Log-sum-exp of the logits. A level is harmless, a drift that does not end is not.",
        ),
        (
            "Actions beyond the bound of r",
            "fraction",
            {"r_share_beyond_bound": "data", "r_share_beyond_bound_model": "rollouts"},
            "Beyond 2/alpha, which the mixture's optimum never exceeds.",
        ),
    ],
    "Is the optimizer calm?": [
        ("Gradient norm", "", {"gradient_norm": "norm"}, "Before clipping; spikes are clipped, a climb is not."),
        ("Learning rate", "", {"learning_rate": "rate"}, "As scheduled."),
    ],
    "How far off-policy is the data?": [
        (
            "Staleness of sampled rollouts",
            "publications",
            {"staleness_mean": "mean", "staleness_p95": "95 %", "staleness_max": "largest"},
            "How many weight pushes old the rollouts of a step were.",
        ),
        (
            "Engine against learner",
            "nats",
            {"log_prob_mismatch_mean": "mean", "log_prob_mismatch_max_abs": "largest size"},
            "Log-probabilities of the same actions: the engine's against those of the learner, which has taken steps "
            "since the push.",
        ),
    ],
    "How fast is it?": [
        (
            "Time per step",
            "s",
            {"step_s": "step", "data_wait_s": "of it waiting for data"},
            "Waiting close to the whole step: the actors are the bottleneck.",
        ),
        (
            "Learner throughput",
            "per second",
            {"actions_per_s": "actions", "nodes_per_s": "states"},
            "Actions trained on, and distinct states evaluated for them.",
        ),
    ],
}


@dataclass(frozen=True)
class StageMetrics:
    """The logged steps of one stage. steps: [n] ascending; times: [n] seconds since 1970. values: [n] by metric, NaN
    where a step has no finite value.
    """

    stage: str
    steps: Int64
    times: Float64
    values: dict[str, Float64]

    @property
    def busy_s(self) -> float:
        """The duration of all steps."""
        return float(np.nansum(self.values["step_s"])) if "step_s" in self.values else 0.0

    @property
    def final_loss(self) -> float | None:
        """Mean over the last tenth of the steps, because a single step is noisy; None without a finite value there."""
        losses = self.values.get("loss", np.empty(0))[-max(1, len(self.steps) // 10) :]
        return float(np.nanmean(losses)) if np.isfinite(losses).any() else None


def read_metrics(run: Path) -> list[StageMetrics]:
    """The stages of `metrics.jsonl` in the order in which they began; none where there is no line yet.

    Of two lines of one stage and step the later one counts (see `learner.metrics.log`). A run that is being written
    may end in a part of a line, which is left out.

    Raises:
        UserError: a complete line is no JSON object. OSError: the file cannot be read.
    """
    path = run / METRICS_FILE
    content = path.read_bytes() if path.is_file() else b""
    content = content[: content.rfind(b"\n") + 1]
    if not content:
        return []
    try:
        table = pa.json.read_json(pa.BufferReader(content), parse_options=pa.json.ParseOptions(explicit_schema=_KEYS))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return [_stage_metrics(table, stage) for stage in pc.unique(table.column("stage")).to_pylist()]


def metric_plots(stages: Sequence[StageMetrics], names: Sequence[str]) -> dict[str, list[Plot]]:
    """The plots with at least one line, by the question that they answer; those that no plan names come last.

    names: of all stages of the run: their order is that of the colors.
    """
    planned = {metric for plans in _PLANS.values() for _, _, metrics, _ in plans for metric in metrics}
    others = sorted({metric for stage in stages for metric in stage.values} - planned)
    plans = _PLANS | {OTHERS: [(name, "", {name: name}, "See docs/metrics.md.") for name in others]}
    groups = {title: [_plot(plan, stages, names) for plan in group] for title, group in plans.items()}
    return {title: drawn for title, plots in groups.items() if (drawn := [plot for plot in plots if plot.series])}


def planned_metrics() -> Collection[str]:
    """Every metric that a plan names, in order."""
    return [metric for plans in _PLANS.values() for _, _, metrics, _ in plans for metric in metrics]


def _plot(plan: _Plan, stages: Sequence[StageMetrics], names: Sequence[str]) -> Plot:
    title, unit, legend, caption = plan
    drawn = [metric for metric in legend if any(metric in stage.values for stage in stages)]
    series = []
    for stage in stages:
        for dash, metric in enumerate(drawn):
            if metric in stage.values and stage.stage in names:
                x, y, low, high = thin(stage.steps.astype(np.float64), stage.values[metric])
                color = names.index(stage.stage)
                series.append(Series(legend[metric], x, y, low, high, color, dash, smooth=True, stage=stage.stage))
    return Plot(title, unit, caption, "step", tuple(series))


def _stage_metrics(table: pa.Table, stage: str) -> StageMetrics:
    rows = table.filter(pc.equal(table.column("stage"), stage))
    logged = rows.column("step").to_numpy()
    steps, newest = np.unique(logged[::-1], return_index=True)
    rows = rows.take(len(logged) - 1 - newest)
    values = {
        name: rows.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
        for name in rows.column_names
        if name not in _KEYS.names and rows.column(name).null_count < len(rows)
    }
    values = {name: np.where(np.isfinite(column), column, np.nan) for name, column in values.items()}
    return StageMetrics(stage, steps, rows.column("time").to_numpy(), values)
