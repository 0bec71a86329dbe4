"""Weights lambda of features for which an exponential family has given moments (Khalifa et al., arXiv 2012.11635).

Of p(x) ~ w(x) exp(lambda . phi(x)) on samples x_j with importance weights w_j, by self-normalised importance sampling:
the lambda that makes E_p[phi] = target maximises the concave lambda . target - log sum_j w_j exp(lambda . phi_j), whose
gradient is target - E_p[phi] and whose Hessian is -Cov_p[phi]. Newton's method finds it, with steps that are halved
until the value rises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_ITERATIONS = 100
TOLERANCE = 1e-6
"""Largest difference of a moment from its target, as a share of the range of its feature."""


def fit_moments(features: Tensor, log_weight: Tensor, targets: Tensor, names: Sequence[str]) -> Tensor:
    """[F] lambda.

    Args:
        features: [n, F] float64 of n samples. log_weight: [n] of their weights, -inf where they do not count.
        targets: [F] moments. names: [F] of the features, for messages.

    Raises:
        ValueError: no lambda gives these moments on these samples; the message says which feature, and what it was.
    """
    counted = log_weight > -torch.inf
    features, log_weight = features[counted], log_weight[counted]
    if len(features) == 0:
        raise ValueError(f"none of {len(counted):,} rollouts satisfies the pointwise constraints: {_ADVICE}")
    low, high = features.amin(0), features.amax(0)
    for index, name in enumerate(names):
        least, target, most = float(low[index]), float(targets[index]), float(high[index])
        if least == most:
            raise ValueError(
                f"feature {name} is {least:g} in all {len(features):,} rollouts that lambda is fitted on, so no weight "
                f"of it gives a mean of {target:g}: {_ADVICE}"
            )
        if not least < target < most:
            raise ValueError(
                f"feature {name} lies between {least:g} and {most:g} in the {len(features):,} rollouts that lambda is "
                f"fitted on: a mean of {target:g} has no finite weight. Choose one in between, or leave target out for "
                "a pointwise constraint"
            )
    scale = high - low
    scaled, goal = (features - low) / scale, (targets - low) / scale
    weight = torch.zeros(len(targets), dtype=torch.float64)
    for _ in range(MAX_ITERATIONS):
        value, gradient, covariance = _dual(weight, scaled, log_weight, goal)
        if float(gradient.abs().max()) < TOLERANCE:
            return weight / scale
        ridge = 1e-12 * torch.eye(len(weight), dtype=torch.float64)
        step = torch.linalg.lstsq(covariance + ridge, gradient[:, None]).solution[:, 0]
        while float(step.abs().max()) > 1e-12 and _dual(weight + step, scaled, log_weight, goal)[0] <= value:
            step = step / 2
        weight = weight + step
    raise ValueError(
        f"no weights of {', '.join(names)} give the means {', '.join(f'{target:g}' for target in targets.tolist())} "
        f"together on {len(features):,} rollouts: the constraints contradict each other there. {_ADVICE}"
    )


_ADVICE = (
    "raise fit_samples, choose a target or a feature nearer to what the policy does, or start from a policy that does "
    "it now and then"
)


def _dual(weight: Tensor, features: Tensor, log_weight: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient [F] and covariance [F, F] of the features."""
    logits = log_weight + features @ weight
    probability = logits.softmax(0)
    mean = probability @ features
    centred = features - mean
    return weight @ goal - logits.logsumexp(0), goal - mean, (probability[:, None] * centred).T @ centred
