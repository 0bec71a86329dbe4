"""Tasks: data sets with prompts, targets, noise candidates and, where possible, a check of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from buffer.experts import text
from buffer.experts.arithmetic import ALPHABET, DIGITS, Question, generate_questions
from buffer.experts.documents import load_documents
from buffer.experts.noise import NoiseCandidates
from buffer.experts.ragged import Ragged
from buffer.experts.stream import ExpertStream
from buffer.experts.tokenizer import backspace_token_id, character_tokenizer, prompt_prefix, token_contract
from buffer.settings import ArithmeticTaskSettings, NoiseKind, NoiseSettings, TaskSettings, TextTaskSettings
from buffer.trajectory.schema import TokenContract

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """A task, tokenised.

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

    def noise_candidates(self, kind: NoiseKind) -> NoiseCandidates | None:
        """What noise of this kind is drawn from; None where nothing is (`none`) or the policy is (`policy`)."""
        return {"task": self.task_noise, "random": self.random_noise}.get(kind)

    def expert_stream(self, noise: NoiseSettings, contract: TokenContract, seed: int) -> ExpertStream:
        """Expert trajectories of the training examples.

        Raises:
            ValueError: the contract is of other tokens than the task's.
        """
        own = self.contract(contract.vocab_size, contract.other_eos_ids)
        if contract != own:
            raise ValueError(f"the run's contract {contract} is not that of the task's tokenizer, {own}")
        return ExpertStream(
            self.train,
            task=self.name,
            noise=noise,
            contract=contract,
            seed=seed,
            candidates=self.noise_candidates(noise.kind),
        )

    def example_table(self) -> pa.Table:
        """`prompt_ids` and `target_ids` of the training examples: what rollout actors are given."""
        return self.train.select_columns(["prompt_ids", "target_ids"]).with_format("arrow")[:]


def load_task(
    settings: TaskSettings,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    backspace_id: int | None = None,
    max_length: int | None = None,
) -> Task:
    """Load and tokenise a task.

    Args:
        settings: which task.
        tokenizer: the model's; None makes a character tokenizer (for models trained from scratch).
        backspace_id: the model's backspace action; not needed where the tokenizer has a `<backspace>` token.
        max_length: longest text (prompt and target) the model can take, in tokens; None = not checked.

    Raises:
        ValueError: the settings cannot be met, or a text would not fit into `max_length`.
        ImportError: a package that the task needs is not installed.
    """
    if isinstance(settings, TextTaskSettings):
        # Checked before the tokenising, which can take long: every full window has this length.
        prefix = 0 if tokenizer is None else len(prompt_prefix(tokenizer))
        length = prefix + settings.prompt_tokens + settings.target_tokens
        _check_length(length, max_length, f"a prompt and its target (prompt_tokens + target_tokens{' + bos' * prefix})")
        return _text_task(settings, tokenizer, backspace_id)
    task = _arithmetic_task(settings, tokenizer, backspace_id)
    for split in (task.train, task.held_out):
        columns = split.with_format("arrow")[:]
        lengths = sum(Ragged.from_arrow(columns.column(name)).lengths for name in ("prompt_ids", "target_ids"))
        _check_length(int(np.max(lengths)), max_length, "the longest question with its answer")
    return task


def _check_length(length: int, max_length: int | None, what: str) -> None:
    if max_length is not None and length > max_length:
        raise ValueError(
            f"{what} takes {length} tokens, but the model takes {max_length} at most; "
            "shorten the task's texts or raise the model's maximum length"
        )


def _arithmetic_task(
    settings: ArithmeticTaskSettings, tokenizer: PreTrainedTokenizerBase | None, backspace_id: int | None
) -> Task:
    questions = generate_questions(settings)
    tokenizer = character_tokenizer(ALPHABET) if tokenizer is None else tokenizer
    backspace_id = backspace_token_id(tokenizer) if backspace_id is None else backspace_id
    contract = token_contract(tokenizer, backspace_id)
    bases = sorted(set(settings.bases))
    examples = _question_examples(questions, tokenizer, contract.eos_id, bases)
    digits = np.array([_digit_id(tokenizer, digit) for digit in DIGITS[: max(bases)]], dtype=np.int32)
    return Task(
        name=settings.name,
        train=examples.select(range(settings.train_questions)),
        held_out=examples.select(range(settings.train_questions, len(examples))),
        tokenizer=tokenizer,
        backspace_id=backspace_id,
        eos_id=contract.eos_id,
        task_noise=NoiseCandidates.uniform([digits[:base] for base in bases]),
        random_noise=_ordinary_tokens(tokenizer, backspace_id),
        is_correct=_answers_question,
    )


def _text_task(settings: TextTaskSettings, tokenizer: PreTrainedTokenizerBase | None, backspace_id: int | None) -> Task:
    documents = load_documents(settings)
    if tokenizer is None:
        tokenizer = character_tokenizer(set().union(*documents["text"]))
    backspace_id = backspace_token_id(tokenizer) if backspace_id is None else backspace_id
    contract = token_contract(tokenizer, backspace_id)
    train, held_out = (
        text.cut_examples(part, settings, tokenizer, backspace_id) for part in text.split_documents(documents, settings)
    )
    if settings.max_examples is not None and settings.max_examples < len(train):
        train = train.shuffle(seed=settings.seed).select(range(settings.max_examples))
    return Task(
        name=settings.name,
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        backspace_id=backspace_id,
        eos_id=contract.eos_id,
        task_noise=text.unigram_candidates(train, tokenizer),
        random_noise=_ordinary_tokens(tokenizer, backspace_id),
        is_correct=None,
    )


def _question_examples(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, eos_id: int, bases: list[int]
) -> Dataset:
    from datasets import Dataset, Features, List, Value

    prompts = tokenizer([q.question for q in questions], add_special_tokens=False)["input_ids"]
    answers = tokenizer([q.answer for q in questions], add_special_tokens=False)["input_ids"]
    prefix = prompt_prefix(tokenizer)
    columns = {
        "question": [q.question for q in questions],
        "answer": [q.answer for q in questions],
        "prompt_ids": [prefix + ids for ids in prompts],
        "target_ids": [[*ids, eos_id] for ids in answers],
        "noise_group": [bases.index(q.base) for q in questions],
    }
    ids = List(Value("int32"))
    features = Features(
        question=Value("string"),
        answer=Value("string"),
        prompt_ids=ids,
        target_ids=ids,
        noise_group=Value("int32"),
    )
    return Dataset.from_dict(columns, features=features)


def _answers_question(answer_text: str, example: Mapping[str, object]) -> bool:
    return answer_text.strip() == example["answer"]


def _digit_id(tokenizer: PreTrainedTokenizerBase, digit: str) -> int:
    # Some tokenizers put a word-start token before the first character, so only the last id is looked at.
    token_id: int = tokenizer(digit, add_special_tokens=False)["input_ids"][-1]
    if tokenizer.decode([token_id]).strip() != digit:
        raise ValueError(
            f"the tokenizer has no token for the digit {digit!r}, so plausible wrong digits cannot be drawn; "
            "use a model that spells numbers digit by digit"
        )
    return token_id


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase, backspace_id: int) -> NoiseCandidates:
    special = {*tokenizer.all_special_ids, backspace_id}
    ids = np.array(sorted(set(tokenizer.get_vocab().values()) - special), dtype=np.int32)
    return NoiseCandidates.uniform([ids])
