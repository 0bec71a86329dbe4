"""What an evaluation generates and measures: a part of the recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from buffer.settings import Settings
from launch.settings.decodings import Decoding, check_decodings, parse_decoding

TEXTS_PER_CLUSTER = 10


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


class EvaluationSettings(Settings):
    """What is measured when training is done."""

    stages: tuple[str, ...] = Field(
        (), description="stages whose final checkpoints are compared; empty = the last stage"
    )
    examples: PositiveInt = Field(500, description="held-out examples, at most")
    shown_rollouts: NonNegativeInt = Field(8, description="rollouts printed with their deletions")
    decoding: tuple[str, ...] = Field(
        (),
        description="further ways to decode, beside those that are always measured: greedy, top_p=P, temperature=T, "
        "contrastive or contrastive=K:ALPHA; recovery=K: after K planted wrong tokens",
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
    def _check_mauve(self) -> EvaluationSettings:
        if self.mauve is not None and self.examples < self.mauve.required_texts:
            raise ValueError(
                f"evaluation.mauve with clusters={self.mauve.clusters} needs {self.mauve.required_texts} texts "
                f"({TEXTS_PER_CLUSTER} per cluster), and evaluation.examples={self.examples} are fewer: raise examples "
                f"to {self.mauve.required_texts}, or lower clusters to {max(2, self.examples // TEXTS_PER_CLUSTER)}"
            )
        return self

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """`decoding`, understood."""
        return tuple(parse_decoding(text) for text in self.decoding)
