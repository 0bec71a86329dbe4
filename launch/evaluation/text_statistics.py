"""Repetition within texts and between them, counted over token ids, so that no other tokenization enters.

rep-n and diversity follow Su et al., A Contrastive Framework for Neural Text Generation (arXiv 2202.06417): rep-n is
the fraction of a text's n-grams that repeat an earlier one, diversity the product of 1 - rep-n over n = 2, 3, 4.

Self-BLEU (Zhu et al., Texygen, arXiv 1802.01886) says how much each text resembles the others: BLEU-4 against the
others of its block. The more references, the higher BLEU: blocks of one size keep numbers of different numbers of texts
comparable. An n-gram size without a match counts as 0.1 matches (Chen & Cherry, 2014, smoothing 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from buffer.experts.ragged import Ragged
from launch.statistics import Bool, Estimate, Float64, Int64

DIVERSITY_SIZES = (2, 3, 4)
BLOCK_TEXTS = 100
MAX_SIZE = 4
SMOOTHED_MATCHES = 0.1


@dataclass(frozen=True)
class Ngrams:
    """The n-grams of R texts, G in all.

    text: [G] text of each, ascending. gram: [G] number of the distinct n-gram that it is, from 0.
    """

    text: Int64
    gram: Int64
    num_texts: int

    @classmethod
    def of(cls, texts: Ragged, size: int) -> Ngrams:
        """Those of `size` ids of each text; shorter texts have none."""
        lengths = texts.lengths
        row = np.repeat(np.arange(len(lengths)), lengths)
        starts = np.flatnonzero(np.arange(len(row)) - texts.offsets[:-1][row] + size <= lengths[row])
        # Numbered by doubling the key one id at a time: two numbers below 2^31 make one of 64 bits, and no row is
        # sorted.
        gram = np.zeros(len(starts), dtype=np.int64)
        for shift in range(size):
            _, gram = np.unique((gram << 32) | texts.values[starts + shift], return_inverse=True)
        return cls(row[starts], gram, len(lengths))

    @property
    def per_text(self) -> Int64:
        """[R] n-grams of each text."""
        counts: Int64 = np.bincount(self.text, minlength=self.num_texts)
        return counts


def distinct_ngrams(texts: Ragged, size: int) -> tuple[Float64, Bool]:
    """[R] distinct n-grams per n-gram of each text (1 - rep-n), and [R] whether it has any (else 0)."""
    found = Ngrams.of(texts, size)
    total = found.per_text
    seen = np.unique((found.text << 32) | found.gram) >> 32
    distinct = np.bincount(seen, minlength=found.num_texts)
    return distinct / np.maximum(total, 1), total > 0


def diversity(texts: Ragged) -> tuple[Float64, Bool]:
    """[R] product of 1 - rep-n over n = 2, 3, 4 of each text, and [R] whether it is long enough to have one."""
    found = [distinct_ngrams(texts, size) for size in DIVERSITY_SIZES]
    return np.prod([fraction for fraction, _ in found], axis=0), found[-1][1]


def ngram_entropy(texts: Ragged, size: int) -> Estimate:
    """Shannon entropy in bits of the n-grams of all texts together, with the linearized error for texts as a whole.

    It is biased downwards, the more so the fewer n-grams there are: compare it at the same number of tokens only.
    """
    found = Ngrams.of(texts, size)
    count = int(np.count_nonzero(found.per_text))
    if len(found.gram) == 0:
        return Estimate(None, None, count)
    surprise = -np.log2(np.bincount(found.gram) / len(found.gram))[found.gram]
    entropy = float(surprise.mean())
    influence = np.bincount(found.text, surprise - entropy, minlength=found.num_texts) / len(found.gram)
    return Estimate.linear(entropy, influence, count)


def self_bleu(texts: Ragged) -> Estimate:
    """Mean self-BLEU, between 0 and 1, of the texts with at least four tokens, in blocks of `BLOCK_TEXTS` as they come.

    Texts that do not fill the last block are left out, unless it is the only one.
    """
    num_texts = texts.num_rows
    block = min(num_texts, BLOCK_TEXTS)
    used = num_texts - num_texts % block if block > 1 else 0
    scores = np.zeros(num_texts)
    for begin in range(0, used, max(block, 1)):
        ids = texts.values[texts.offsets[begin] : texts.offsets[begin + block]]
        rows = slice(begin, begin + block)
        scores[rows] = _block_bleu(Ragged.from_lengths(texts.lengths[rows], ids))
    return Estimate.mean(scores, (texts.lengths >= MAX_SIZE) & (np.arange(num_texts) < used))


def _block_bleu(texts: Ragged) -> Float64:
    """[R] BLEU of each of R > 1 texts against all others."""
    lengths = texts.lengths
    log_precision = np.zeros(texts.num_rows)
    for size in range(1, MAX_SIZE + 1):
        found = Ngrams.of(texts, size)
        matches = _clipped_matches(found).astype(np.float64)
        matches[matches == 0] = SMOOTHED_MATCHES
        log_precision += np.log(matches / np.maximum(found.per_text, 1)) / MAX_SIZE
    # The reference nearest in length, the shorter of two (Papineni et al., 2002).
    others = np.abs(lengths[:, None] - lengths[None, :]) * 2.0 + (lengths[None, :] > lengths[:, None])
    np.fill_diagonal(others, np.inf)
    nearest = lengths[np.argmin(others, axis=1)]
    bleu: Float64 = np.exp(log_precision + np.minimum(0.0, 1.0 - nearest / np.maximum(lengths, 1)))
    return bleu


def _clipped_matches(found: Ngrams) -> Int64:
    """[R] n-grams of each text that some other text has too, each as often as the other that has it most often."""
    if len(found.gram) == 0:
        return np.zeros(found.num_texts, dtype=np.int64)
    num_grams = int(found.gram.max()) + 1
    cells = np.bincount(found.text * num_grams + found.gram, minlength=found.num_texts * num_grams)
    counts = cells.reshape(found.num_texts, num_grams).astype(np.int32)
    second, largest = np.partition(counts, -2, axis=0)[-2:]
    # The largest count among the others: of the text that has it, that is the second largest.
    matches: Int64 = np.minimum(counts, np.where(counts == largest, second, largest)).sum(axis=1)
    return matches
