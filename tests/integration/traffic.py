"""Requests for engine tests: rollouts that share prompts, prompt lengths around block edges, several samplers."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from actors.engine.interface import Int32, SamplingSettings
from tests.tiny_models import BOS_ID, FIRST_TEXT_ID, IDS_WITHOUT_TOKEN, VOCAB_SIZE

EDGE_LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128)


@dataclass(frozen=True)
class Request:
    """One request of a test."""

    request_id: str
    prompt_ids: Int32
    sampling: SamplingSettings


def shared_prompts(count: int, length: int, seed: int) -> list[Int32]:
    """Random prompts; tests cut them, so that requests share prefixes of many lengths."""
    generator = np.random.default_rng(seed)
    without_token = [np.arange(begin, end) for begin, end in IDS_WITHOUT_TOKEN]
    ids = np.setdiff1d(np.arange(FIRST_TEXT_ID, VOCAB_SIZE, dtype=np.int32), np.concatenate(without_token))
    prompts = generator.choice(ids, (count, length))
    prompts[:, 0] = BOS_ID
    return list(prompts)


def rollouts(
    count: int,
    seed: int = 0,
    *,
    longest_prompt: int = 100,
    max_new_tokens: int = 60,
    max_actions: int = 90,
    share_plain: float = 0.0,
    share_greedy: float = 0.2,
) -> list[Request]:
    """Requests with backspace, and a share without."""
    random_state = random.Random(seed)
    prompts = shared_prompts(4, longest_prompt, seed)
    requests = []
    for index in range(count):
        edges = [length for length in EDGE_LENGTHS if length <= longest_prompt]
        length = random_state.choice([random_state.randint(1, longest_prompt), random_state.choice(edges)])
        greedy = random_state.random() < share_greedy
        sampling = SamplingSettings(
            max_new_tokens=random_state.choice([5, max_new_tokens]),
            max_actions=random_state.choice([max_actions // 3, max_actions]),
            temperature=0.0 if greedy else random_state.choice([1.0, 1.0, 0.7]),
            top_p=1.0 if greedy else random_state.choice([1.0, 1.0, 0.9]),
            backspace=random_state.random() >= share_plain,
        )
        requests.append(Request(f"r{index}", random_state.choice(prompts)[:length], sampling))
    return requests
