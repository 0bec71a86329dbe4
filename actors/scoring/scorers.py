"""The scorers that a recipe can name: from a batch of answers to one number each."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.scoring.settings import (
    ClassifierSettings,
    ExactAnswerSettings,
    FunctionSettings,
    LengthSettings,
    PatternSettings,
    ScorerSettings,
    WordSettings,
)


@dataclass(frozen=True)
class Answer:
    """What a policy made of a prompt. text: what is left at the end, without `<eos>`; num_tokens: of it.

    reference: the answer that the data give to the prompt. ended: whether the answer ended with `<eos>`.
    """

    prompt: str
    text: str
    num_tokens: int
    reference: str
    ended: bool


Scorer = Callable[[Sequence[Answer]], Sequence[float] | npt.NDArray[np.floating]]
"""Gives one number for each answer."""


def make_scorer(settings: ScorerSettings) -> Scorer:
    """The scorer that `settings` describe.

    Raises:
        ValueError: a function of the user's own cannot be imported, or a classifier not loaded.
    """
    if isinstance(settings, PatternSettings):
        return _matches(settings.pattern, settings.ignore_case)
    if isinstance(settings, WordSettings):
        # Not \b: a word may begin or end with a character that is no letter.
        return _matches(rf"(?<!\w){re.escape(settings.word)}(?!\w)", settings.ignore_case)
    if isinstance(settings, ExactAnswerSettings):
        return _is_exact
    if isinstance(settings, LengthSettings):
        return _length(settings)
    if isinstance(settings, ClassifierSettings):
        # Here, not at the top: pool and driver import this module, and have no use for a model library.
        from actors.scoring.classifier import Classifier

        return Classifier(settings)
    return _function(settings)


def _matches(pattern: str, ignore_case: bool) -> Scorer:
    compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    return lambda answers: [float(compiled.search(answer.text) is not None) for answer in answers]


def _is_exact(answers: Sequence[Answer]) -> list[float]:
    return [float(answer.ended and answer.text.strip() == answer.reference.strip()) for answer in answers]


def _length(settings: LengthSettings) -> Scorer:
    if settings.at_least is None and settings.at_most is None:
        return lambda answers: [float(answer.num_tokens) for answer in answers]
    low = settings.at_least or 0
    high = np.inf if settings.at_most is None else settings.at_most
    return lambda answers: [float(low <= answer.num_tokens <= high) for answer in answers]


def _function(settings: FunctionSettings) -> Scorer:
    module, _, name = settings.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(
            f"function {settings.function} cannot be imported ({error}): install its module where the actors run, or "
            "put its folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"module {module} has no function {name}")
    return lambda answers: function([answer.prompt for answer in answers], [answer.text for answer in answers])
