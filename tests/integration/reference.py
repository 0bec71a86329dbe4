"""Oracle: the log-probability of every action of a log, from a transformers forward on the reduced text.

Slow and obvious on purpose; shares no code with the engine or with `buffer.trajectory.replay`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from actors.engine.interface import FinishedRollout, SamplingSettings
from buffer.trajectory.schema import IdRanges
from tests.tiny_models import BACKSPACE_ID, EOS_ID

Text = tuple[int, ...]

BORDER = 1e-5
"""Of a nucleus, in probability."""


@dataclass
class Comparison:
    """What was compared. worst: largest |difference| in nats over all actions that were not forced."""

    worst: float = 0.0
    num_actions: int = 0
    num_backspaces: int = 0
    num_returns_to_floor: int = 0
    num_back_over_block_edge: int = 0
    worst_greedy_gap: float = 0.0
    errors: list[str] = field(default_factory=list)


def texts_of(log: FinishedRollout, backspace_id: int = BACKSPACE_ID) -> list[Text]:
    """The reduced text (prompt included) before each action."""
    text = list(log.prompt_ids.tolist())
    texts = []
    for action in log.actions.tolist():
        texts.append(tuple(text))
        if action == backspace_id:
            text.pop()
        else:
            text.append(action)
    return texts


def compare(
    logs: Sequence[FinishedRollout],
    samplings: Mapping[str, SamplingSettings],
    models: Mapping[int, PreTrainedModel],
    block_size: int = 32,
    ids_without_token: IdRanges = (),
    forced_prefixes: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Comparison:
    """Compare every action of every log with the model of its policy version.

    forced_prefixes: ids that were forced as the first actions, by request.
    """
    without_token = [token_id for begin, end in ids_without_token for token_id in range(begin, end)]
    result = Comparison()
    distributions = {version: Distributions(model) for version, model in models.items()}
    for version, distribution in distributions.items():
        distribution.prepare(
            {text for log in logs for text, v in zip(texts_of(log), log.policy_version, strict=True) if v == version}
        )
    for log in logs:
        sampling = samplings[log.request_id]
        banned: dict[Text, set[int]] = {}
        prompt_length = len(log.prompt_ids)
        for index, text in enumerate(texts_of(log)):
            action, recorded = int(log.actions[index]), float(log.logprobs[index])
            result.num_actions += 1
            if action == BACKSPACE_ID:
                result.num_backspaces += 1
                result.num_returns_to_floor += len(text) - 1 == prompt_length
                result.num_back_over_block_edge += len(text) % block_size == 1
                banned.setdefault(text[:-1], set()).add(text[-1])
            if len(text) < prompt_length + (action == BACKSPACE_ID):
                result.errors.append(f"{log.request_id} action {index}: backspace at the floor")
                break
            if index < len(forced_prefixes.get(log.request_id, ())):
                if recorded != 0.0:
                    result.errors.append(f"{log.request_id} action {index}: forced with {recorded}")
                continue
            logits = distributions[int(log.policy_version[index])].logits(text)
            # A deletion's own entry in `banned` belongs to the shorter text, so it does not bear on this one.
            logits[_masked(text, prompt_length, sampling, banned) + without_token] = -math.inf
            expected = allowed_logprobs(logits, sampling, action)
            difference = min((abs(value - recorded) for value in expected), default=math.inf)
            if math.isnan(difference):
                difference = math.inf
            result.worst = max(result.worst, difference)
            if difference > 1e-4:
                result.errors.append(
                    f"{log.request_id} action {index} (id {action}, text of {len(text)} tokens after a prompt of "
                    f"{prompt_length}): engine {recorded:.5f}, reference "
                    + (" or ".join(f"{value:.5f}" for value in expected) or "outside of the nucleus")
                )
            if sampling.temperature == 0:
                gap = (logits.max() - logits[action]).item()
                result.worst_greedy_gap = max(result.worst_greedy_gap, gap)
    return result


def _masked(text: Text, prompt_length: int, sampling: SamplingSettings, banned: Mapping[Text, set[int]]) -> list[int]:
    masked = [BACKSPACE_ID] if len(text) == prompt_length or not sampling.backspace else []
    if sampling.ban_eos:
        masked.append(EOS_ID)
    if sampling.ban_deleted:
        masked += banned.get(text, ())
    return masked


def allowed_logprobs(logits: torch.Tensor, sampling: SamplingSettings, action: int) -> list[float]:
    """The log-probabilities that an engine may record for an action; none where it may not sample it.

    There are several where the nucleus of top-p has a token on its border: the last bits of a sum, which differ from
    one processor to the next, decide whether it belongs to it, and which of two equally probable tokens does.
    """
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    logprobs = logits.double().log_softmax(-1)
    if sampling.top_p == 1 or sampling.temperature == 0:
        return [logprobs[action].item()]
    ordered = logprobs.exp().sort(descending=True).values
    sums = ordered.cumsum(-1)
    # The nucleus has one token more than there are sums below top_p.
    least, most = (int((sums < sampling.top_p + shift).sum()) + 1 for shift in (-BORDER, BORDER))
    return [
        (logprobs[action] - sums[size - 1].log()).item()
        for size in range(least, min(most, len(ordered)) + 1)
        if logprobs[action].exp() > ordered[size - 1] - BORDER
    ]


class Distributions:
    """Next-token logits of many texts; a text that is the start of a longer one is read off the longer one's pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._rows: dict[Text, torch.Tensor] = {}

    @torch.no_grad()
    def prepare(self, texts: set[Text]) -> None:
        wanted = set(texts)
        ordered = sorted(wanted, key=len, reverse=True)
        longest: list[Text] = []
        covered: set[Text] = set()
        for text in ordered:
            if text not in covered:
                longest.append(text)
                covered.update(text[:length] for length in range(1, len(text) + 1))
        for start in range(0, len(longest), 32):
            group = longest[start : start + 32]
            padded = torch.zeros(len(group), max(map(len, group)), dtype=torch.int64)
            for row, text in enumerate(group):
                padded[row, : len(text)] = torch.tensor(text)
            # Padding stands to the right, where causal attention does not look.
            logits = self._model(padded).logits.float()
            for row, text in enumerate(group):
                for length in range(1, len(text) + 1):
                    if text[:length] in wanted:
                        self._rows[text[:length]] = logits[row, length - 1]

    def logits(self, text: Text) -> torch.Tensor:
        return self._rows[text].clone()


@torch.no_grad()
def sequence_logprobs(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """[N-1] log p(token_ids[i+1] | token_ids[:i+1])."""
    ids = torch.tensor([list(token_ids)])
    return model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
