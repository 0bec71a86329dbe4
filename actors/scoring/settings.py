"""What rollouts are scored by: a reward, and features for objectives that constrain them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from buffer.settings import LocalPath, Settings


class PatternSettings(Settings):
    """1 where a regular expression matches somewhere in the answer, else 0."""

    kind: Literal["pattern"]
    pattern: str = Field(min_length=1, description="regular expression, as of Python's `re`")
    ignore_case: bool = False

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return pattern


class WordSettings(Settings):
    """1 where the answer holds a word (or several in a row) that stands alone, else 0."""

    kind: Literal["word"]
    word: str = Field(min_length=1)
    ignore_case: bool = True


class ExactAnswerSettings(Settings):
    """1 where the answer is the right one and ended with `<eos>`, else 0; of tasks that have right answers."""

    kind: Literal["exact_answer"]


class LengthSettings(Settings):
    """Tokens of the answer, `<eos>` not counted; with bounds 1 where the length lies within them, else 0."""

    kind: Literal["length"]
    at_least: NonNegativeInt | None = None
    at_most: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _check(self) -> LengthSettings:
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"no length is at_least={self.at_least} and at_most={self.at_most}: swap them")
        return self


class ClassifierSettings(Settings):
    """What a Hugging Face sequence classifier says of the answer: the probability of a label, or its only output."""

    kind: Literal["classifier"]
    name: LocalPath = Field(min_length=1, description="Hugging Face name or folder of the classifier, as safetensors")
    revision: str | None = Field(None, description="branch, tag or commit on the Hugging Face hub")
    label: str | None = Field(
        None, description="whose probability counts; null = the model has one output, which counts as it is"
    )
    at_least: float | None = Field(None, description="1 where the number is not below this, else 0; null = the number")
    with_prompt: bool = Field(False, description="it reads the prompt and the answer, not the answer alone")
    batch_size: PositiveInt = Field(32, description="texts that it reads at a time")

    @model_validator(mode="after")
    def _check(self) -> ClassifierSettings:
        if self.label is not None and self.at_least is not None and not 0.0 < self.at_least <= 1.0:
            raise ValueError(f"at_least={self.at_least:g} is a bound on a probability: choose one in (0, 1]")
        return self


class FunctionSettings(Settings):
    """A function of your own, `score(prompts, answers)`: two lists of texts, to as many numbers.

    It runs in the rollout actors. So that no recipe of a stranger runs code unnoticed, its module has to be named
    outside of the recipe too (see `launch.settings.run`).
    """

    kind: Literal["function"]
    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="MODULE:NAME of a function that the actors can import"
    )


ScorerSettings = Annotated[
    PatternSettings | WordSettings | ExactAnswerSettings | LengthSettings | ClassifierSettings | FunctionSettings,
    Field(discriminator="kind"),
]


def title_of(name: str, settings: ScorerSettings) -> str:
    """How messages call a scorer: `reward (my_rewards:score)`. name: see `ScoringSettings.scorers`."""
    if isinstance(settings, FunctionSettings):
        return f"{name} ({settings.function})"
    if isinstance(settings, ClassifierSettings):
        return f"{name} (classifier {settings.name})"
    return f"{name} ({settings.kind})"


def is_binary(settings: ScorerSettings) -> bool | None:
    """Whether a scorer gives 0 or 1 alone; None where only its function knows."""
    if isinstance(settings, FunctionSettings):
        return None
    if isinstance(settings, ClassifierSettings):
        return settings.at_least is not None
    return not isinstance(settings, LengthSettings) or settings.at_least is not None or settings.at_most is not None


class ScoringSettings(Settings):
    """Numbers that every rollout is given before it is stored."""

    reward: ScorerSettings | None = Field(None, description="what reinforce and kl_control raise; null = none")
    features: dict[str, ScorerSettings] = Field({}, description="by name, for constraints")
    timeout_s: float = Field(
        60.0, gt=0.0, description="longest call of a scorer, for one batch of rollouts, before its actor is replaced"
    )

    @model_validator(mode="after")
    def _check(self) -> ScoringSettings:
        if not self.scorers and self.timeout_s != type(self).model_fields["timeout_s"].default:
            raise ValueError("timeout_s has no effect without a reward or features: leave it out")
        return self

    @property
    def scorers(self) -> dict[str, ScorerSettings]:
        """All of them, by a name for messages."""
        reward = {} if self.reward is None else {"reward": self.reward}
        return reward | {f"feature {name}": settings for name, settings in self.features.items()}
