"""What generated text is like where no answer is right or wrong: length, repetition, variety. All over token ids.

tokens_per_text       mean length of what remains, `<eos>` left out.
truncated_rate        share of texts that a limit ended.
distinct_4grams       share of a text's 4-grams that are new in that text; texts with less than 4 tokens left out.
diversity             product over n = 2, 3, 4 of the share of distinct n-grams of a text, mean over texts.
entropy_<n>gram_bits  entropy of the n-grams of all texts; compare it at the same number of tokens only.
self_bleu             BLEU-4 of each text against the others of its block of 100: high where all texts are alike.
recovery              share of texts that were made to begin with planted tokens, and have none of them at the end.
planted_taken_back    share of the planted tokens that were taken back.

The last two only of texts with planted tokens (`launch.evaluation.planting`). And those of
`launch.evaluation.editing_metrics`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from buffer.trajectory.replay import ActionLogs, replay
from buffer.trajectory.schema import TokenContract
from launch.evaluation.editing_metrics import editing_metrics, final_texts, planted_taken_back
from launch.evaluation.ngrams import distinct_ngrams, diversity, ngram_entropy
from launch.evaluation.self_bleu import self_bleu
from launch.statistics import Estimate

ENTROPY_SIZES = (1, 2, 4)


def text_metrics(batch: pa.RecordBatch, contract: TokenContract, num_planted: int = 0) -> dict[str, Estimate]:
    """All numbers of generated texts, the first `num_planted` tokens of each forced."""
    logs = ActionLogs.from_batch(batch)
    played = replay(logs, contract.backspace_id)
    texts = final_texts(logs, played, contract)
    ended = np.array(batch.column("finish_reason").to_pylist()) == "eos"
    recovered = {}
    if num_planted:
        all_gone, taken_back = planted_taken_back(logs, played, contract, num_planted)
        recovered = {"recovery": Estimate.fraction(all_gone), "planted_taken_back": taken_back}
    return {
        **recovered,
        **editing_metrics(batch, logs, played, contract),
        "tokens_per_text": Estimate.mean(texts.lengths),
        "truncated_rate": Estimate.fraction(~ended),
        "distinct_4grams": Estimate.mean(*distinct_ngrams(texts, 4)),
        "diversity": Estimate.mean(*diversity(texts)),
        **{f"entropy_{size}gram_bits": ngram_entropy(texts, size) for size in ENTROPY_SIZES},
        "self_bleu": self_bleu(texts),
    }
