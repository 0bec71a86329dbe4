"""A small random Llama for benchmarks: so small that the engine's own work, not the model's, is what is measured."""

from __future__ import annotations

from pathlib import Path

from buffer.trajectory.schema import TokenContract

BACKSPACE_ID, EOS_ID = 3, 2
FIRST_TEXT_ID = 4
VOCAB_SIZE = 512
TINY_CONTRACT = TokenContract(VOCAB_SIZE, BACKSPACE_ID, EOS_ID, tokenizer_hash="random")


def write_tiny_llama(folder: Path, max_length: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Path:
    """Write config.json and float32 safetensors of a 4-layer model of width 256 into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=max_length,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder
