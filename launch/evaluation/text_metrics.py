"""What generated text is like where no answer is right or wrong: lengths, repetition, and how much was taken back.

backspace_rate           backspaces per action.
actions_per_final_token  actions spent for each token that remains (a ratio of sums).
tokens_per_text          mean length of what remains, `<eos>` left out.
distinct_4grams          share of a text's 4-grams that are new in that text; texts with less than 4 tokens left out.
truncated_rate           share of texts that a limit ended.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from buffer.experts.ragged import Ragged
from buffer.replay import ActionLogs, replay, surviving_events
from buffer.schema import TokenContract
from launch.evaluation.estimates import Estimate, Float64, mean, ratio

NGRAM = 4


def text_metrics(batch: pa.RecordBatch, contract: TokenContract) -> dict[str, Estimate]:
    """All numbers of freely generated texts."""
    logs = ActionLogs.from_batch(batch)
    played = replay(logs, contract.backspace_id)
    kept = surviving_events(logs, played, contract.backspace_id) & (logs.realised != contract.eos_id)
    counts = np.bincount(played.log[kept], minlength=logs.num_logs)
    texts = Ragged(np.concatenate([[0], np.cumsum(counts)]), logs.realised[kept])
    ended = np.array(batch.column("finish_reason").to_pylist()) == "eos"
    return {
        "backspace_rate": Estimate.share(logs.actions == contract.backspace_id),
        "actions_per_final_token": ratio(logs.lengths.astype(np.float64), counts.astype(np.float64)),
        "tokens_per_text": mean(counts.astype(np.float64)),
        "distinct_4grams": mean(distinct_ngrams(texts)),
        "truncated_rate": Estimate.share(~ended),
    }


def distinct_ngrams(texts: Ragged, size: int = NGRAM) -> Float64:
    """[R'] share of distinct n-grams among the n-grams of each text that has one."""
    lengths = texts.lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.flatnonzero(np.arange(len(row)) - texts.offsets[:-1][row] + size <= lengths[row])
    if len(starts) == 0:
        return np.zeros(0)
    keys = np.column_stack([row[starts], *(texts.values[starts + shift] for shift in range(size))])
    total = np.bincount(row[starts], minlength=len(lengths))
    distinct = np.bincount(np.unique(keys, axis=0)[:, 0], minlength=len(lengths))
    has_some = total > 0
    shares: Float64 = distinct[has_some] / total[has_some]
    return shares
