"""Sums and differences in a number base, as `add_or_sub_in_base` of DeepMind's mathematics data set spells them
(Saxton et al. 2019, arXiv 1904.01557): `In base 2, what is 110 - 1011?` with the answer `-101`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from buffer.settings import ArithmeticTaskSettings

DIGITS = "0123456789abcdef"
ALPHABET = "".join(sorted(set(DIGITS + "In base 16, what is 1 + 2? -")))
"""Characters of all questions and answers, whatever the settings: models of different recipes share a tokenizer."""


@dataclass(frozen=True)
class Question:
    """A question with its answer. base: of operands and answer."""

    question: str
    answer: str
    base: int


def count_questions(settings: ArithmeticTaskSettings) -> int:
    """Number of different questions the settings allow: two operations on pairs of operands, per base."""
    return sum(2 * base ** (2 * settings.max_digits) for base in settings.bases)


def generate_questions(settings: ArithmeticTaskSettings) -> list[Question]:
    """`train_questions + held_out_questions` different questions in a random order fixed by the seed.

    Operands are uniform over 0 .. base^max_digits - 1; bases and the two operations are equally likely.

    Raises:
        ValueError: the settings allow too few different questions.
    """
    wanted = settings.train_questions + settings.held_out_questions
    possible = count_questions(settings)
    if wanted > 0.9 * possible:  # the last ones are found by ever more attempts
        raise ValueError(
            f"arithmetic: {wanted} questions asked for, but bases {list(settings.bases)} with at most "
            f"{settings.max_digits} digits give {possible} different ones (90 % of them can be used); "
            "raise max_digits, add bases or lower train_questions / held_out_questions"
        )
    source = random.Random(settings.seed)
    found: dict[str, Question] = {}
    while len(found) < wanted:
        base, sign = source.choice(settings.bases), source.choice("+-")
        left, right = (source.randrange(base**settings.max_digits) for _ in range(2))
        text = f"In base {base}, what is {spell(left, base)} {sign} {spell(right, base)}?"
        found.setdefault(text, Question(text, spell(left + right if sign == "+" else left - right, base), base))
    return list(found.values())


def spell(number: int, base: int) -> str:
    """A number in a base, a negative one with its sign."""
    return np.base_repr(number, base).lower()
