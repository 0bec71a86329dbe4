"""What the target p = P / Z of `learner.objectives.target_rules` is made of: Z of each prompt, and lambda.

**Z_c = E_mu[P(x) / mu(x)]** of each prompt (context) c. P is fixed, so Z_c is the same number for every mu and at every
step, and all rollouts of a prompt count alike, however old: a mean, not a moving average. Most prompts are seen a few
times only, or once. So the mean over all of them counts in each as one rollout of its own: with n rollouts of a prompt,

    Z_c = (sum of its ratios + mean ratio of all prompts) / (n + 1).

It is biased toward that mean, by a fraction 1 / (n + 1) of the difference; a prompt that was never seen before has the
mean itself. For a rollout x both leave x itself out, so that neither depends on it: divided by Z_c, the direction of
each prompt's own target stays unbiased, and only the weight of the prompt among the others is biased, by the above and
by E[1 / Z_c] > 1 / E[Z_c], of the order of the variance of the ratios over n Z_c^2.

**lambda**, for which an exponential family p(x) ~ w(x) exp(lambda . phi(x)) has given moments, on samples x_j with
importance weights w_j, by self-normalized importance sampling: the lambda that makes E_p[phi] = target maximizes the
concave lambda . target - log sum_j w_j exp(lambda . phi_j), whose gradient is target - E_p[phi] and whose
Hessian is -Cov_p[phi]. Newton's method finds it, with steps that are halved until the value rises.

That is lambda of the joint law of prompt and text. A policy cannot change its prompts: one lambda for all of them has
to make the *mean over prompts* of E_{p_c}[phi] the target. With u_j = w_j exp(lambda . phi_j) and Z_c of the other
samples that mean is

    sum_j u_j phi_j / Z_c(j)  /  sum_j u_j / Z_c(j),

and Newton's method goes on from the joint lambda until it is the target, with steps that are halved until the largest
difference falls. With one prompt it is the target already. A prompt with n samples has a Z_c that is biased by the
order of 1 / n toward the joint law; where each prompt has a single sample, lambda is that of the joint law.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

POOLED_ROLLOUTS = 1.0
"""The mean over all contexts counts in each as so many rollouts of its own."""

MAX_CONTEXTS = 2**17
"""Contexts that are remembered, at most (4 MiB); beyond, those go that were not added to for the longest time."""

MAX_ITERATIONS = 100
TOLERANCE = 1e-6
"""Largest difference of a moment from its target, as a fraction of the range of its feature."""

TELLING_SAMPLES = 32
"""A prompt with fewer samples may have values of a feature that they do not show."""


class PartitionFunction:
    """Means of the ratios P / mu that were added, by context; float64, in host memory."""

    def __init__(self) -> None:
        empty = torch.zeros(0, dtype=torch.int64)
        # seen: number of the last call of `add` with the context
        self._columns = {"z_context": empty, "z_total": empty.double(), "z_count": empty.double(), "z_seen": empty}

    def leave_one_out(self, context: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Z of the context of each new rollout, and the mean of Z over all contexts, each [N].

        Both from what was added and the *other* new ones, 0 without any: neither depends on the rollout itself, so they
        may serve in its baseline without bias. With one context they are equal. Differentiable in `ratio`.
        """
        contexts, totals, counts, _ = self._merged(context, ratio).values()
        place = torch.searchsorted(contexts, context)
        pooled_count = counts.sum() - 1
        pooled = torch.where(pooled_count > 0, (totals.sum() - ratio) / pooled_count, 0.0).clamp(min=0)
        total, count = totals[place] - ratio, counts[place] - 1
        z = (total.clamp(min=0) + POOLED_ROLLOUTS * pooled) / (count + POOLED_ROLLOUTS)  # a rounding error is below 0
        return z, pooled

    def add(self, context: Tensor, ratio: Tensor) -> None:
        merged = self._merged(context, ratio)
        if len(merged["z_seen"]) > MAX_CONTEXTS:
            kept = merged["z_seen"].argsort(descending=True, stable=True)[:MAX_CONTEXTS].sort().values
            merged = {name: column[kept] for name, column in merged.items()}
        self._columns = merged

    def state(self) -> dict[str, Tensor]:
        return dict(self._columns)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`, which may hold other tensors too."""
        self._columns = {name: state[name] for name in self._columns}

    def _merged(self, context: Tensor, ratio: Tensor) -> dict[str, Tensor]:
        known, total, count, seen = self._columns.values()
        contexts, place = torch.unique(torch.cat([known, context]), return_inverse=True)
        zeros = torch.zeros(len(contexts), dtype=torch.float64)
        now = torch.full_like(context, int(seen.max()) + 1 if len(seen) else 0)
        return {
            "z_context": contexts,
            "z_total": zeros.index_add(0, place, torch.cat([total, ratio])),
            "z_count": zeros.index_add(0, place, torch.cat([count, torch.ones_like(ratio)])),
            "z_seen": torch.zeros_like(contexts).scatter_reduce(0, place, torch.cat([seen, now]), "amax"),
        }


def prompt_weights(z: Tensor, pooled: Tensor) -> Tensor:
    """[N] mean of Z over Z of the rollout's prompt: what its ratio P / mu counts; 1 where nothing is known of either.
    The numerator is the same for all prompts but for the rollout that is left out: it scales the direction alone."""
    known = (z > 0) & (pooled > 0)
    return torch.where(known, pooled / torch.where(known, z, 1.0), 1.0)


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
    for name, goal, least, most in zip(
        names, targets.tolist(), *_reach(features[counted], context[counted], low, high), strict=True
    ):
        if not float(least) < goal < float(most):
            raise ValueError(
                f"the mean of feature {name} over prompts lies between {float(least):g} and {float(most):g} in the "
                f"{num_counted:,} rollouts that lambda is fitted on, so no weight of it gives a mean of {goal:g}: "
                f"choose one in between or other prompts, leave target out for a pointwise constraint, or {_ADVICE}"
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
        centered = features - probability @ features
        return (probability[:, None] * centered).T @ centered

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
