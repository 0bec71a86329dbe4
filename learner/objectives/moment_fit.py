"""Weights lambda of features for which an exponential family has given moments (Khalifa et al., arXiv 2012.11635).

Of p(x) ~ w(x) exp(lambda . phi(x)) on samples x_j with importance weights w_j, by self-normalised importance sampling:
the lambda that makes E_p[phi] = target maximises the concave lambda . target - log sum_j w_j exp(lambda . phi_j), whose
gradient is target - E_p[phi] and whose Hessian is -Cov_p[phi]. Newton's method finds it, with steps that are halved
until the value rises.

That is lambda of the joint law of prompt and text. A policy cannot change its prompts: one lambda for all of them has
to make the *mean over prompts* of E_{p_c}[phi] the target (conditional DPG, Korbak et al. 2021, arXiv 2112.00791). With
u_j = w_j exp(lambda . phi_j) and Z_c of the other samples (see `learner.objectives.partition_function`) that mean is

    sum_j u_j phi_j / Z_c(j)  /  sum_j u_j / Z_c(j),

and Newton's method goes on from the joint lambda until it is the target, with steps that are halved until the largest
difference falls. With one prompt it is the target already. A prompt with n samples has a Z_c that is biased by the
order of 1 / n towards the joint law; where each prompt has a single sample, lambda is that of the joint law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learner.objectives.partition_function import PartitionFunction, prompt_weights

MAX_ITERATIONS = 100
TOLERANCE = 1e-6
"""Largest difference of a moment from its target, as a share of the range of its feature."""

TELLING_SAMPLES = 32
"""A prompt with fewer samples may have values of a feature that they do not show."""


def fit_moments(features: Tensor, log_weight: Tensor, context: Tensor, targets: Tensor, names: Sequence[str]) -> Tensor:
    """[F] lambda.

    Args:
        features: [n, F] float64 of n samples. log_weight: [n] of their weights, -inf where they have no density.
        context: [n] numbers of their prompts.
        targets: [F] moments. names: [F] of the features, for messages.

    Raises:
        ValueError: no lambda gives these moments on these samples; the message says which feature, and what it was.
    """
    counted = log_weight > -torch.inf
    if not counted.any():
        raise ValueError(f"none of {len(counted):,} rollouts satisfies the pointwise constraints: {_ADVICE}")
    low, high = features[counted].amin(0), features[counted].amax(0)
    num_counted = int(counted.sum())
    bounds = zip(*_reach(features[counted], context[counted], low, high), strict=True)
    for index, (name, (least, most)) in enumerate(zip(names, bounds, strict=True)):
        goal = float(targets[index])
        if low[index] == high[index]:
            raise ValueError(
                f"feature {name} is {float(low[index]):g} in all {num_counted:,} rollouts that lambda is fitted on, so "
                f"no weight of it gives a mean of {goal:g}: {_ADVICE}"
            )
        if not float(least) < goal < float(most):
            raise ValueError(
                f"the mean of feature {name} over prompts lies between {float(least):g} and {float(most):g} in the "
                f"{num_counted:,} rollouts that lambda is fitted on, whatever its weight: a mean of {goal:g} has no "
                "finite weight. Choose one in between, other prompts, or leave target out for a pointwise constraint"
            )
    scale = high - low
    scaled, goals = (features - low) / scale, (targets - low) / scale
    joint = _joint_fit(scaled[counted], log_weight[counted], goals)
    weight = None if joint is None else _fit_over_prompts(joint, scaled, log_weight, context, goals)
    if weight is None:
        raise ValueError(
            f"no weights of {', '.join(names)} give the means {', '.join(f'{each:g}' for each in targets.tolist())} "
            f"together on {num_counted:,} rollouts: the constraints contradict each other there. {_ADVICE}"
        )
    return weight / scale


_ADVICE = (
    "raise fit_samples, choose a target or a feature nearer to what the policy does, or start from a policy that does "
    "it now and then"
)


def _reach(features: Tensor, context: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """[F] least and largest mean over prompts. low, high: [F] of all rows, which stand in for those of rare prompts."""
    _, place, counts = torch.unique(context, return_inverse=True, return_counts=True)
    of_row = place[:, None].expand_as(features)
    empty = features.new_zeros((len(counts), features.shape[1]))
    is_rare = (counts < TELLING_SAMPLES)[:, None]
    least, most = (
        torch.where(is_rare, bound, empty.scatter_reduce(0, of_row, features, how, include_self=False))[place].mean(0)
        for bound, how in ((low, "amin"), (high, "amax"))
    )
    return least, most


def _joint_fit(features: Tensor, log_weight: Tensor, goal: Tensor) -> Tensor | None:
    """[F] lambda of the joint law of prompt and text; None where it is not found."""

    def look(weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = log_weight + features @ weight
        return logits.logsumexp(0) - weight @ goal, goal - logits.softmax(0) @ features

    def covariance(weight: Tensor) -> Tensor:
        probability = (log_weight + features @ weight).softmax(0)
        centred = features - probability @ features
        return (probability[:, None] * centred).T @ centred

    return _newton(torch.zeros(len(goal), dtype=torch.float64), look, covariance)


def _fit_over_prompts(
    weight: Tensor, features: Tensor, log_weight: Tensor, context: Tensor, goal: Tensor
) -> Tensor | None:
    """[F] lambda that gives the mean over prompts, as often as the samples have each, from the joint one; None where it
    is not found."""

    def gap(weight: Tensor) -> Tensor:
        log_ratio = log_weight + features @ weight
        ratio = (log_ratio - log_ratio.detach().max()).exp()
        counts = ratio * prompt_weights(*PartitionFunction().leave_one_out(context, ratio))
        return goal - counts @ features / counts.sum()

    def look(weight: Tensor) -> tuple[Tensor, Tensor]:
        found = gap(weight)
        return found.abs().max(), found

    return _newton(weight, look, lambda weight: -torch.autograd.functional.jacobian(gap, weight))


def _newton(
    weight: Tensor, look: Callable[[Tensor], tuple[Tensor, Tensor]], slope: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """[F] where the gap is nearly 0; None where it is not found. look: what has to fall, and the gap [F]. slope: [F, F]
    by how much the gap falls."""
    for _ in range(MAX_ITERATIONS):
        value, gap = look(weight)
        if float(gap.abs().max()) < TOLERANCE:
            return weight
        ridge = 1e-12 * torch.eye(len(weight), dtype=torch.float64)
        step = torch.linalg.lstsq(slope(weight) + ridge, gap[:, None]).solution[:, 0]
        while float(step.abs().max()) > 1e-12 and not bool(look(weight + step)[0] < value):
            step = step / 2
        weight = weight + step
    return None
