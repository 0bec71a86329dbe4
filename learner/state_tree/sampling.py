"""Tokens that the policy would write after states of a tree."""

from __future__ import annotations

import torch
from torch import Tensor

from learner.state_tree.action_values import StateLogits
from learner.state_tree.id_ranges import fill_ids
from learner.state_tree.products import CHUNK_ELEMENTS, VOCABULARY_CHUNK, accumulation_dtype


def sample_tokens(logits: StateLogits, rows: Tensor, generator: torch.Generator) -> Tensor:
    """[K] a token drawn after each of the states `rows` [K]; never backspace, which no text holds.

    By the Gumbel-max trick, so that the vocabulary is gone through in chunks: the largest of logit - log(exponential
    noise) is a draw from the softmax.
    """
    dtype = accumulation_dtype(logits.hidden, logits.weight)
    width = min(len(logits.weight), VOCABULARY_CHUNK)
    drawn: list[Tensor] = []
    for chunk in rows.split(max(1, CHUNK_ELEMENTS // width)):
        hidden = logits.hidden[chunk].to(dtype)
        best = hidden.new_full((len(chunk),), -torch.inf)
        token = torch.zeros_like(chunk)
        for number, weight in enumerate(logits.weight.split(width)):
            score = hidden @ weight.to(dtype).T
            score -= torch.empty_like(score).exponential_(generator=generator).log_()
            backspace = logits.backspace_id - number * width
            if 0 <= backspace < len(weight):
                score[:, backspace] = -torch.inf
            fill_ids(score, logits.ids_without_token, -torch.inf, number * width)
            chunk_best, index = score.max(1)
            token = torch.where(chunk_best > best, index + number * width, token)
            best = torch.maximum(best, chunk_best)
        drawn.append(token)
    return torch.cat(drawn)
