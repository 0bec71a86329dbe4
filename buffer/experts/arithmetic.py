"""Sums and differences in a number base, as `add_or_sub_in_base` of DeepMind's mathematics data set spells them
(Saxton et al. 2019, arXiv 1904.01557): `In base 2, what is 110 - 1011?` with the answer `-101`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from buffer.experts.noise import NoiseCandidates
from buffer.experts.tokenizer import prompt_prefix
from buffer.settings import ArithmeticTaskSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

DIGITS = "0123456789abcdef"
ALPHABET = "".join(sorted(set(DIGITS + "In base 16, what is 1 + 2? -")))
"""Characters of all questions and answers, whatever the settings: models of different recipes share a tokenizer."""


@dataclass(frozen=True)
class Question:
    """A question with its answer. base: of operands and answer."""

    question: str
    answer: str
    base: int


def generate_questions(settings: ArithmeticTaskSettings) -> list[Question]:
    """`train_questions + held_out_questions` different questions in a random order fixed by the seed: operands uniform
    over 0 .. base^max_digits - 1, bases and operations equally likely. ValueError where there are too few."""
    wanted = settings.train_questions + settings.held_out_questions
    possible = sum(2 * base ** (2 * settings.max_digits) for base in settings.bases)
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
        text = f"In base {base}, what is {_spell(left, base)} {sign} {_spell(right, base)}?"
        found.setdefault(text, Question(text, _spell(left + right if sign == "+" else left - right, base), base))
    return list(found.values())


def _spell(number: int, base: int) -> str:
    return np.base_repr(number, base).lower()


def question_examples(settings: ArithmeticTaskSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The questions, those to train on first. Raises as `generate_questions`."""
    questions = generate_questions(settings)
    bases = sorted(set(settings.bases))
    columns = {"question": [q.question for q in questions], "answer": [q.answer for q in questions]}
    return paired_examples(columns, [bases.index(q.base) for q in questions], tokenizer)


def paired_examples(
    columns: Mapping[str, Sequence[str]], noise_groups: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Examples of two columns of text, a prompt and its complete answer, with `prompt_ids`, `target_ids` and
    `noise_group`. Text that spells a special token stays text.
    """
    from datasets import Dataset, Features, List, Value

    prompts, answers = (
        tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for texts in columns.values()
    )
    prefix = prompt_prefix(tokenizer)
    tokenized = {
        "prompt_ids": [prefix + ids for ids in prompts],
        "target_ids": [[*ids, tokenizer.eos_token_id] for ids in answers],
        "noise_group": noise_groups,
    }
    ids = List(Value("int32"))
    texts = dict.fromkeys(columns, Value("string"))
    features = Features({**texts, "prompt_ids": ids, "target_ids": ids, "noise_group": Value("int32")})
    return Dataset.from_dict({**columns, **tokenized}, features=features)


def digit_candidates(settings: ArithmeticTaskSettings, tokenizer: PreTrainedTokenizerBase) -> NoiseCandidates:
    """The digits of each base, equally likely; ValueError where the tokenizer has no token for one."""
    bases = sorted(set(settings.bases))
    digits: list[int] = []
    for digit in DIGITS[: bases[-1]]:
        # Some tokenizers put a word-start token before the first character, so only the last id is looked at.
        digits.append(tokenizer(digit, add_special_tokens=False)["input_ids"][-1])
        if tokenizer.decode(digits[-1:]).strip() != digit:
            raise ValueError(
                f"the tokenizer has no token for the digit {digit!r}, so plausible wrong digits cannot be drawn; "
                "use a model that spells numbers digit by digit"
            )
    return NoiseCandidates.uniform([np.array(digits[:base], dtype=np.int32) for base in bases])


def answers_question(answer_text: str, example: Mapping[str, object]) -> bool:
    """Whether a text is the answer of an example."""
    return answer_text.strip() == example["answer"]
