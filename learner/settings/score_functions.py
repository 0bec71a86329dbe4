"""Settings of the objectives that learn from scored rollouts alone, by the score function."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from buffer.settings import Settings

FDivergence = Literal["kl", "reverse_kl", "tv", "js", "chi2", "reverse_chi2"]

INFINITE_WHERE_FORBIDDEN = ("reverse_kl", "reverse_chi2")
"""Divergences that are infinite where the policy does what the target never does."""


class ScoreFunctionSettings(Settings):
    """What these objectives have in common."""

    name: str

    @property
    def needs_rollouts(self) -> bool:
        """They learn from nothing else."""
        return True

    @property
    def uses_noise(self) -> bool:
        """They take no expert logs."""
        return False

    @property
    def needs_base_model(self) -> bool:
        """Whether rollouts are compared with the policy as it was at the start of the stage."""
        return False

    @property
    def needs_reward(self) -> bool:
        """Whether `scoring.reward` has to be set."""
        return False


class ReinforceSettings(ScoreFunctionSettings):
    """Raise the mean reward of rollouts."""

    name: Literal["reinforce"]

    @property
    def needs_reward(self) -> bool:
        """It is all it goes by."""
        return True


class KlControlSettings(ScoreFunctionSettings):
    """Raise the mean reward, and stay near the policy that the stage started with."""

    name: Literal["kl_control"]
    beta: float = Field(default=0.1, gt=0.0, description="price of a nat of KL(policy || start), in units of reward")

    @property
    def needs_base_model(self) -> bool:
        """The policy stays near it."""
        return True

    @property
    def needs_reward(self) -> bool:
        """It is raised."""
        return True


class ConstraintSettings(Settings):
    """What is asked of a feature."""

    feature: str = Field(description="its name in scoring.features")
    target: float | None = Field(
        default=None, description="its mean over rollouts; null = it is 1 in every rollout (a pointwise constraint)"
    )


class TargetSettings(ScoreFunctionSettings):
    """Objectives whose target is the policy that the stage started with, changed no more than the constraints ask."""

    constraints: tuple[ConstraintSettings, ...] = Field(min_length=1)
    fit_samples: PositiveInt = Field(
        default=1024,
        description="distinct rollouts on which the weights of constraints with a target are fitted; until they are "
        "there, nothing moves",
    )

    @property
    def needs_base_model(self) -> bool:
        """The target is made of it."""
        return True

    @property
    def has_pointwise(self) -> bool:
        """Whether some rollouts are ruled out."""
        return any(each.target is None for each in self.constraints)

    @model_validator(mode="after")
    def _check_names(self) -> TargetSettings:
        names = [each.feature for each in self.constraints]
        if len(set(names)) < len(names):
            raise ValueError(f"constraints name a feature twice: {', '.join(names)}")
        return self


class DpgSettings(TargetSettings):
    """Distributional policy gradient (arXiv 1912.08517)."""

    name: Literal["dpg"]


class GdcSettings(TargetSettings):
    """Generation with distributional control (arXiv 2012.11635); `gdc_pp` with a baseline (arXiv 2206.00761)."""

    name: Literal["gdc", "gdc_pp"]
    proposal: Literal["kl_adaptive", "latest"] = Field(
        default="kl_adaptive",
        description="who makes the rollouts. `kl_adaptive`: the policy of now takes over only when it is nearer to the "
        "target, in KL(target || policy); `latest`: whenever it is published",
    )


class FDpgSettings(TargetSettings):
    """Any f-divergence from the target (arXiv 2302.08215)."""

    name: Literal["f_dpg"]
    divergence: FDivergence = Field(
        description="`kl`: KL(target || policy); `reverse_kl`: KL(policy || target); `tv`: total variation; `js`: "
        "Jensen-Shannon; `chi2`: chi2(target || policy); `reverse_chi2`: chi2(policy || target)"
    )

    @model_validator(mode="after")
    def _check_divergence(self) -> FDpgSettings:
        if self.has_pointwise and self.divergence in INFINITE_WHERE_FORBIDDEN:
            raise ValueError(
                f"divergence={self.divergence} is infinite while the policy breaks a pointwise constraint at all: "
                "choose kl, tv, js or chi2, or give the constraint a target below 1"
            )
        return self
