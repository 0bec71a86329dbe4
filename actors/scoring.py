"""Rewards and features of finished rollouts: what the scorers of a recipe make of them, written into their rows before
they go to the buffer. A row without a finite number is dropped, with the reason; the others of its batch are kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.settings import (
    ClassifierSettings,
    ExactAnswerSettings,
    LengthSettings,
    PatternSettings,
    ScorerSettings,
    ScoringSettings,
    WordSettings,
)
from buffer.custom import make_custom
from buffer.experts.ragged import Ragged
from buffer.settings import CustomSettings
from buffer.trajectory.replay import TrajectoryArrays, final_token_ids, replay
from buffer.trajectory.schema import TokenContract

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Float32 = npt.NDArray[np.float32]


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


@runtime_checkable
class Scorer(Protocol):
    """What every scorer does; the class of a custom one makes one instance per actor."""

    def __call__(self, answers: Sequence[Answer], /) -> Sequence[float] | npt.NDArray[np.floating]:
        """One number for each answer."""


class RolloutScoring:
    """The reward and the features of one run.

    settings: at least one scorer. tokenizer: of the task. examples: `prompt_ids` and `target_ids` of those that
        prompts come from. ValueError: a class or a classifier cannot be loaded.
    """

    def __init__(
        self, settings: ScoringSettings, tokenizer: PreTrainedTokenizerBase, contract: TokenContract, examples: pa.Table
    ) -> None:
        assert settings.scorers
        self._settings = settings
        self._scorers = {_title(name, each): make_scorer(each) for name, each in settings.scorers.items()}
        self._tokenizer = tokenizer
        self._contract = contract
        prompts, targets = (Ragged.from_arrow(examples.column(name)).rows() for name in ("prompt_ids", "target_ids"))
        pairs = reversed(list(zip(prompts, targets, strict=True)))  # of examples with the same prompt the first counts
        self._target_of_prompt = {prompt.tobytes(): target[target != contract.eos_id] for prompt, target in pairs}

    def score(self, rollouts: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[str, str]]:
        """Fill the columns `reward` and `features` of a batch of the trajectory schema.

        Gives the rollouts that were scored, in their order; and for the ids of the others why they were not.
        TimeoutError: a scorer did not return in time. Its thread goes on: the process is of no more use.
        """
        answers = self._answers(rollouts)
        reasons: dict[int, str] = {}
        numbers = [self._scored(title, answers, reasons) for title in self._scorers]
        features = numbers[0 if self._settings.reward is None else 1 :]
        if self._settings.reward is not None:
            rollouts = _with_column(rollouts, "reward", pa.array(numbers[0]))
        if features:
            lists = pa.FixedSizeListArray.from_arrays(pa.array(np.stack(features, axis=1).ravel()), len(features))
            rollouts = _with_column(rollouts, "features", lists)
        ids = rollouts.column("id")
        dropped = {ids[row].as_py(): reason for row, reason in sorted(reasons.items())}
        kept = [row for row in range(len(answers)) if row not in reasons]
        return rollouts.take(pa.array(kept, pa.int64())) if dropped else rollouts, dropped

    def _answers(self, rollouts: pa.RecordBatch) -> list[Answer]:
        trajectories = TrajectoryArrays.from_batch(rollouts)
        offsets, ids = final_token_ids(
            trajectories, replay(trajectories, self._contract.backspace_id), self._contract.backspace_id
        )
        is_text = ~np.isin(ids, self._contract.eos_ids)
        kept_before = np.concatenate([[0], np.cumsum(is_text)])
        answers = Ragged(kept_before[offsets], ids[is_text])
        prompts = Ragged(trajectories.prompt_offsets, trajectories.prompt_ids).rows()
        columns = zip(
            self._texts(prompts),
            self._texts(answers.rows()),
            answers.lengths.tolist(),
            self._texts([self._target_of_prompt[prompt.tobytes()] for prompt in prompts]),
            [reason == "eos" for reason in rollouts.column("finish_reason").to_pylist()],
            strict=True,
        )
        return [Answer(*values) for values in columns]

    def _texts(self, rows: Sequence[npt.NDArray[np.int32]]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode([row.tolist() for row in rows])
        return texts

    def _scored(self, title: str, answers: Sequence[Answer], reasons: dict[int, str]) -> Float32:
        """[n] scores, nan where there is none; `reasons` gains why, by row.

        A scorer that fails on the batch is asked again row by row, to find those that it fails on.
        """
        scores = self._attempt(title, answers)
        if isinstance(scores, str):
            alone = [self._attempt(title, [answer]) for answer in answers]
            for row, found in enumerate(alone):
                if isinstance(found, str):
                    reasons.setdefault(row, found)
            scores = np.array([np.nan if isinstance(found, str) else found[0] for found in alone], dtype=np.float32)
        for row in np.flatnonzero(~np.isfinite(scores)).tolist():
            reasons.setdefault(row, f"{title} is {scores[row]}")
        return scores

    def _attempt(self, title: str, answers: Sequence[Answer]) -> Float32 | str:
        """[n] scores, or why there are none.

        Each call has a thread of its own: Python code cannot be interrupted, but it need not be waited for.
        """
        outcome: SimpleQueue[Float32 | str] = SimpleQueue()

        def call() -> None:
            try:
                with np.errstate(over="ignore"):  # beyond float32 is not finite, which the caller sees
                    scores = np.asarray(self._scorers[title](answers), dtype=np.float32)
                if scores.shape != (len(answers),):
                    raise ValueError(f"an array of shape {scores.shape} for {len(answers)} answers")
            except (Exception, SystemExit) as error:  # noqa: BLE001 (a user's class may raise anything)
                outcome.put(f"{title} raised {type(error).__name__}: {error}")
            else:
                outcome.put(scores)

        Thread(target=call, name=f"scorer {title}", daemon=True).start()
        try:
            return outcome.get(timeout=self._settings.timeout_s)
        except Empty:
            raise TimeoutError(
                f"{title} did not return within scoring.timeout_s={self._settings.timeout_s:g} for {len(answers)} "
                "answers: raise the time-out, or mend the scorer"
            ) from None


def _title(name: str, settings: ScorerSettings) -> str:
    """How messages call a scorer: `reward (my_rewards:Brief)`. name: see `ScoringSettings.scorers`."""
    if isinstance(settings, CustomSettings):
        return f"{name} ({settings.path})"
    model = f" {settings.model}" if isinstance(settings, ClassifierSettings) else ""
    return f"{name} ({settings.name}{model})"


def _with_column(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    index = batch.schema.get_field_index(name)
    field = batch.schema.field(index)
    return batch.set_column(index, field, column.cast(field.type))


def make_scorer(settings: ScorerSettings) -> Scorer:
    """The scorer that `settings` describe; a ValueError if its class or its model cannot be loaded."""
    if isinstance(settings, PatternSettings):
        return _matches(settings.pattern, settings.ignore_case)
    if isinstance(settings, WordSettings):
        # Not \b: a word may begin or end with a character that is no letter.
        return _matches(rf"(?<!\w){re.escape(settings.word)}(?!\w)", settings.ignore_case)
    if isinstance(settings, ExactAnswerSettings):
        return lambda answers: [float(each.ended and each.text.strip() == each.reference.strip()) for each in answers]
    if isinstance(settings, LengthSettings):
        return _length(settings)
    if isinstance(settings, ClassifierSettings):
        return Classifier(settings)
    return make_custom(settings, Scorer)  # type: ignore[type-abstract]


def _matches(pattern: str, ignore_case: bool) -> Scorer:
    compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    return lambda answers: [float(compiled.search(answer.text) is not None) for answer in answers]


def _length(settings: LengthSettings) -> Scorer:
    if not settings.has_bounds:
        return lambda answers: [float(answer.num_tokens) for answer in answers]
    low = settings.at_least or 0
    high = np.inf if settings.at_most is None else settings.at_most
    return lambda answers: [float(low <= answer.num_tokens <= high) for answer in answers]


class Classifier:
    """A Hugging Face sequence classifier: sentiment, topic, a reward model. It gives each answer the probability of a
    label, or the one number that the model has for it.

    It is loaded once per actor and stays on the CPU, beside the engine, with as many threads as that has there.
    ValueError: the model cannot be loaded, is no classifier, or has other labels.
    """

    def __init__(self, settings: ClassifierSettings) -> None:
        # Here, not at the top: pool and driver import this module, and have no use for a model library.
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._settings = settings
        name = settings.model
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, revision=settings.revision, trust_remote_code=False)
            self._model, loading = AutoModelForSequenceClassification.from_pretrained(
                name,
                revision=settings.revision,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"classifier {name!r} cannot be loaded: {error}") from error
        if missing := sorted(loading["missing_keys"]):
            # transformers would fill them with random numbers, which score as well as any.
            raise ValueError(
                f"{name!r} is no trained sequence classifier: it has no weights for {', '.join(missing[:3])}; name one "
                "that was saved as AutoModelForSequenceClassification"
            )
        if self._tokenizer.pad_token is None:
            raise ValueError(
                f"the tokenizer of classifier {name!r} has no padding token, so texts cannot be read side by side: set "
                "pad_token in its tokenizer_config.json, and pad_token_id in the model's config.json"
            )
        self._model.to("cpu").eval()
        config = self._model.config
        self._column = _column_of(config, settings)
        self._is_multi_label = config.problem_type == "multi_label_classification"
        self._max_length = min(self._tokenizer.model_max_length, config.max_position_embeddings)

    def __call__(self, answers: Sequence[Answer]) -> Float32:
        """[n] numbers of n texts, cut off at the model's context; nan where the tokenizer makes no token of a text."""
        import torch

        texts = [answer.prompt + answer.text if self._settings.with_prompt else answer.text for answer in answers]
        size = self._settings.batch_size
        with torch.inference_mode():
            numbers = torch.cat([self._numbers(texts[begin : begin + size]) for begin in range(0, len(texts), size)])
            if self._settings.at_least is not None:
                numbers = torch.where(numbers.isnan(), numbers, (numbers >= self._settings.at_least).float())
        scores: Float32 = numbers.numpy()
        return scores

    def _numbers(self, texts: list[str]) -> torch.Tensor:
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt")
        is_empty = inputs["attention_mask"].sum(1) == 0
        if is_empty.all():
            return is_empty.float().fill_(np.nan)
        logits = self._model(**inputs).logits
        if self._settings.label is not None:
            logits = logits.sigmoid() if self._is_multi_label else logits.softmax(-1)
        numbers: torch.Tensor = logits[:, self._column].masked_fill(is_empty, np.nan)  # of nothing but padding
        return numbers


def _column_of(config: PretrainedConfig, settings: ClassifierSettings) -> int:
    labels = [config.id2label[index] for index in range(config.num_labels)]
    if settings.label is None and len(labels) > 1:
        raise ValueError(f"classifier {settings.model!r} has several labels, set one: {', '.join(labels)}")
    if settings.label is None:
        return 0
    if len(labels) == 1:
        raise ValueError(
            f"classifier {settings.model!r} has one output, and no label {settings.label!r} to tell from others: leave "
            "label out, and its number counts"
        )
    if settings.label not in labels:
        raise ValueError(f"classifier {settings.model!r} has no label {settings.label!r}; it has: {', '.join(labels)}")
    return labels.index(settings.label)
