"""Self-BLEU (Zhu et al., Texygen, arXiv 1802.01886): how much each text resembles the others; high where all are alike.

BLEU-4 over token ids, so that no other tokenisation enters, of each text against the others of its block. The more
references, the higher BLEU: blocks of one size keep numbers of different numbers of texts comparable. An n-gram size
without a match counts as 0.1 matches (Chen & Cherry, 2014, smoothing 1), as is usual for single sentences.
"""

from __future__ import annotations

import numpy as np

from buffer.experts.ragged import Ragged
from launch.evaluation.ngrams import Ngrams, ngrams
from launch.statistics import Bool, Estimate, Float64, Int64

BLOCK_TEXTS = 100
MAX_SIZE = 4
SMOOTHED_MATCHES = 0.1


def self_bleu(texts: Ragged) -> Estimate:
    """Mean self-BLEU, between 0 and 1, of the texts with at least four tokens.

    Texts are taken in blocks of `BLOCK_TEXTS` as they come; those that do not fill the last block are left out, unless
    it is the only one. The error takes the references of a text as given.
    """
    num_texts = texts.num_rows
    block = min(num_texts, BLOCK_TEXTS)
    used = num_texts - num_texts % block if block > 1 else 0
    scores, scored = np.zeros(num_texts), np.zeros(num_texts, dtype=np.bool_)
    for begin in range(0, used, max(block, 1)):
        rows = slice(begin, begin + block)
        ids = texts.values[texts.offsets[begin] : texts.offsets[begin + block]]
        scores[rows], scored[rows] = _block_bleu(Ragged.from_lengths(texts.lengths[rows], ids))
    return Estimate.mean(scores, scored)


def _block_bleu(texts: Ragged) -> tuple[Float64, Bool]:
    """[R] BLEU of each text against all others, and [R] whether it is long enough to have one."""
    lengths = texts.lengths
    log_precision = np.zeros(texts.num_rows)
    for size in range(1, MAX_SIZE + 1):
        found = ngrams(texts, size)
        matches = _clipped_matches(found).astype(np.float64)
        matches[matches == 0] = SMOOTHED_MATCHES
        log_precision += np.log(matches / np.maximum(found.per_text, 1)) / MAX_SIZE
    # The reference nearest in length, the shorter of two (Papineni et al., 2002).
    others = np.abs(lengths[:, None] - lengths[None, :]) * 2.0 + (lengths[None, :] > lengths[:, None])
    np.fill_diagonal(others, np.inf)
    nearest = lengths[np.argmin(others, axis=1)]
    log_brevity = np.minimum(0.0, 1.0 - nearest / np.maximum(lengths, 1))
    return np.exp(log_precision + log_brevity), lengths >= MAX_SIZE


def _clipped_matches(found: Ngrams) -> Int64:
    """[R] n-grams of each text that some other text has too, each as often as the other that has it most often."""
    if len(found.gram) == 0:
        return np.zeros(found.num_texts, dtype=np.int64)
    pairs, counts = np.unique((found.gram << 32) | found.text, return_counts=True)
    gram, text = pairs >> 32, pairs & 0xFFFFFFFF
    order = np.lexsort((-counts, gram))
    first_of_gram = np.flatnonzero(np.diff(gram[order], prepend=-1))
    has_second = np.diff(first_of_gram, append=len(order)) > 1
    largest = order[first_of_gram]
    second = np.zeros(len(first_of_gram), dtype=np.int64)
    second[has_second] = counts[order[first_of_gram[has_second] + 1]]
    # The largest count among the others: of the text that has it, that is the second largest.
    others = np.where(text[largest][gram] == text, second[gram], counts[largest][gram])
    matches = np.zeros(found.num_texts, dtype=np.int64)
    np.add.at(matches, text, np.minimum(counts, others))
    return matches
