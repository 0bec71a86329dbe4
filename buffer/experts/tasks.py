"""Tasks: data sets with prompts, targets, noise candidates and, where possible, a check of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from buffer.custom import make_custom
from buffer.experts import arithmetic, text
from buffer.experts.noise import NoiseCandidates
from buffer.experts.ragged import Ragged
from buffer.experts.stream import ExpertStream
from buffer.experts.tokenizer import backspace_token_id, character_tokenizer, prompt_prefix, token_contract
from buffer.settings import CustomSettings, NoiseSettings, TaskSettings, TextTaskSettings
from buffer.trajectory.schema import TokenContract

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """A task, tokenized.

    train, held_out: columns `prompt_ids`, `target_ids` (int32 lists; a complete target ends in `<eos>`, a
        truncated one does not), `noise_group` (the row's group of noise candidates) and the task's own.
    task_noise: plausible wrong tokens. random_noise: every ordinary token, equally likely.
    is_correct: whether an answer's text is right for an example (a row of the data sets); None where nothing
        says so.
    """

    name: str
    train: Dataset
    held_out: Dataset
    tokenizer: PreTrainedTokenizerBase
    backspace_id: int
    eos_id: int
    task_noise: NoiseCandidates
    random_noise: NoiseCandidates
    is_correct: Callable[[str, Mapping[str, object]], bool] | None

    def contract(self, vocab_size: int | None = None, other_eos_ids: tuple[int, ...] = ()) -> TokenContract:
        """The contract of this task's trajectories for a model of `vocab_size` (default: the tokenizer's)."""
        return token_contract(self.tokenizer, self.backspace_id, vocab_size, other_eos_ids)

    def expert_stream(self, noise: NoiseSettings, contract: TokenContract, seed: int) -> ExpertStream:
        """Expert trajectories of the training examples; ValueError where the contract is of other tokens."""
        own = self.contract(contract.vocab_size, contract.other_eos_ids)
        if contract != own:
            raise ValueError(f"the run's contract {contract} is not that of the task's tokenizer, {own}")
        candidates = {"task": self.task_noise, "random": self.random_noise}.get(noise.kind)
        return ExpertStream(
            self.train, task=self.name, noise=noise, contract=contract, seed=seed, candidates=candidates
        )

    def held_out_examples(self, count: int, seed: int) -> Dataset:
        """At most `count` held-out examples. With one seed, fewer of them are the first of more."""
        examples = self.held_out.shuffle(seed=seed)
        return examples.select(range(min(count, len(examples))))

    def example_table(self) -> pa.Table:
        """`prompt_ids` and `target_ids` of the training examples: what rollout actors are given."""
        return self.train.select_columns(["prompt_ids", "target_ids"]).with_format("arrow")[:]


@runtime_checkable
class CustomTask(Protocol):
    """What the class of a custom task has to be. A method `is_correct(answer, example)` says whether a text answers an
    example, which is a mapping with `prompt` and `target`; without it no answer is right or wrong.
    """

    def examples(self) -> tuple[Sequence[tuple[str, str]], Sequence[tuple[str, str]]]:
        """(prompt, target) pairs of text, without special tokens: those to train on, and those held out. The same at
        every call, in every process.
        """


def load_task(
    settings: TaskSettings,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    backspace_id: int | None = None,
    max_length: int | None = None,
) -> Task:
    """Load and tokenize a task.

    tokenizer: the model's; None makes a character tokenizer (for models trained from scratch). backspace_id: the
    model's backspace action; not needed where the tokenizer has a `<backspace>` token. max_length: longest text (prompt
    and target) the model can take, in tokens; None = not checked.

    Raises:
        ValueError: the settings cannot be met (a class: see `buffer.custom`), or a text would not fit into
            `max_length`.
        ImportError: a package that the task needs is not installed.
    """
    if isinstance(settings, TextTaskSettings):
        # Checked before the tokenizing, which can take long: every full window has this length.
        prefix = 0 if tokenizer is None else len(prompt_prefix(tokenizer))
        length = prefix + settings.prompt_tokens + settings.target_tokens
        _check_length(length, max_length, f"a prompt and its target (prompt_tokens + target_tokens{' + bos' * prefix})")
        documents = text.load_documents(settings)
        tokenizer = character_tokenizer(set().union(*documents["text"])) if tokenizer is None else tokenizer
    elif isinstance(settings, CustomSettings):
        custom = make_custom(settings, CustomTask)  # type: ignore[type-abstract]
        pairs, num_train = _pairs_of(settings, custom)
        tokenizer = character_tokenizer(set().union(*(a + b for a, b in pairs))) if tokenizer is None else tokenizer
    elif tokenizer is None:
        tokenizer = character_tokenizer(arithmetic.ALPHABET)
    backspace_id = backspace_token_id(tokenizer) if backspace_id is None else backspace_id
    token_contract(tokenizer, backspace_id)  # says what the tokenizer lacks
    if isinstance(settings, TextTaskSettings):
        train, held_out = (
            text.cut_examples(part, settings, tokenizer, backspace_id)
            for part in text.split_documents(documents, settings)
        )
        if settings.max_examples is not None and settings.max_examples < len(train):
            train = train.shuffle(seed=settings.seed).select(range(settings.max_examples))
        task_noise, is_correct = text.unigram_candidates(train, tokenizer), None
    else:
        if isinstance(settings, CustomSettings):
            columns = {"prompt": [prompt for prompt, _ in pairs], "target": [target for _, target in pairs]}
            examples = arithmetic.paired_examples(columns, [0] * len(pairs), tokenizer)
        else:
            examples, num_train = arithmetic.question_examples(settings, tokenizer), settings.train_questions
        lengths = sum(
            Ragged.from_arrow(examples.with_format("arrow")[:].column(name)).lengths
            for name in ("prompt_ids", "target_ids")
        )
        _check_length(int(np.max(lengths)), max_length, "the longest question with its answer")
        train, held_out = examples.select(range(num_train)), examples.select(range(num_train, len(examples)))
        if isinstance(settings, CustomSettings):
            task_noise, is_correct = text.unigram_candidates(train, tokenizer), getattr(custom, "is_correct", None)
        else:
            task_noise, is_correct = arithmetic.digit_candidates(settings, tokenizer), arithmetic.answers_question
    special = {*tokenizer.all_special_ids, backspace_id}
    ordinary = sorted(set(tokenizer.get_vocab().values()) - special)
    return Task(
        name=settings.name,
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        backspace_id=backspace_id,
        eos_id=tokenizer.eos_token_id,
        task_noise=task_noise,
        random_noise=NoiseCandidates.uniform([np.array(ordinary, dtype=np.int32)]),
        is_correct=is_correct,
    )


def _pairs_of(settings: CustomSettings, custom: CustomTask) -> tuple[list[tuple[str, str]], int]:
    """The examples of a custom task, those to train on first, and how many those are."""
    train, held_out = custom.examples()
    if not (train and held_out):
        raise ValueError(
            f"{settings.path} gives {len(train)} examples to train on and {len(held_out)} that are held out: give at "
            "least one of each"
        )
    return [*train, *held_out], len(train)


def _check_length(length: int, max_length: int | None, what: str) -> None:
    if max_length is not None and length > max_length:
        raise ValueError(
            f"{what} takes {length} tokens, but the model takes {max_length} at most; "
            "shorten the task's texts or raise the model's maximum length"
        )
