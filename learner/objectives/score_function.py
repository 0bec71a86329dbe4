"""Objectives that climb along a score function: E_mu[c(x) grad log pi(x)] over whole rollouts x.

Here pi is the policy of now, mu the one that made the rollout, whose log-probability the actor stored, and x the log of
all actions, backspaces and `<eos>` included; where a rollout was cut off, its actions up to there. pi is taken at
temperature 1, whatever the actors sampled at: mu is what they sampled from.

The coefficient c of a rollout may depend on all rollouts of the step (a leave-one-out baseline, an estimate of a
normalising constant), which lie in several passes and at several ranks. So a step has two rounds: the first evaluates
all rollouts without gradient and gathers a few numbers of each at every rank (`Rollouts`), from which the coefficients
are found; the second is the one with a gradient, of -sum_i c_i log pi(x_i) / N. The result depends neither on how logs
are packed into passes nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import xxhash
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from learner.objectives.base import EvaluatedLogs, LogCounts, Metrics, PlainObjective
from learner.objectives.likelihood import likelihood_metrics
from learner.ranks.group import Ranks
from learner.state_tree.batch import TreeBatch
from learner.state_tree.policy import TreePolicy

_NUM_PLAIN_COLUMNS = 6


@dataclass(frozen=True)
class Rollouts:
    """What there is to know of N rollouts: float64, in host memory, without gradient.

    key, context: [N] numbers of trajectory and prompt, the same wherever these occur. log_pi, log_mu, log_base: [N] of
    the whole log, under the policy of now, the one that made it, and the frozen one (nan where there is none). reward:
    [N] (nan where there is none). features: [N, F].
    """

    key: Tensor
    context: Tensor
    log_pi: Tensor
    log_mu: Tensor
    log_base: Tensor
    reward: Tensor
    features: Tensor

    @property
    def weight(self) -> Tensor:
        """[N] pi(x) / mu(x)."""
        return (self.log_pi - self.log_mu).exp()

    def __len__(self) -> int:
        return len(self.log_pi)

    def __getitem__(self, rows: Tensor) -> Rollouts:
        return Rollouts(**{name: values[rows] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Weighed:
    """coefficients: [N] c of each rollout. metrics: of the whole step."""

    coefficients: Tensor
    metrics: Mapping[str, float]


class Rule(Protocol):
    """What tells one method from the others: how rollouts are weighed, and what is learned from them beside that."""

    def weigh(self, rollouts: Rollouts) -> Weighed:
        """The coefficients of a step; a pure function of the rollouts and of what was learned before.

        Raises:
            ValueError: the rollouts lack what the method needs.
        """
        ...

    def learn(self, rollouts: Rollouts) -> None:
        """The step is taken: remember what the next ones need."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What is remembered."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`."""
        ...

    def renews_proposal(self) -> bool:
        """Whether the policy of now should be the one that acts; asked where it would be published."""
        ...


class ScoreFunction(PlainObjective):
    """A rule, applied.

    Args:
        name: of the objective. ranks: that train together. base: frozen; where the rule compares with it.
    """

    needs_rollouts = True

    def __init__(self, name: str, rule: Rule, ranks: Ranks, base: TreePolicy | None = None) -> None:
        self.name = name
        self._rule = rule
        self._ranks = ranks
        self._base = base
        self._rollouts: Rollouts | None = None
        self._coefficient: dict[int, float] = {}
        self._metrics: Mapping[str, float] = {}

    @property
    def needs_experts(self) -> bool:
        """Rollouts are all it uses."""
        return False

    def prepare(self, policy: TreePolicy, rollouts: Sequence[TreeBatch], counts: LogCounts, step: int) -> None:
        """The first round: coefficients of all rollouts of the step."""
        missing = self._ranks.maximum(len(rollouts)) - len(rollouts)  # FSDP gathers in each pass
        trees = [*rollouts, *missing * [rollouts[0].without_trajectories()]]
        table = self._gather(torch.cat([self._look_at(policy, tree) for tree in trees]))
        if isinstance(self._base, FSDPModule):
            self._base.reshard()  # its root waits for a backward pass that never comes
        assert len(table) == counts.logs
        key, context, log_pi, log_mu, log_base, reward = table[:, :_NUM_PLAIN_COLUMNS].unbind(1)
        gathered = Rollouts(key.long(), context.long(), log_pi, log_mu, log_base, reward, table[:, _NUM_PLAIN_COLUMNS:])
        sound = log_pi.isfinite() & (log_base.isfinite() if self._base is not None else True)
        # The loss will not be finite either, where the policy gave no number; with a coefficient that is one, the
        # trainer can tell the rollouts to blame for it from those that only shared a pass with them.
        coefficients = torch.full_like(log_pi, torch.nan).masked_fill(~log_pi.isfinite(), 1.0)
        self._rollouts, self._metrics = gathered[sound], {}
        if sound.any():
            weighed = self._rule.weigh(self._rollouts)
            coefficients[sound] = weighed.coefficients
            self._metrics = weighed.metrics
        self._coefficient = dict(zip(key.long().tolist(), coefficients.tolist(), strict=True))

    def data_loss(self, data: EvaluatedLogs, step: int) -> tuple[Tensor, Metrics]:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"objective {self.name} takes no expert logs")

    def rollout_loss(self, rollouts: EvaluatedLogs, data_counts: LogCounts, step: int) -> tuple[Tensor, Metrics]:
        """-c log pi, mean over the rollouts of the global batch."""
        tree, log_prob = rollouts.tree, rollouts.values.log_prob
        coefficients = torch.tensor(
            [self._coefficient[_key(name)] for name in tree.trajectories.ids],
            dtype=log_prob.dtype,
            device=log_prob.device,
        )
        loss = -rollouts.mean_over_logs(coefficients[tree.actions.trajectory] * log_prob)
        share = tree.num_trajectories / max(rollouts.counts.logs, 1)
        metrics = {
            "loss": loss.detach(),
            **{name: loss.new_tensor(value * share) for name, value in self._metrics.items()},
            **{f"{name}_model": value for name, value in likelihood_metrics(rollouts).items()},
        }
        return loss, metrics

    def advance(self) -> None:
        """Remember what the next steps need of this one."""
        assert self._rollouts is not None, "advance() comes after prepare()"
        self._rule.learn(self._rollouts)

    def renews_proposal(self) -> bool:
        """As the rule says."""
        return self._rule.renews_proposal()

    def state(self) -> dict[str, Tensor]:
        """Of the rule."""
        return self._rule.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Of the rule."""
        self._rule.load_state(state)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _look_at(self, policy: TreePolicy, tree: TreeBatch) -> Tensor:
        """[L, 6 + F] columns of `Rollouts`."""
        tree = tree.to(policy.device)
        log_pi = _per_log(policy.evaluate(tree).log_prob, tree)
        log_base = torch.full_like(log_pi, torch.nan)
        if self._base is not None:
            log_base = _per_log(self._base.evaluate(tree).log_prob, tree)
        keys = torch.tensor([_key(name) for name in tree.trajectories.ids], dtype=torch.float64)
        context, reward = tree.trajectories.context, tree.trajectories.reward
        columns = [context, log_pi, _per_log(tree.actions.behavior_log_prob, tree), log_base, reward]
        plain = torch.stack([keys, *(column.cpu().double() for column in columns)], dim=1)
        return torch.cat([plain, tree.trajectories.features.cpu().double()], dim=1)

    def _gather(self, own: Tensor) -> Tensor:
        """[N, K] the rows [n, K] of all ranks, in the order of ranks, at every rank."""
        if self._ranks.size == 1:
            return own
        counts = torch.zeros(self._ranks.size, dtype=torch.float64)
        counts[self._ranks.rank] = len(own)
        counts = self._ranks.sum_vector(counts).long()
        begin = int(counts[: self._ranks.rank].sum())
        table = torch.zeros(int(counts.sum()), own.shape[1], dtype=torch.float64)
        table[begin : begin + len(own)] = own
        return self._ranks.sum_vector(table)


def _per_log(per_action: Tensor, tree: TreeBatch) -> Tensor:
    """[L] float64 sums of a [A] tensor over the actions of each log."""
    # See `SequenceMatch.priorities` for why neither `index_add` nor a check of the lengths.
    return torch.segment_reduce(per_action.double(), "sum", lengths=tree.trajectories.length, initial=0, unsafe=True)


def _key(name: str) -> int:
    """A number for a trajectory's id that float64 holds exactly."""
    return xxhash.xxh3_64_intdigest(name.encode()) >> 12
