"""Repetition within texts and between them, counted over token ids.

rep-n and diversity follow Su et al., A Contrastive Framework for Neural Text Generation (arXiv 2202.06417): rep-n is
the share of a text's n-grams that repeat an earlier one, diversity the product of 1 - rep-n over n = 2, 3, 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from buffer.experts.ragged import Ragged
from launch.statistics import Bool, Estimate, Float64, Int64

DIVERSITY_SIZES = (2, 3, 4)


@dataclass(frozen=True)
class Ngrams:
    """The n-grams of R texts, G in all.

    text: [G] text of each, ascending. gram: [G] number of the distinct n-gram that it is, from 0.
    """

    text: Int64
    gram: Int64
    num_texts: int

    @property
    def per_text(self) -> Int64:
        """[R] n-grams of each text."""
        counts: Int64 = np.bincount(self.text, minlength=self.num_texts)
        return counts


def ngrams(texts: Ragged, size: int) -> Ngrams:
    """The n-grams of `size` ids of each text; shorter texts have none."""
    lengths = texts.lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.flatnonzero(np.arange(len(row)) - texts.offsets[:-1][row] + size <= lengths[row])
    # Numbered by doubling the key one id at a time: two numbers below 2^31 make one of 64 bits, and no row is sorted.
    gram = np.zeros(len(starts), dtype=np.int64)
    for shift in range(size):
        _, gram = np.unique((gram << 32) | texts.values[starts + shift], return_inverse=True)
    return Ngrams(row[starts], gram, len(lengths))


def distinct_ngrams(texts: Ragged, size: int) -> tuple[Float64, Bool]:
    """[R] share of distinct n-grams among those of each text (1 - rep-n), and [R] whether it has any (else 0)."""
    found = ngrams(texts, size)
    total = found.per_text
    seen = np.unique((found.text << 32) | found.gram) >> 32
    distinct = np.bincount(seen, minlength=found.num_texts)
    return distinct / np.maximum(total, 1), total > 0


def diversity(texts: Ragged) -> tuple[Float64, Bool]:
    """[R] product of 1 - rep-n over n = 2, 3, 4 of each text, and [R] whether it is long enough to have one."""
    shares = [distinct_ngrams(texts, size) for size in DIVERSITY_SIZES]
    return np.prod([share for share, _ in shares], axis=0), shares[-1][1]


def ngram_entropy(texts: Ragged, size: int) -> Estimate:
    """Shannon entropy in bits of the n-grams of all texts together, from their frequencies.

    That is biased downwards, the more so the fewer n-grams there are: compare it at the same number of tokens only. Its
    error is the linearised one for texts drawn as a whole.
    """
    found = ngrams(texts, size)
    count = int(np.count_nonzero(found.per_text))
    if len(found.gram) == 0:
        return Estimate(None, None, count)
    surprise = -np.log2(np.bincount(found.gram) / len(found.gram))[found.gram]
    entropy = float(surprise.mean())
    influence = np.bincount(found.text, surprise - entropy, minlength=found.num_texts) / len(found.gram)
    return Estimate.linear(entropy, influence, count)
