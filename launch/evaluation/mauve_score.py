"""MAUVE (Pillutla et al., arXiv 2102.01454): area under the divergence frontier of two sets of texts, near 1 if alike.

Texts are clustered by their features, and the shares of the clusters compared; computed by the authors' package
`mauve-text` (an extra, since its licence is the GPL). Its value depends on the start of k-means and, through the number
of clusters, on the number of texts: it is the mean over several starts, and the number of clusters is fixed. The error
is the spread over texts that are drawn again with replacement from both sets, each time with another start. Draws and
starts are the same for all models with as many texts, so that two of them are compared draw by draw.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import numpy.typing as npt

from launch.generation import library_chatter_held
from launch.statistics import Estimate

Float32 = npt.NDArray[np.float32]

KMEANS_STARTS = 5
RESAMPLES = 40
INSTALL = "pip install 'sequencematch[mauve]'"


def check_mauve_installed() -> None:
    """Raises ImportError where the package is missing."""
    if importlib.util.find_spec("mauve") is None or importlib.util.find_spec("faiss") is None:
        raise ImportError(f"MAUVE needs the extra `mauve`: {INSTALL}")


def mauve_score(reference: Float32, generated: Float32, clusters: int, seed: int) -> Estimate:
    """MAUVE of generated texts against reference texts.

    Args:
        reference, generated: [N, D] and [M, D] features.
        clusters: of both sets together.
        seed: of k-means and of the bootstrap.
    """
    starts = range(seed, seed + KMEANS_STARTS)
    rng = np.random.default_rng(seed)
    resampled = []
    with library_chatter_held():  # faiss wishes for 39 points per cluster, which no published number has
        value = float(np.mean([_mauve(reference, generated, clusters, start) for start in starts]))
        for index in range(RESAMPLES):
            drawn = [features[rng.integers(0, len(features), len(features))] for features in (reference, generated)]
            resampled.append(_mauve(drawn[0], drawn[1], clusters, starts.stop + index))
    return Estimate(value, float(np.std(resampled, ddof=1)), len(generated), resampled=np.array(resampled))


def _mauve(reference: Float32, generated: Float32, clusters: int, seed: int) -> float:
    import mauve

    found = mauve.compute_mauve(
        p_features=reference, q_features=generated, num_buckets=clusters, kmeans_num_redo=1, seed=seed
    )
    return float(found.mauve)
