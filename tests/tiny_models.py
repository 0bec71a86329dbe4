"""Tiny random language models with a backspace action, in Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from buffer.trajectory.schema import TokenContract

PAD_ID, BOS_ID, EOS_ID, BACKSPACE_ID = 0, 1, 2, 3
FIRST_TEXT_ID = 4
VOCAB_SIZE = 256
CONTRACT = TokenContract(VOCAB_SIZE, BACKSPACE_ID, EOS_ID, tokenizer_hash="tiny")
IDS_WITHOUT_TOKEN = ((90, 94), (240, 256))
"""For tests of vocabularies with a hole and padding: a model has rows for these ids, its tokenizer no token."""


def tiny_model(
    kind: Literal["llama", "gpt2"] = "llama",
    *,
    tied: bool = False,
    seed: int = 0,
    backspace_rate: float = 0.2,
    max_length: int = 512,
) -> PreTrainedModel:
    """A float32 model that takes tokens back at roughly `backspace_rate` and ends seldom.

    A direction shared by all embeddings stays in the residual stream; the output rows of backspace and eos
    read it, which raises or lowers their logits everywhere, also where input and output embeddings are tied.
    """
    torch.manual_seed(seed)
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                max_position_embeddings=max_length,
                tie_word_embeddings=tied,
                initializer_range=0.15,
                **ids,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB_SIZE,
                n_embd=64,
                n_layer=2,
                n_head=2,
                n_positions=max_length,
                initializer_range=0.15,
                **ids,
            )
        )
    model = model.float().eval()
    _shape_action_rates(model, backspace_rate)
    return model


@torch.no_grad()
def _shape_action_rates(model: PreTrainedModel, backspace_rate: float) -> None:
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    direction = torch.randn(embedding.shape[1])
    direction -= direction.mean()  # survives layer norm
    direction /= direction.norm()
    embedding += 2.0 * direction
    texts = torch.randint(FIRST_TEXT_ID, VOCAB_SIZE, (8, 32))
    for _ in range(4):
        logits = model(texts).logits
        others = logits[..., FIRST_TEXT_ID:].logsumexp(-1).mean()
        strength = _strength(model, texts, direction)
        target = others + torch.logit(torch.tensor(backspace_rate))
        head[BACKSPACE_ID] += (target - logits[..., BACKSPACE_ID].mean()) / strength * direction
        target = others + torch.logit(torch.tensor(0.01))
        head[EOS_ID] += (target - logits[..., EOS_ID].mean()) / strength * direction


def _strength(model: PreTrainedModel, texts: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Mean component of the final hidden states along `direction`."""
    hidden = model.base_model(texts).last_hidden_state
    return (hidden @ direction).mean()


def save_tiny_model(path: Path, model: PreTrainedModel) -> Path:
    """Write config and safetensors."""
    model.save_pretrained(path)
    return path


def perturbed(model: PreTrainedModel, seed: int, scale: float = 0.1) -> PreTrainedModel:
    """A copy with every parameter moved at random, as after some learner steps."""
    import copy

    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            spread = parameter.std() if parameter.dim() > 1 else 1.0
            parameter.add_(scale * spread * torch.randn(parameter.shape, generator=generator))
    return moved


@torch.no_grad()
def make_constant(model: PreTrainedModel, favored_id: int) -> None:
    """Give a Llama with tied embeddings the same distribution at every text, in which `favored_id` is most likely.

    The final norm passes a constant on, and the head reads it.
    """
    for parameter in model.parameters():
        parameter.zero_()
    embedding = model.get_input_embeddings().weight
    embedding[:, 0] = 1.0
    model.model.norm.weight[0] = 1.0
    embedding[:, 1] = 0.0
    embedding[favored_id, 0] = 3.0
