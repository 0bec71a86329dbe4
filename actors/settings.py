"""Settings of the rollout actors, of how they sample, and of how their rollouts are scored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from buffer.settings import CustomSettings, LocalPath, Settings

VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this."""


class RolloutSettings(Settings):
    """How training rollouts are sampled."""

    temperature: float = Field(1.0, gt=0.0, description="sampling temperature of training rollouts")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    backspace: bool = Field(
        True, description="offer the backspace action; off: it is masked, in rollouts and where they are learned from"
    )
    max_new_tokens: PositiveInt = Field(64, description="longest answer, in tokens that remain")
    max_actions: PositiveInt = Field(
        128, description="most actions per rollout, backspaces and deleted tokens included"
    )


class AutoscaleSettings(Settings):
    """Actors are added while draws wait for rollouts, and leave while the limiter holds them back."""

    min: PositiveInt = Field(1, description="fewest actors")
    max: PositiveInt = Field(description="most actors")
    window_s: float = Field(
        30.0, gt=0.0, description="how long all actors have to be at work before their number is looked at"
    )
    grow_above: float = Field(
        0.2, gt=0.0, le=1.0, description="share of the time in which draws wait, from which on actors are added"
    )
    headroom: float = Field(
        0.2, ge=0.0, lt=1.0, description="share of the actors' time that may be idle before any of them leaves"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}: swap them")
        return self


class ActorsSettings(Settings):
    """The pool of rollout actors; each is one Ray actor that holds one vLLM engine."""

    count: NonNegativeInt = Field(
        1, description="actors at the start; `sequencematch scale` changes it while the run lives"
    )
    tensor_parallel_size: PositiveInt = Field(
        1,
        description="processes, all on one node, over which each engine's layers are divided: for models that do not "
        "fit on one GPU",
    )
    num_cpus: float = Field(1.0, gt=0.0, description="CPUs that Ray sets aside per actor (per process of its engine)")
    num_gpus: float = Field(0.0, ge=0.0, description="GPUs that Ray sets aside per actor (per process of its engine)")
    resources: dict[str, PositiveFloat] = Field(
        {},
        description="custom Ray resources per actor (per process of its engine): only nodes that were started with "
        "them take it",
    )
    placement: Literal["pack", "spread"] = Field(
        "pack",
        description="pack: on as few nodes as hold them, so that weights travel to few; spread: over as many as there "
        "are",
    )
    num_threads: PositiveInt = Field(1, description="CPU threads per engine; more than one only on idle cores")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("float32", description="engine's number format")
    weight_update: Literal["in_flight", "drain"] = Field(
        "in_flight",
        description="in_flight: new weights are loaded at once, rollouts under way go on with them, each action keeps "
        "its version; drain: rollouts under way are finished first, none are started meanwhile",
    )
    max_concurrent: PositiveInt = Field(64, description="rollouts an engine works on at a time")
    kv_cache_gib: float = Field(
        1.0, gt=0.0, description="memory of an engine's key-value cache on CPU, in GiB (per process)"
    )
    enforce_eager: bool = Field(True, description="skip compilation: starts in seconds, generates 15-35 % slower")
    insert_batch_size: PositiveInt = Field(64, description="finished trajectories per insert into the buffer")
    max_restarts: NonNegativeInt = Field(3, description="restarts of one actor in a row before the run gives up on it")
    start_timeout_s: float = Field(300.0, gt=0.0, description="longest wait for a new actor's engine")
    health_timeout_s: float = Field(60.0, gt=0.0, description="silence after which an actor is replaced")
    drain_timeout_s: float = Field(
        60.0, gt=0.0, description="longest wait for the unfinished rollouts of a leaving actor"
    )
    rollout: RolloutSettings = RolloutSettings()
    autoscale: AutoscaleSettings | None = Field(
        None, description="bounds within which the number of actors follows the learner's need; null = it stays"
    )

    @property
    def most(self) -> int:
        """Actors that there may be at a time, unless somebody asks for more by `sequencematch scale`."""
        return self.count if self.autoscale is None else self.autoscale.max

    def needs(self) -> dict[str, float]:
        """Amount of each Ray resource that one actor takes, for all processes of its engine."""
        each = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {kind: self.tensor_parallel_size * amount for kind, amount in each.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tensor_parallel_size > 1 and self.num_gpus % 1:
            raise ValueError(
                f"num_gpus={self.num_gpus:g} is a share of a GPU, of which each of the {self.tensor_parallel_size} "
                "processes (tensor_parallel_size) needs one of its own: set num_gpus=1, or tensor_parallel_size=1"
            )
        bounds = self.autoscale
        if bounds is not None and not bounds.min <= self.count <= bounds.max:
            raise ValueError(
                f"count={self.count} is not within autoscale.min={bounds.min} and autoscale.max={bounds.max}: change "
                "the one or the others"
            )
        return self


class PatternSettings(Settings):
    """1 where a regular expression matches somewhere in the answer, else 0."""

    name: Literal["pattern"]
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

    name: Literal["word"]
    word: str = Field(min_length=1)
    ignore_case: bool = True


class ExactAnswerSettings(Settings):
    """1 where the answer is the right one and ended with `<eos>`, else 0; of tasks that have right answers."""

    name: Literal["exact_answer"]


class LengthSettings(Settings):
    """Tokens of the answer, `<eos>` not counted; with bounds 1 where the length lies within them, else 0."""

    name: Literal["length"]
    at_least: NonNegativeInt | None = None
    at_most: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _check(self) -> LengthSettings:
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"no length is at_least={self.at_least} and at_most={self.at_most}: swap them")
        return self

    @property
    def has_bounds(self) -> bool:
        """Whether it gives 0 or 1, not the length itself."""
        return self.at_least is not None or self.at_most is not None


class ClassifierSettings(Settings):
    """What a Hugging Face sequence classifier says of the answer: the probability of a label, or its only output."""

    name: Literal["classifier"]
    model: LocalPath = Field(min_length=1, description="Hugging Face name or folder of the classifier, as safetensors")
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


ScorerSettings = Annotated[
    PatternSettings | WordSettings | ExactAnswerSettings | LengthSettings | ClassifierSettings | CustomSettings,
    Field(discriminator="name"),
]


def is_binary(settings: ScorerSettings) -> bool | None:
    """Whether a scorer gives 0 or 1 alone; None where only its class knows."""
    if isinstance(settings, CustomSettings):
        return None
    if isinstance(settings, ClassifierSettings):
        return settings.at_least is not None
    return not isinstance(settings, LengthSettings) or settings.has_bounds


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


def check_division(size: int, config: Mapping[str, object]) -> None:
    """Raise a ValueError where vLLM cannot divide this model over `size` ranks; it says which sizes are possible.

    config: the model's config.json; what it does not name is not checked.
    """
    reason = _indivisible(size, config)
    if reason is not None:
        heads = _number_of(config, "num_attention_heads", "n_head") or 1
        possible = [str(other) for other in range(1, heads + 1) if _indivisible(other, config) is None]
        raise ValueError(
            f"actors.tensor_parallel_size={size} does not divide the model's {reason}: choose one of "
            f"{', '.join(possible)}"
        )


def _indivisible(size: int, config: Mapping[str, object]) -> str | None:
    heads = _number_of(config, "num_attention_heads", "n_head")
    if heads is not None and heads % size:
        return f"{heads} attention heads"
    shared = _number_of(config, "num_key_value_heads")
    if shared is not None and (shared % size if shared >= size else size % shared):  # fewer heads are on several ranks
        return f"{shared} heads of keys and values"
    inner = _number_of(config, "intermediate_size")
    if inner is not None and inner % size:
        return f"intermediate size of {inner}"
    vocab = _number_of(config, "vocab_size")
    if vocab is not None and (padded := -(-vocab // VOCAB_PADDING) * VOCAB_PADDING) % size:
        return f"vocabulary, {padded} ids with vLLM's padding"
    return None


def _number_of(config: Mapping[str, object], *names: str) -> int | None:
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int)), None)
