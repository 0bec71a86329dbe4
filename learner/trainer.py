"""The training loop of one stage: draw trajectories, one forward pass per tree batch, one optimizer step.

The loop knows neither Ray nor the disk: data, publication, metrics and checkpoints come in as seams, so that it runs
alone in a test. `learner.worker` wires it to a run.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.action_values import action_values
from learner.batch_source import BatchSource
from learner.checkpoint import TrainingState
from learner.micro_batches import TreeSettings, build_micro_batches
from learner.objectives.base import EvaluatedLogs, LogCounts, Metrics, Objective, combine_metrics
from learner.optimizer import make_optimizer, make_schedule
from learner.stage_settings import StageSettings
from learner.state_tree import TreeBatch


class Trainer:
    """One stage of training, step by step.

    Args:
        experts: expert trajectories. rollouts: policy trajectories, exactly where the objective needs them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        stage: StageSettings,
        trees: TreeSettings,
        experts: BatchSource,
        rollouts: BatchSource | None,
    ) -> None:
        assert (rollouts is not None) == objective.needs_rollouts
        self.step = 0
        self._model = model
        self._objective = objective
        self._stage = stage
        self._trees = trees
        self._experts = experts
        self._rollouts = rollouts
        self._optimizer = make_optimizer(model, stage.optimizer)
        self._schedule = make_schedule(self._optimizer, stage.optimizer, stage.steps)
        # Gradients flow in evaluation mode too. In training mode a model with dropout would be a random sub-network on
        # every step, so log-probabilities, values and the published probe would not be those of the model that acts.
        model.eval()

    @property
    def finished(self) -> bool:
        """Whether all steps of the stage are done."""
        return self.step >= self._stage.steps

    def train_step(self) -> dict[str, float]:
        """Draw, evaluate, step; gives the metrics of the step.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; the weights are as they were before.
        """
        started = time.perf_counter()
        experts = build_micro_batches(self._experts.draw(self._stage.batch_size), self._trees)
        policy = (
            []
            if self._rollouts is None
            else build_micro_batches(self._rollouts.draw(self._stage.rollout_batch_size), self._trees)
        )
        drawn = time.perf_counter()
        self._optimizer.zero_grad(set_to_none=True)
        data_counts, policy_counts = LogCounts.of(experts), LogCounts.of(policy)
        shares = []
        for tree in experts:
            evaluated = self._evaluate(tree, data_counts)
            shares.append(self._backward(self._objective.data_loss(evaluated, self.step)))
        for tree in policy:
            evaluated = self._evaluate(tree, policy_counts)
            shares.append(self._backward(self._objective.rollout_loss(evaluated, data_counts, self.step)))
        objective_metrics = combine_metrics(shares)
        loss = objective_metrics["loss"]
        gradient_norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._stage.optimizer.max_grad_norm)
        if not bool(torch.isfinite(loss) & torch.isfinite(gradient_norm)):
            raise FloatingPointError(
                f"step {self.step}: loss {loss.item():.4g}, gradient norm {gradient_norm.item():.4g}; "
                "lower the learning rate or alpha"
            )
        learning_rate = self._schedule.get_last_lr()[0]
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        seconds = time.perf_counter() - started
        trees = [*experts, *policy]
        num_actions = sum(tree.num_actions for tree in trees)
        num_nodes = sum(tree.num_nodes for tree in trees)
        return {
            **{name: float(value) for name, value in objective_metrics.items()},
            "gradient_norm": float(gradient_norm),
            "learning_rate": learning_rate,
            "step_s": seconds,
            "data_wait_s": drawn - started,
            "actions_per_s": num_actions / seconds,
            "nodes_per_s": num_nodes / seconds,
            "sharing_ratio": sum(tree.num_nodes_unshared for tree in trees) / num_nodes,
        }

    def _evaluate(self, tree: TreeBatch, counts: LogCounts) -> EvaluatedLogs:
        tree = tree.to(self._model.device)
        return EvaluatedLogs(tree, action_values(self._model, tree, self._trees.backspace_id), counts)

    @staticmethod
    def _backward(loss_and_metrics: tuple[Tensor, Metrics]) -> Metrics:
        loss, metrics = loss_and_metrics
        loss.backward()
        return metrics

    def state(self) -> TrainingState:
        """Everything but the weights that the next step depends on, apart from the data sources."""
        return {
            "step": self.step,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "random_state": torch.get_rng_state(),
        }

    def load_state(self, state: TrainingState) -> None:
        """Go on from `state()` of the same stage."""
        step = state["step"]
        assert isinstance(step, int)
        self.step = step
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random_state"])
