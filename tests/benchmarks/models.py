"""Random Llamas for benchmarks: only their shape matters, and what they take of memory and time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from buffer.trajectory.schema import TokenContract

if TYPE_CHECKING:
    from transformers import LlamaConfig

BACKSPACE_ID, EOS_ID = 3, 2
FIRST_TEXT_ID = 4
SMALL = "small random Llama, 4 layers, width 256, vocabulary 512"

Shape = Literal["small", "smollm2-135m", "tiny"]
_SIZES: dict[Shape, tuple[int, int, int, int, int, int]] = {
    "small": (512, 256, 512, 4, 8, 4),
    "smollm2-135m": (49_152, 576, 1536, 30, 9, 3),
    "tiny": (512, 256, 512, 2, 8, 4),
}
_NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def llama_config(shape: Shape, max_length: int, tied: bool) -> LlamaConfig:
    """The configuration of one of `Shape`; tied: one matrix of embeddings for input and output."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **dict(zip((*_NAMES, "num_key_value_heads"), _SIZES[shape], strict=True)),
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
        initializer_range=0.06,
    )


def contract_of(vocab_size: int) -> TokenContract:
    """What such a model's tokens mean."""
    return TokenContract(vocab_size, BACKSPACE_ID, EOS_ID, tokenizer_hash="random")


def write_small_llama(folder: Path, max_length: int) -> Path:
    """Write config.json and float32 safetensors of the small model into `folder`: the engine's own work, not the
    model's, is what is measured with it.
    """
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(llama_config("small", max_length, tied=False)).float().save_pretrained(folder)
    return folder
