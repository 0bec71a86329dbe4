"""Settings of the objectives that learn from scored rollouts alone, by the score function."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from buffer.settings import Settings


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
