"""The training loop of one stage: sample trajectories, one forward pass per tree batch, one step of AdamW.

The loop uses neither Ray nor the disk: its caller passes the data sources and handles publication, metrics and
checkpoints, so a test can run it alone; `learner.worker` connects it to a run. With several ranks each of them runs
this loop on the same batches and evaluates its part. Loss and gradient norm are the same at every rank.

The learning rate of a step is a function of the settings and the step number. So a checkpoint holds no schedule, and a
run that is resumed with other settings follows those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from buffer.trajectory.staleness import VersionRange
from learner.batches import BatchSource, Float32, build_micro_batches, count_batch, part_of_rank, priorities_of_sample
from learner.checkpoints.checkpoint import TrainingState
from learner.metrics.alarms import behavior_metrics, finish_behavior_metrics
from learner.objectives.base import BatchCounts, EvaluatedTrajectories, Metrics, Objective, combine_metrics, is_finite
from learner.ranks import Ranks, clip_gradients, load_optimizer_state, synchronize_gradients, whole_optimizer_state
from learner.settings.stages import OptimizerSettings, StageSettings
from learner.state_tree.batch import TreeBatch, TreeSettings
from learner.state_tree.policy import TreePolicy

DEFAULT_FINAL_FRACTION = 0.05

NAMED_TRAJECTORIES = 20
"""Ids in an error message, at most."""

_SIZES = ("num_actions", "num_nodes", "num_nodes_unshared", "num_padded_nodes")
"""Sizes of tree batches that are summed over a step for its metrics."""


@dataclass(frozen=True)
class _Sample:
    """The sample of one source for a step, for all ranks. is_rollouts: from the policy, not from experts."""

    batch: pa.RecordBatch
    counts: BatchCounts
    loss: Callable[[EvaluatedTrajectories], tuple[Tensor, Metrics]]
    is_rollouts: bool = False


_Pass = tuple[TreeBatch, _Sample]
"""One forward and backward pass: a micro-batch of this rank's part of a sample."""


class Trainer:
    """One stage of training, step by step.

    policy: sharded if there are several `ranks`. experts: used if the objective needs them. rollouts: given exactly if
    it needs them. Both sources give the same at every rank. report_priorities: called after each step with the
    priority of each rollout in the order of the sample; at every rank or at none.
    """

    def __init__(
        self,
        policy: TreePolicy,
        objective: Objective,
        stage: StageSettings,
        trees: TreeSettings,
        experts: BatchSource,
        rollouts: BatchSource | None,
        ranks: Ranks | None = None,
        report_priorities: Callable[[Float32], None] | None = None,
    ) -> None:
        assert (rollouts is not None) == objective.settings.needs_rollouts
        self.step = 0
        self._policy = policy
        self._objective = objective
        self._stage = stage
        self._trees = trees
        self._experts = experts
        self._rollouts = rollouts
        self._ranks = ranks or Ranks()
        self._report_priorities = report_priorities
        self._optimizer = make_optimizer(policy.model, stage.optimizer)

    @property
    def finished(self) -> bool:
        return self.step >= self._stage.steps

    def train_step(self) -> dict[str, float]:
        """Sample, evaluate, update the weights; returns the metrics of the step.

        Raises:
            FloatingPointError: the loss or the gradient is not finite, on the trajectories that it names, or see
                `Objective.optimizer_step`; the weights are as they were before. OutsideDomainError: see
                `Objective.check`; the weights likewise.
            RankLostError: another rank failed.
        """
        started = time.perf_counter()
        draws = self._sample()
        drawn = time.perf_counter()
        rollouts = next((draw for draw in draws if draw.is_rollouts), None)
        passes = self._passes(draws)
        with self._ranks.exchange(f"step {self.step}"):
            if rollouts is not None:
                trees = [tree for tree, draw in passes if draw.is_rollouts]
                self._objective.begin_step(self._policy, trees, rollouts.counts, self.step)
            combined, gradient_norm, priorities = self._accumulate(passes)
        loss = float(combined["loss"])
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise FloatingPointError(
                f"step {self.step}: loss {loss:.4g}, gradient norm {gradient_norm:.4g}; "
                f"lower the learning rate or alpha. {self._blame(draws)}"
            )
        self._objective.check(combined, self.step)
        self._objective.optimizer_step()
        learning_rate = self._learning_rate()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.step += 1
        if self._report_priorities is not None:
            assert rollouts is not None, "priorities are those of rollouts"
            self._report_priorities(priorities_of_sample(rollouts.batch, priorities, self._ranks))
        sizes = {name: int(combined.pop(name)) for name in _SIZES}
        seconds = time.perf_counter() - started
        return {
            **finish_behavior_metrics({name: float(value) for name, value in combined.items()}),
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate,
            "step_s": seconds,
            "data_wait_s": drawn - started,
            "actions_per_s": sizes["num_actions"] / seconds,
            "unique_tokens_per_s": sizes["num_nodes"] / seconds,
            "sharing_ratio": sizes["num_nodes_unshared"] / sizes["num_nodes"],
            "padding_fraction": 1.0 - sizes["num_nodes"] / sizes["num_padded_nodes"],
        }

    def _sample(self) -> list[_Sample]:
        draws, data_counts = [], BatchCounts(0, 0, 0)
        if self._objective.settings.needs_experts:
            experts = self._experts.sample(self._stage.batch_size)
            data_counts = count_batch(experts)
            draws.append(_Sample(experts, data_counts, partial(self._objective.data_loss, step=self.step)))
        if self._rollouts is not None:
            rollouts = self._rollouts.sample(self._stage.rollout_batch_size)
            newest = int(VersionRange.from_batch(rollouts).newest.max())
            loss = partial(self._rollout_loss, data_counts=data_counts, newest=newest)
            draws.append(_Sample(rollouts, count_batch(rollouts), loss, is_rollouts=True))
        return draws

    def _passes(self, draws: list[_Sample]) -> list[_Pass]:
        """This rank's passes over its parts of the samples: equally many at every rank, since FSDP gathers in each."""
        passes = [(tree, draw) for draw in draws for tree in self._trees_of(draw.batch)]
        missing = self._ranks.maximum(len(passes)) - len(passes)
        if missing:
            nothing = replace(draws[0], is_rollouts=False)
            passes += missing * [(self._tree_without_trajectories(nothing.batch), nothing)]
        return passes

    def _trees_of(self, batch: pa.RecordBatch) -> list[TreeBatch]:
        """State trees of this rank's part; one without trajectories if it is empty, so that metrics exist."""
        share = part_of_rank(batch, self._ranks.rank, self._ranks.size, self._trees.backspace_id)
        return build_micro_batches(share, self._trees) if share.num_rows else [self._tree_without_trajectories(batch)]

    def _tree_without_trajectories(self, batch: pa.RecordBatch) -> TreeBatch:
        """A small tree on which every loss, gradient and count is zero."""
        return build_micro_batches(batch.slice(0, 1), self._trees)[0].without_trajectories()

    def _rollout_loss(
        self, trajectories: EvaluatedTrajectories, data_counts: BatchCounts, newest: int
    ) -> tuple[Tensor, Metrics]:
        """The loss of the objective, with the metrics of every objective. newest: newest policy version in the
        sample."""
        loss, metrics = self._objective.rollout_loss(trajectories, data_counts, self.step)
        return loss, metrics | behavior_metrics(trajectories, self._trees.backspace_id, newest)

    def _accumulate(self, passes: list[_Pass]) -> tuple[Metrics, float, list[tuple[tuple[str, ...], Tensor]]]:
        """Gradients of the step, summed over passes and ranks and clipped. Gives metrics and sizes; the norm before
        clipping; ids and priorities of each prioritized pass of this rank."""
        self._optimizer.zero_grad(set_to_none=True)
        shares, priorities = [], []
        for number, (tree, draw) in enumerate(passes, start=1):
            synchronize_gradients(self._policy, enabled=number == len(passes))
            trajectories = self._objective.evaluate(self._policy, tree.to(self._policy.device), draw.counts, self.step)
            loss, metrics = draw.loss(trajectories)
            if draw.is_rollouts and self._report_priorities is not None:
                priorities.append((tree.trajectories.ids, self._objective.priorities(trajectories)))
            loss.backward()
            shares.append(metrics)
        shares.append({name: torch.tensor(sum(getattr(tree, name) for tree, _ in passes)) for name in _SIZES})
        metrics = combine_metrics(self._ranks.gather_scalars(combine_metrics(shares)))
        gradient_norm = float(clip_gradients(self._policy, self._stage.optimizer.max_grad_norm))
        return metrics, gradient_norm, priorities

    def _blame(self, draws: list[_Sample]) -> str:
        """Name the trajectories whose loss alone is not finite, since one of them makes a whole pass not finite. Every
        rank evaluates all of them, since the ranks run their passes together."""
        blamed = []
        for draw in draws:
            for row, name in enumerate(draw.batch.column("id").to_pylist()):
                (tree,) = build_micro_batches(draw.batch.slice(row, 1), self._trees)
                with torch.no_grad():
                    trajectories = self._objective.evaluate(
                        self._policy, tree.to(self._policy.device), draw.counts, self.step
                    )
                if not is_finite(trajectories, draw.loss):
                    blamed.append(name)
        if not blamed:
            return "Every trajectory alone has a finite loss: the gradient overflowed inside the model"
        more = f" and {len(blamed) - NAMED_TRAJECTORIES} more" if len(blamed) > NAMED_TRAJECTORIES else ""
        drawn = sum(draw.batch.num_rows for draw in draws)
        return f"Not finite on {len(blamed)} of {drawn} trajectories: {', '.join(blamed[:NAMED_TRAJECTORIES])}{more}"

    def state(self) -> TrainingState:
        """The state besides weights and data sources that later steps depend on; it fits any number of ranks. All ranks
        call this together; only rank 0 gets the optimizer's tensors."""
        return {
            "step": self.step,
            "optimizer": whole_optimizer_state(self._optimizer, self._ranks),
            "learning_rate": self._learning_rate(),
            "random_state": torch.get_rng_state(),
            "objective": self._objective.state(),
        }

    def load_state(self, state: TrainingState) -> str | None:
        """Restore `state()` of the same stage, saved by any number of ranks; every rank passes the whole state. The
        current settings and number of steps apply. Returns a note for the user if they change the learning rate."""
        self.step = state["step"]
        load_optimizer_state(self._optimizer, state["optimizer"])
        torch.set_rng_state(state["random_state"])
        self._objective.load_state(state["objective"])
        before, now = state["learning_rate"], self._learning_rate()
        if now == before:
            return None
        return (
            f"stage {self._stage.name} goes on after step {self.step} with learning rate {now:.4g} instead of "
            f"{before:.4g}, since its steps or its optimizer have changed"
        )

    def _learning_rate(self) -> float:
        """Of the next step."""
        optimizer = self._stage.optimizer
        return optimizer.learning_rate * learning_rate_factor(self.step, optimizer, self._stage.steps)


def make_optimizer(model: PreTrainedModel, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, without weight decay for vectors (norms, biases)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() > 1]
    vectors = [parameter for parameter in trainable if parameter.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def learning_rate_factor(step: int, settings: OptimizerSettings, steps: int) -> float:
    """Fraction of the peak learning rate at `step` (from 0) of `steps`: linear warm-up, then constant or a cosine down
    to `final_fraction` of the peak at the last step."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    final = DEFAULT_FINAL_FRACTION if settings.final_fraction is None else settings.final_fraction
    done = (step - settings.warmup_steps) / max(steps - 1 - settings.warmup_steps, 1)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
