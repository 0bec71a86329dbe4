"""Settings of the alarms: bounds on metrics that a run is watched by."""

from __future__ import annotations

from pydantic import Field

from buffer.settings import Settings


class WatchSettings(Settings):
    """Bounds beyond which a metric is an alarm: a line on the display, once a stage, and a metric of its own."""

    max_backspace_rate: float = Field(
        0.35,
        gt=0.0,
        lt=0.5,
        description="share of backspaces among the rollouts' actions; more than 0.5 there cannot be, since each takes "
        "back what was typed before. A policy beyond the bound types and deletes without end",
    )
    max_log_prob_mismatch: float = Field(
        2.0,
        gt=0.0,
        description="mean difference, in nats, between the log-probabilities stored with actions of the newest weights "
        "and the learner's own. The learner's steps since it published them make up to 3 of it (10 steps at learning "
        "rate 2e-3), until rollouts of new weights arrive; it is an alarm where it stays beyond the bound for two "
        "intervals of publish_every_steps: weights do not arrive, or an engine computes something else",
    )
    max_unsatisfied_share: float = Field(
        0.99,
        gt=0.0,
        lt=1.0,
        description="share of a step's rollouts that break a pointwise constraint (dpg, gdc, gdc_pp, f_dpg): from "
        "those alone nothing is learned",
    )
