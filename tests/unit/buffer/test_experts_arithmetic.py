"""Questions of the arithmetic task: right, different, uniform, and without a trace on the global random state."""

from __future__ import annotations

import random
import re

import numpy as np
import pydantic
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from buffer.experts.arithmetic import ALPHABET, generate_questions
from buffer.experts.tasks import load_task
from buffer.experts.tokenizer import character_tokenizer
from buffer.settings import ArithmeticTaskSettings

SMALL = ArithmeticTaskSettings(bases=(2, 7, 16), max_digits=3, train_questions=300, held_out_questions=100)


def test_questions_keep_to_the_settings() -> None:
    questions = generate_questions(SMALL)
    assert len({q.question for q in questions}) == 400
    assert {q.base for q in questions} == {2, 7, 16}
    assert {len(q.question) for q in questions} <= set(range(20, 32))
    for q in questions:
        match = re.fullmatch(r"In base (\d+), what is (\w+) ([+-]) (\w+)\?", q.question)
        assert match, "operands are not negative"
        base, left, sign, right = match.groups()
        assert max(len(left), len(right)) <= 3
        numbers = [int(text, int(base)) for text in (left, right, q.answer)]
        assert numbers[2] == (numbers[0] + numbers[1] if sign == "+" else numbers[0] - numbers[1])
    assert any(q.answer.startswith("-") for q in questions), "differences may be negative"
    assert set("".join(q.question + q.answer for q in questions)) <= set(ALPHABET)


def test_same_seed_same_questions_other_seed_others() -> None:
    assert generate_questions(SMALL) == generate_questions(SMALL)
    assert generate_questions(SMALL) != generate_questions(SMALL.model_copy(update={"seed": 1}))


def test_global_random_state_is_untouched_and_unused() -> None:
    random.seed(11)
    np.random.seed(11)
    expected = random.random(), np.random.random()
    random.seed(11)
    np.random.seed(11)
    questions = generate_questions(SMALL)
    assert (random.random(), np.random.random()) == expected
    random.seed(12)
    assert generate_questions(SMALL) == questions


def test_operands_are_uniform_and_operations_balanced() -> None:
    questions = generate_questions(ArithmeticTaskSettings(max_digits=3, train_questions=4000, held_out_questions=1))
    first = np.array([int(q.question.split()[5]) for q in questions])
    counts = np.histogram(first, bins=10, range=(0, 1000))[0]
    assert ((counts - len(first) / 10) ** 2 / (len(first) / 10)).sum() < 33.7  # chi-squared, 9 df: p = 1e-4
    plus = np.mean([" + " in q.question for q in questions])
    assert abs(plus - 0.5) < 5 * 0.5 / np.sqrt(len(questions))


def test_too_many_questions_for_the_settings_is_an_error_that_says_what_to_do() -> None:
    tiny = ArithmeticTaskSettings(bases=(2,), max_digits=1, train_questions=7, held_out_questions=1)
    with pytest.raises(ValueError, match=r"give 8 different ones .* raise max_digits"):
        generate_questions(tiny)
    # Close to all of them can still be had.
    assert len(generate_questions(tiny.model_copy(update={"train_questions": 6}))) == 7


@pytest.mark.parametrize("bases", [(), (1,), (10, 17)])
def test_bases_have_digits(bases: tuple[int, ...]) -> None:
    with pytest.raises(pydantic.ValidationError):
        ArithmeticTaskSettings(bases=bases)


def test_task_is_disjoint_and_complete() -> None:
    task = load_task(SMALL)
    assert (len(task.train), len(task.held_out)) == (300, 100)
    assert not set(task.train["question"]) & set(task.held_out["question"])
    for example in task.held_out.select(range(20)):
        assert task.tokenizer.decode(example["prompt_ids"]) == example["question"]
        assert example["target_ids"][-1] == task.eos_id
        answer = task.tokenizer.decode(example["target_ids"][:-1])
        assert answer == example["answer"]
        assert task.is_correct is not None
        assert task.is_correct(answer, example)
        assert not task.is_correct(answer + "0", example)
        base = int(example["question"].split()[2].rstrip(","))
        drawn = task.task_noise.sample(np.full(500, example["noise_group"]), np.random.default_rng(0))
        assert set(task.tokenizer.decode(drawn)) == set("0123456789abcdef"[:base])


def test_random_noise_is_every_ordinary_token() -> None:
    task = load_task(SMALL)
    drawn = task.random_noise.sample(np.zeros(5000, dtype=np.int64), np.random.default_rng(0))
    assert set(drawn.tolist()) == set(range(4, 4 + len(ALPHABET)))


def test_question_longer_than_the_context_is_an_error() -> None:
    longest = max(len(e["prompt_ids"]) + len(e["target_ids"]) for e in load_task(SMALL).train)
    load_task(SMALL, max_length=longest + 1)
    with pytest.raises(ValueError, match="the model takes 20 at most"):
        load_task(SMALL, max_length=20)


def test_given_tokenizer_and_backspace_id_are_used() -> None:
    tokenizer = character_tokenizer(ALPHABET + "x")
    assert load_task(SMALL, tokenizer, backspace_id=tokenizer.convert_tokens_to_ids("x")).backspace_id == 4 + (
        sorted(set(ALPHABET + "x")).index("x")
    )


def test_tokenizer_without_backspace_or_digits_is_refused() -> None:
    vocabulary = {"<unk>": 0, "<eos>": 1, **{c: i for i, c in enumerate(ALPHABET.replace("f", ""), start=2)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    with pytest.raises(ValueError, match="no <backspace> token; pass the backspace id"):
        load_task(SMALL, tokenizer)
    with pytest.raises(ValueError, match="no token for the digit 'f'"):
        load_task(SMALL, tokenizer, backspace_id=0)
