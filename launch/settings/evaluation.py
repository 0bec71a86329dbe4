"""What an evaluation generates and measures, a part of the recipe, with the ways to decode that it can ask for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from buffer.settings import Settings
from learner.settings.held_out import HeldOutSettings

TEXTS_PER_CLUSTER = 10

GREEDY, SAMPLED, RECOVERY, CONTRASTIVE = "greedy", "sampled", "recovery", "contrastive"

_KNOWN = "ancestral, greedy, top_p=0.95, temperature=0.7, contrastive, contrastive=5:0.6, recovery=2"


@dataclass(frozen=True)
class ContrastiveSearch:
    """num_candidates: k most likely tokens that are compared. penalty: alpha, the weight of the largest cosine
    similarity of a candidate's hidden state with those before it; 1 - alpha is that of its probability.
    """

    num_candidates: int = 5
    penalty: float = 0.6


@dataclass(frozen=True)
class Decoding:
    """How continuations are chosen. name: of the group of rollouts.

    temperature: 0 is greedy. contrastive: not sampled, but searched for. num_forced: wrong tokens that an
    answer, or a text, is made to begin with; texts are then sampled at temperature 1 in any case.
    """

    name: str
    temperature: float = 1.0
    top_p: float = 1.0
    contrastive: ContrastiveSearch | None = None
    num_forced: int = 0


def check_decodings(texts: Sequence[str]) -> None:
    """Raises ValueError where a name is not known (`parse_decoding`), or given twice."""
    names = [parse_decoding(text).name for text in texts]
    if len(set(names)) < len(names):
        raise ValueError(f"a decoding is named twice: {', '.join(texts)}")


def check_forced_prefix(decodings: Sequence[Decoding], max_new_tokens: int) -> None:
    """ValueError: wrong tokens are to be forced, and an answer is too short for them."""
    for decoding in decodings:
        if decoding.num_forced >= max_new_tokens:
            raise ValueError(
                f"decoding {decoding.name} leaves no room for an answer: plant fewer tokens than "
                f"actors.rollout.max_new_tokens={max_new_tokens}"
            )


def parse_decoding(text: str) -> Decoding:
    """A decoding from its name, such as `top_p=0.95`; ValueError if there is none, or its number is out of range."""
    plain = {
        "ancestral": Decoding(SAMPLED),
        GREEDY: Decoding(GREEDY, temperature=0.0),
        CONTRASTIVE: Decoding(CONTRASTIVE, temperature=0.0, contrastive=ContrastiveSearch()),
    }
    if text in plain:
        return plain[text]
    kind, _, value = text.partition("=")
    with suppress(ValueError):  # not a number: the message below says what is
        if kind == "top_p" and 0.0 < (top_p := float(value)) < 1.0:
            return Decoding(f"top_p={top_p:g}", top_p=top_p)
        if kind == "temperature" and 0.0 < (temperature := float(value)) <= 10.0 and temperature != 1.0:
            return Decoding(f"temperature={temperature:g}", temperature=temperature)
        if kind == RECOVERY and (num_forced := int(value)) >= 2:
            return Decoding(f"{RECOVERY}={num_forced}", temperature=0.0, num_forced=num_forced)
        if kind == CONTRASTIVE:
            candidates, _, penalty = value.partition(":")
            search = ContrastiveSearch(int(candidates), float(penalty))
            if search.num_candidates >= 2 and 0.0 <= search.penalty <= 1.0:
                name = f"{CONTRASTIVE}={search.num_candidates}:{search.penalty:g}"
                return Decoding(name, temperature=0.0, contrastive=search)
    raise ValueError(
        f"no decoding {text!r}: choose from {_KNOWN} (top_p between 0 and 1; temperature above 0 and other than 1, "
        "which is ancestral; contrastive=K:ALPHA with K from 2 on and ALPHA from 0 to 1; recovery=K with K from 2 on, "
        "since one forced token is always measured)"
    )


class MauveSettings(Settings):
    """MAUVE (Pillutla et al., arXiv 2102.01454): how close the generated texts are to the held-out ones."""

    features: Literal["encoder", "model"] = Field(
        "encoder",
        description="what a text is represented by: a packaged sentence encoder (all-MiniLM-L6-v2), or the last hidden "
        "state of the first checkpoint of the comparison",
    )
    clusters: int = Field(
        50, ge=2, description=f"k-means clusters; needs {TEXTS_PER_CLUSTER} texts of each kind per cluster"
    )

    @property
    def required_texts(self) -> int:
        """Texts of each kind that the clusters need."""
        return TEXTS_PER_CLUSTER * self.clusters


class EvaluationSettings(HeldOutSettings):
    """What is measured during training (the settings of `HeldOutSettings`, and `questions`), and when it is done."""

    questions: PositiveInt = Field(
        64, description="held-out prompts, at most, that an actor answers greedily each time during training"
    )
    stages: tuple[str, ...] = Field(
        (), description="stages whose final checkpoints are compared; empty = the last stage"
    )
    examples: PositiveInt = Field(500, description="held-out examples, at most")
    shown_rollouts: NonNegativeInt = Field(8, description="rollouts printed with their deletions")
    decoding: tuple[str, ...] = Field(
        (),
        description="further ways to decode, beside those that are always measured: greedy, top_p=P, temperature=T, "
        "contrastive or contrastive=K:ALPHA; recovery=K: after K forced wrong tokens",
    )
    ban_deleted: Literal["usual", "both"] = Field(
        "usual",
        description="whether a token that was taken back is banned at its text: usual = in greedy decoding only; "
        "both = every decoding with and without",
    )
    mauve: MauveSettings | None = Field(None, description="measure MAUVE of texts (needs the extra `mauve`)")

    @field_validator("decoding")
    @classmethod
    def _check_decoding(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        check_decodings(texts)
        return texts

    @model_validator(mode="after")
    def _check(self) -> EvaluationSettings:
        if self.every_steps is None:
            self._refuse_without_effect("every_steps=null", "questions")
        if self.mauve is not None and self.examples < self.mauve.required_texts:
            raise ValueError(
                f"evaluation.mauve with clusters={self.mauve.clusters} needs {self.mauve.required_texts} texts "
                f"({TEXTS_PER_CLUSTER} per cluster), and evaluation.examples={self.examples} are fewer: raise examples "
                f"to {self.mauve.required_texts}, or lower clusters to {max(2, self.examples // TEXTS_PER_CLUSTER)}"
            )
        return self

    @property
    def held_out(self) -> HeldOutSettings:
        """What the learner needs of it."""
        return HeldOutSettings.model_validate(self.model_dump(include=set(HeldOutSettings.model_fields)))

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """`decoding`, understood."""
        return tuple(parse_decoding(text) for text in self.decoding)
