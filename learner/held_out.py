"""Evaluation during a stage: the loss on held-out examples, the numbers of the actors' answers, and early stopping.

An evaluation changes nothing that training depends on: it takes no random number and keeps no gradient, and the policy
is in evaluation mode already. So the weights are the same with and without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from queue import SimpleQueue

import pyarrow as pa
import torch

from buffer.experts.stream import clean_trajectories
from buffer.experts.tasks import Task
from buffer.trajectory.schema import TokenContract
from learner.batches import build_micro_batches, count_batch, part_of_rank
from learner.messages import LearnerSpec
from learner.ranks import Ranks
from learner.settings.held_out import ANSWERS_STEP, HELD_OUT_LOSS, STOPPED_EARLY, HeldOutSettings
from learner.state_tree.batch import TreeSettings
from learner.state_tree.policy import TreePolicy


class HeldOutLoss:
    """Mean negative log-probability, in nats, of a token of the held-out targets (`<eos>` of complete ones included),
    under the policy; probability of backspace is missing from the tokens."""

    def __init__(self, targets: pa.RecordBatch, trees: TreeSettings, ranks: Ranks) -> None:
        """targets: trajectories without noise, the same at every rank. All ranks call this together."""
        self._ranks = ranks
        self._num_tokens = count_batch(targets).actions
        share = part_of_rank(targets, ranks.rank, ranks.size, trees.backspace_id)
        own = build_micro_batches(share, trees) if share.num_rows else []
        empty = build_micro_batches(targets.slice(0, 1), trees)[0].without_trajectories()
        self._trees = [*own, *[empty] * (ranks.maximum(len(own)) - len(own))]  # FSDP gathers in each pass

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def measure(self, policy: TreePolicy) -> float:
        """The loss over the examples of all ranks. All ranks call this together; each gets the same number."""
        total = torch.zeros((), dtype=torch.float64)
        for tree in self._trees:
            total -= policy.evaluate(tree.to(policy.device)).log_prob.double().sum().cpu()
            policy.release()
        shares = self._ranks.gather_scalars({HELD_OUT_LOSS: total})
        return sum(float(share[HELD_OUT_LOSS]) for share in shares) / self._num_tokens


class StageEvaluation:
    """The evaluations of one stage, and its early stopping. Without `evaluation.every_steps` it does nothing."""

    def __init__(self, settings: HeldOutSettings, loss: HeldOutLoss | None) -> None:
        """loss: given exactly if `every_steps` is set."""
        self._settings = settings
        self._loss = loss
        self._published_at: dict[int, int] = {}
        self._answers: SimpleQueue[tuple[int, dict[str, float]]] = SimpleQueue()
        self.questions_version = -1
        """Newest weights with which an actor has to answer held-out questions; -1 before any."""
        self.state: dict[str, float] = {}
        """Newest numbers. Of the loss and of `stop_metric` also the best value, its step, and the evaluations since."""

    def load_state(self, state: Mapping[str, float]) -> None:
        """Restore the `state` of a checkpoint; a stage that stopped early gets more steps."""
        self.state = {name: value for name, value in state.items() if name != STOPPED_EARLY}

    def published(self, step: int, version: int, publish_every_steps: int) -> None:
        """Note the weights published at `step`; an actor answers with the first ones since an evaluated step."""
        self._published_at[version] = step
        every = self._settings.every_steps
        if every is not None and step // every > (step - publish_every_steps) // every:
            self.questions_version = version

    def report_answers(self, version: int, metrics: dict[str, float]) -> None:
        """Add the metrics of answers with weights of `version` to the next step; called from any thread."""
        self._answers.put((version, metrics))

    def after_step(self, policy: TreePolicy, step: int, last_step: int) -> dict[str, float]:
        """The metrics that evaluations add to step `step` (from 1). Answers with weights of another stage are left out.
        All ranks call this together."""
        found: dict[str, float] = {}
        every = self._settings.every_steps
        if self._loss is not None and every is not None and (step % every == 0 or step == last_step):
            found[HELD_OUT_LOSS] = self._loss.measure(policy)
            self._judge(HELD_OUT_LOSS, found[HELD_OUT_LOSS], step)
            self.state[f"{HELD_OUT_LOSS}_step"] = step
        while not self._answers.empty():
            version, metrics = self._answers.get_nowait()
            if (published_at := self._published_at.get(version)) is not None:
                found |= {**metrics, ANSWERS_STEP: published_at}
                if (metric := self._settings.stop_metric) in metrics:
                    self._judge(metric, metrics[metric], published_at)
        self.state |= found
        if step == last_step:
            self.state.pop(STOPPED_EARLY, None)  # it has taken all its steps
        return found

    @property
    def stops_early(self) -> bool:
        """Whether `evaluation.patience` ends the stage before its last step."""
        return STOPPED_EARLY in self.state

    def early_stop(self, stage: str, step: int) -> str | None:
        """A note for the user why the stage ended after `step`; None if it did not stop early."""
        if not self.stops_early:
            return None
        metric = self._settings.stop_metric
        best, best_step = self.state[f"{metric}_best"], self.state[f"{metric}_best_step"]
        return (
            f"stage {stage} stopped early after step {step}: {metric} has not become better than {best:.4g} (step "
            f"{best_step:.0f}) in {self._settings.patience} evaluations"
        )

    def _judge(self, metric: str, value: float, step: int) -> None:
        """Compare a number with the best one so far; on a tie the first stays the best."""
        best, since_best = self.state.get(f"{metric}_best"), f"{metric}_since_best"
        if best is None or (value < best if metric == HELD_OUT_LOSS else value > best):
            self.state |= {f"{metric}_best": value, f"{metric}_best_step": step, since_best: 0}
            return
        self.state[since_best] += 1
        patience = self._settings.patience
        if metric == self._settings.stop_metric and patience is not None and self.state[since_best] >= patience:
            self.state[STOPPED_EARLY] = 1.0


def evaluation_of(
    spec: LearnerSpec, task: Task, contract: TokenContract, trees: TreeSettings, ranks: Ranks
) -> StageEvaluation:
    """The evaluation of a stage, on held-out examples chosen by the run's seed. All ranks call this together."""
    if spec.held_out.every_steps is None:
        return StageEvaluation(spec.held_out, None)
    targets = clean_trajectories(task.held_out_examples(spec.held_out.loss_examples, spec.seed), contract)
    return StageEvaluation(spec.held_out, HeldOutLoss(targets, trees, ranks))
