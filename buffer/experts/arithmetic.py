"""Questions of `add_or_sub_in_base` (mathematics-dataset), narrowed to the settings, every answer recomputed.

The generator draws bases 2-16 and signed operands of widely differing size from the global `random`.
Rejecting what the settings do not ask for would keep about one question in a thousand. So the two modules
involved get a private random source while questions are drawn, one that only makes draws the settings allow.
Templates, arithmetic and the spelling of numbers remain the generator's own, and the global random state is
never touched.
"""

from __future__ import annotations

import importlib
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from buffer.settings import ArithmeticTaskSettings

DIGITS = "0123456789abcdef"
ALPHABET = "".join(sorted(set(DIGITS + "In base 16, what is 1 + 2? -")))
"""Characters of all questions and answers, whatever the settings: models of different recipes share a
tokenizer.
"""

_QUESTION = re.compile(r"In base (\d+), what is (-?[0-9a-f]+) ([+-]) (-?[0-9a-f]+)\?")
_GENERATOR_BASES = (2, 16)
_MAX_DRAWS_PER_QUESTION = 50


@dataclass(frozen=True)
class Question:
    """One verified question. base: the number base of operands and answer."""

    question: str
    answer: str
    base: int


class _Problem(Protocol):
    question: object
    answer: object


def count_questions(settings: ArithmeticTaskSettings) -> int:
    """Number of different questions the settings allow: two operations on pairs of operands, per base."""
    return sum(2 * base ** (2 * settings.max_digits) for base in settings.bases)


def generate_questions(settings: ArithmeticTaskSettings) -> list[Question]:
    """`train_questions + held_out_questions` different questions in a random order fixed by the seed.

    Operands are uniform over 0 .. base^max_digits - 1; bases and the two operations are equally likely.

    Raises:
        ValueError: the settings allow too few different questions.
        ImportError: mathematics-dataset is not installed, or does not behave as this module expects.
    """
    wanted = settings.train_questions + settings.held_out_questions
    possible = count_questions(settings)
    if wanted > 0.9 * possible:
        raise ValueError(
            f"arithmetic: {wanted} questions asked for, but bases {list(settings.bases)} with at most "
            f"{settings.max_digits} digits give {possible} different ones (90 % of them can be used); "
            "raise max_digits, add bases or lower train_questions / held_out_questions"
        )
    draw_problem, modules = _import_generator()
    found: dict[str, Question] = {}
    source = _NarrowedRandom(settings.seed)
    with _random_source(modules, source):
        for _ in range(_MAX_DRAWS_PER_QUESTION * wanted):
            if len(found) == wanted:
                break
            source.base = source.choice(settings.bases)
            source.largest_operand = source.base**settings.max_digits - 1
            problem = draw_problem(_SampleArgs(source.largest_operand))
            question = verify(str(problem.question), str(problem.answer))
            if _allowed(question, settings):
                found.setdefault(question.question, question)
    if len(found) < wanted:
        raise ImportError(
            f"the generator of mathematics-dataset gave {len(found)} of {wanted} questions that fit the "
            "settings; install the tested version: pip install --no-deps mathematics-dataset==1.0.1"
        )
    return list(found.values())


def verify(question: str, answer: str) -> Question:
    """Recompute the answer of a question from its text.

    Raises:
        ValueError: the text is not a question of this task, or the answer is wrong.
    """
    match = _QUESTION.fullmatch(question)
    if match is None:
        raise ValueError(f"not a question of add_or_sub_in_base: {question!r}")
    base = int(match[1])
    left, right = int(match[2], base), int(match[4], base)
    expected = left + right if match[3] == "+" else left - right
    if int(answer, base) != expected:
        raise ValueError(f"{question!r}: the generator answers {answer!r}, which is not {expected} in base {base}")
    return Question(question, answer, base)


def _allowed(question: Question, settings: ArithmeticTaskSettings) -> bool:
    match = _QUESTION.fullmatch(question.question)
    assert match is not None, "verified before"
    operands = (match[2], match[4])
    return question.base in settings.bases and all(
        not operand.startswith("-") and len(operand) <= settings.max_digits for operand in operands
    )


class _NarrowedRandom(random.Random):
    """The generator's random source: makes the draws that the settings allow, and no other."""

    base = 10
    largest_operand = 99

    def randint(self, a: int, b: int) -> int:
        if (a, b) == _GENERATOR_BASES:
            return self.base
        # The only other integers drawn are the operands, from a range around zero.
        return super().randint(0, min(b, self.largest_operand))

    def uniform(self, a: float, b: float) -> float:
        # The share of the first operand in the size of both: half each.
        return (a + b) / 2


@dataclass(frozen=True)
class _SampleArgs:
    """Stands for the generator's sample arguments: asks for operands up to `largest_operand`."""

    largest_operand: int

    def peel(self) -> tuple[float, _SampleArgs]:
        # An operand is drawn from +-10^(entropy / 2) / 2, rounded up; entropy is that of both operands.
        return 2 * math.log10(2 * self.largest_operand), self


@contextmanager
def _random_source(modules: tuple[ModuleType, ...], source: random.Random) -> Iterator[None]:
    originals = [module.random for module in modules]
    try:
        for module in modules:
            module.random = source  # type: ignore[attr-defined]
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.random = original  # type: ignore[attr-defined]


def _import_generator() -> tuple[Callable[[_SampleArgs], _Problem], tuple[ModuleType, ...]]:
    try:
        # The generator looks for a function where sympy kept it before 1.5.
        package = importlib.import_module("sympy.solvers.diophantine")
        moved = importlib.import_module("sympy.solvers.diophantine.diophantine")
        if not hasattr(package, "base_solution_linear"):
            package.base_solution_linear = moved.base_solution_linear  # type: ignore[attr-defined]
        arithmetic = importlib.import_module("mathematics_dataset.modules.arithmetic")
        number = importlib.import_module("mathematics_dataset.sample.number")
    except ImportError as error:
        raise ImportError(
            f"the arithmetic task needs the generator mathematics-dataset ({error}); install it with: "
            "pip install sympy absl-py six && pip install --no-deps mathematics-dataset==1.0.1"
        ) from error
    return arithmetic.add_or_sub_in_base, (arithmetic, number)
