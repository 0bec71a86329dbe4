"""A Hugging Face sequence classifier as a scorer of answers: sentiment, topic, a reward model.

It is loaded once per actor and stays on the CPU, beside the engine, with as many threads as that has there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig

from actors.scoring.settings import ClassifierSettings

if TYPE_CHECKING:
    from actors.scoring.scorers import Answer

Float32 = npt.NDArray[np.float32]


class Classifier:
    """Gives each answer a number: the probability of a label, or the one number that the model has for it.

    Raises (on creation):
        ValueError: the model cannot be loaded, is no classifier, or has other labels.
    """

    def __init__(self, settings: ClassifierSettings) -> None:
        self._settings = settings
        name = settings.name
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

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def __call__(self, answers: Sequence[Answer]) -> Float32:
        """[n] numbers of n answers; nan where the tokenizer makes no token of a text.

        Texts beyond the model's context are cut off at their end.
        """
        texts = [answer.prompt + answer.text if self._settings.with_prompt else answer.text for answer in answers]
        size = self._settings.batch_size
        numbers = torch.cat([self._numbers(texts[begin : begin + size]) for begin in range(0, len(texts), size)])
        if self._settings.at_least is not None:
            numbers = torch.where(numbers.isnan(), numbers, (numbers >= self._settings.at_least).float())
        scores: Float32 = numbers.numpy()
        return scores

    def _numbers(self, texts: list[str]) -> torch.Tensor:
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt")
        is_empty = inputs["attention_mask"].sum(1) == 0
        if is_empty.all():
            return torch.full((len(texts),), torch.nan)
        logits = self._model(**inputs).logits
        if self._settings.label is not None:
            logits = logits.sigmoid() if self._is_multi_label else logits.softmax(-1)
        numbers: torch.Tensor = logits[:, self._column].masked_fill(is_empty, torch.nan)  # of nothing but padding
        return numbers


def _column_of(config: PretrainedConfig, settings: ClassifierSettings) -> int:
    """Of the outputs, the one that counts."""
    labels = [config.id2label[index] for index in range(config.num_labels)]
    if settings.label is None:
        if len(labels) > 1:
            raise ValueError(f"classifier {settings.name!r} has several labels, set one: {', '.join(labels)}")
        return 0
    if len(labels) == 1:
        raise ValueError(
            f"classifier {settings.name!r} has one output, and no label {settings.label!r} to tell from others: leave "
            "label out, and its number counts"
        )
    if settings.label not in labels:
        raise ValueError(f"classifier {settings.name!r} has no label {settings.label!r}; it has: {', '.join(labels)}")
    return labels.index(settings.label)
