"""What the processes of `test_ranks` do: the same steps on the same batches, each as one rank of several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from queue import Empty

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from buffer.experts.stream import ExpertStream
from buffer.settings import NoiseSettings
from buffer.weights import WeightManifest, fingerprint, pack_tensors, unpack
from learner.batches import Float32, SharedBatchSource, StopRequestedError, build_micro_batches
from learner.demonstrations import Demonstrations
from learner.held_out import HeldOutLoss
from learner.model.adapters import add_adapters
from learner.model.backspace_row import fit_backspace_row
from learner.model.loading import checkpoint_activations
from learner.objectives import make_objective
from learner.precision import hold_trained_parameters
from learner.publication import frozen_tensors, low_rank_updates, publication_tensors, trained_tensors
from learner.ranks import Ranks, gathered, join_ranks, load_tensors, open_rendezvous, shard
from learner.settings.model import AdapterSettings
from learner.settings.stages import StageSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer
from tests.random_trajectories import CLONING, MATCHING, TREES, RandomTrajectories, random_trajectories
from tests.tiny_models import perturbed, tiny_model
from tests.trajectories import BACKSPACE, CONTRACT, EOS, VOCAB

TIMEOUT_S = 60.0
HANG_TIMEOUT_S = 15.0
PROCESS_TIMEOUT_S = 500.0  # on a busy machine the imports of four processes take minutes
STEPS = 3
FITTED_LOGS = 12
RESUMED = "llama, tied"


ALL_TRUE = {"name": "scheduled_sampling", "schedule": "linear", "k": 1.0}
ADVERSARIAL = {"name": "adversarial_js", "discriminator": {"warmup_steps": 0}}
KL_CONTROL = {"name": "kl_control", "beta": 0.3}
GDC_PP = {"name": "gdc_pp", "constraints": [{"feature": "odd"}]}


@dataclass(frozen=True)
class Case:
    """A model and the sizes of its batches. rollouts: 0 = an objective without. adapters: only they are trained.
    param_dtype: of the trained parameters; null = `dtype`. objective: null = that of its kind with most parts.
    """

    kind: str
    tied: bool
    experts: int
    rollouts: int
    max_grad_norm: float = 1e9
    adapters: bool = False
    recomputed: bool = False
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    objective: Mapping[str, object] | None = None

    @property
    def has_priorities(self) -> bool:
        """Whether the objective says how much there is to learn from each rollout."""
        return bool(self.rollouts) and self.objective is None

    @property
    def tolerance(self) -> float:
        """Of tensors, as a share of their largest entry. bfloat16 keeps eight bits, and with parameters in float32 one
        rank rounds at other places (autocast) than several (FSDP). The weight of a whole rollout comes from differences
        between sums, which multiply what rounding there is."""
        if self.dtype == torch.bfloat16:
            return 0.02 if self.param_dtype is None else 0.05
        is_score_function = self.rollouts > 0 and self.objective is not None
        return 1e-5 if is_score_function else 1e-6

    def model(self) -> PreTrainedModel:
        model = tiny_model(self.kind, tied=self.tied).to(self.dtype)
        model.config.dtype = self.dtype
        if self.recomputed:
            checkpoint_activations(model)
        if self.adapters:
            add_adapters(model, AdapterSettings(rank=4), base_name="tiny", revision=None, seed=0)
        if self.param_dtype is not None:
            hold_trained_parameters(model, self.param_dtype)
        return model

    def stage(self) -> StageSettings:
        return StageSettings.model_validate(
            {
                "name": "s",
                "objective": self.objective or (MATCHING if self.rollouts else CLONING),
                "steps": 6,
                "batch_size": self.experts,
                "rollout_batch_size": max(self.rollouts, 1),
                "optimizer": {
                    "learning_rate": 1e-3,
                    "warmup_steps": 2,
                    "max_grad_norm": self.max_grad_norm,
                    "weight_decay": 0.1,
                    "eps": 1e-3,  # else Adam makes full steps of gradients that are zero but for rounding
                },
            }
        )


CASES = {
    "llama, tied": Case("llama", True, experts=8, rollouts=5),
    "llama, untied, clipped": Case("llama", False, experts=7, rollouts=6, max_grad_norm=0.1),
    "gpt2": Case("gpt2", True, experts=6, rollouts=6),
    "adapters": Case("llama", True, experts=6, rollouts=6, adapters=True),
    "activations recomputed": Case("llama", False, experts=6, rollouts=6, recomputed=True),
    "bfloat16": Case("llama", True, experts=6, rollouts=6, dtype=torch.bfloat16),
    "bfloat16, trained in float32": Case(
        "llama", True, experts=6, rollouts=6, dtype=torch.bfloat16, param_dtype=torch.float32
    ),
    "bfloat16, adapters and recomputed": Case(
        "llama",
        False,
        experts=6,
        rollouts=6,
        adapters=True,
        recomputed=True,
        dtype=torch.bfloat16,
        param_dtype=torch.float32,
    ),
    "one trajectory": Case("llama", True, experts=1, rollouts=0),
    "three trajectories and one rollout": Case("llama", False, experts=3, rollouts=1),
    "unlikelihood": Case("llama", True, experts=6, rollouts=0, objective={"name": "unlikelihood"}),
    "emo": Case("llama", False, experts=3, rollouts=0, objective={"name": "emo"}),
    # What is drawn depends on which trajectories a pass holds, so here all tokens are true; there are two passes all
    # the same.
    "scheduled sampling": Case("llama", True, experts=6, rollouts=0, objective=ALL_TRUE),
    "adversarial": Case("llama", True, experts=6, rollouts=6, objective=ADVERSARIAL),
    "adversarial, two rollouts": Case("llama", False, experts=1, rollouts=2, objective=ADVERSARIAL),
    "kl control": Case("llama", True, experts=1, rollouts=7, objective=KL_CONTROL),
    "gdc_pp": Case("llama", False, experts=1, rollouts=7, objective=GDC_PP),
    "reinforce, one rollout": Case("llama", False, experts=1, rollouts=1, objective={"name": "reinforce"}),
}


def make_trainer(
    case: Case,
    ranks: Ranks,
    drawn: int = 0,
    model: PreTrainedModel | None = None,
    report_priorities: Callable[[Float32], None] | None = None,
) -> tuple[TreePolicy, Trainer]:
    """A trainer of `case` at this rank, after `drawn` steps; the sources exist at rank 0 only."""
    policy = TreePolicy(model or case.model(), BACKSPACE)
    shard(policy, ranks)

    def shared(source: str) -> SharedBatchSource:
        return SharedBatchSource(ranks, RandomTrajectories(source, drawn) if ranks.leads else None, lambda: False)

    stage = case.stage()
    rollouts = shared("policy") if case.rollouts else None
    objective = make_objective(stage.objective, ranks, partial(_frozen_start, case, ranks), ("odd",))
    trainer = Trainer(policy, objective, stage, TREES, shared("expert"), rollouts, ranks, report_priorities)
    return policy, trainer


def _frozen_start(case: Case, ranks: Ranks) -> TreePolicy:
    """A neighbor of the model that is trained: else the first step would not see it."""
    neighbor = perturbed(tiny_model(case.kind, tied=case.tied), seed=1, scale=0.01)
    base = TreePolicy(neighbor.requires_grad_(False), BACKSPACE)
    shard(base, ranks)
    return base


def weights(policy: TreePolicy) -> dict[str, Tensor]:
    """Whole tensors by name, at every rank."""
    return {name: tensor.clone() for name, tensor in publication_tensors(policy.model)}


def taken(policy: TreePolicy) -> dict[str, Tensor]:
    """The same as an actor has them when frozen and trained tensors travel apart."""
    payload, entries = pack_tensors(chain(frozen_tensors(policy.model), trained_tensors(policy.model)))
    manifest = WeightManifest(0, fingerprint(entries, payload), entries, (), (), low_rank_updates(policy.model))
    return {name: tensor.clone() for name, tensor in unpack(payload, manifest)}


def first_steps(ranks: Ranks, case: Case, count: int) -> dict[str, object]:
    """What `count` steps leave; the gradients are those of the first."""
    priorities: list[Tensor] = []
    report = (lambda reported: priorities.append(torch.from_numpy(reported))) if case.has_priorities else None
    policy, trainer = make_trainer(case, ranks, report_priorities=report)
    metrics = [trainer.train_step()]
    held_out = HeldOutLoss(random_trajectories("expert", 5, seed=9), TREES, ranks)  # not a part of what is trained on
    metrics[0]["held_out_loss"] = held_out.measure(policy)
    trained = {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    gradients = {name: gathered(parameter.grad) for name, parameter in trained.items()}
    metrics += [trainer.train_step() for _ in range(count - 1)]
    probe = torch.from_numpy(policy.sequence_logprobs((5, 9, 4, 20)))
    final = weights(policy)
    traveling = taken(policy)
    shown = own_mistakes(ranks, policy)
    fit_backspace_row(policy, build_micro_batches(random_trajectories("expert", FITTED_LOGS, seed=0), TREES))
    # No whole copies are left that would be read, or written to, in place of the parts.
    assert all(isinstance(parameter, DTensor) == (ranks.size > 1) for parameter in policy.parameters())
    return {
        "metrics": metrics,
        "gradients": gradients,
        "weights": final,
        "taken": traveling,
        "shown": shown,
        "fitted": weights(policy),
        "state": trainer.state(),
        "probe": probe,
        "priorities": dict(enumerate(priorities)),
    }


def own_mistakes(ranks: Ranks, policy: TreePolicy) -> Tensor:
    """Actions of demonstrations with noise of the policy's own; ranks that would draw other tokens than rank 0."""
    random = np.random.default_rng(0)
    targets = [[*random.integers(3, VOCAB, 6).tolist(), EOS] for _ in range(FITTED_LOGS)]
    examples = pa.table({"prompt_ids": [[7]] * FITTED_LOGS, "target_ids": targets})
    noise = NoiseSettings(kind="policy", rate=0.5)
    stream = ExpertStream(examples, task="random", noise=noise, contract=CONTRACT, seed=0)
    batch = Demonstrations(policy, stream, TREES, ranks, seed=ranks.rank).sample(FITTED_LOGS)
    drawn = zlib.crc32(repr(batch.column("executed").to_pylist()).encode())
    assert ranks.sum_vector(torch.tensor([drawn])).tolist() == [ranks.size * drawn], "ranks hold other demonstrations"
    return torch.tensor(batch.column("actions").flatten().to_pylist())


def more_steps(ranks: Ranks, case: Case, saved: dict[str, object], count: int) -> dict[str, object]:
    """`count` further steps from what `first_steps` gave, perhaps with another number of ranks."""
    policy, trainer = make_trainer(case, ranks, drawn=saved["state"]["step"])
    load_tensors(policy.model.state_dict(keep_vars=True), saved["weights"])
    trainer.load_state(saved["state"])
    metrics = [trainer.train_step() for _ in range(count)]
    return {"metrics": metrics, "weights": weights(policy), "state": trainer.state()}


def run_ranks(size: int, work: Callable[[Ranks, Path], None], folder: Path, timeout_s: float = TIMEOUT_S) -> list[int]:
    """Run `work` in `size` processes; gives their exit codes (negative: the signal that ended them).

    timeout_s: of every wait of a rank for the others.
    """
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    processes = [
        context.Process(target=_be_rank, args=(rank, size, ports, work, folder, timeout_s), daemon=True)
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(PROCESS_TIMEOUT_S)
        assert all(process.exitcode is not None for process in processes), "a rank hangs"
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def _be_rank(
    rank: int,
    size: int,
    ports: multiprocessing.Queue[int],
    work: Callable[[Ranks, Path], None],
    folder: Path,
    timeout_s: float,
) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        store = open_rendezvous("127.0.0.1", size, timeout_s)
        for _ in range(1, size):
            ports.put(store.port)
        ranks = join_ranks(0, size, store, timeout_s)
    else:
        try:
            ranks = join_ranks(rank, size, ("127.0.0.1", ports.get(timeout=PROCESS_TIMEOUT_S)), timeout_s)
        except Empty:
            raise TimeoutError("rank 0 did not open a rendezvous point") from None
    work(ranks, folder)
    dist.destroy_process_group()


def run_cases(ranks: Ranks, folder: Path) -> None:
    """Every case, and one that goes on from where a single rank (`alone.pt`) stopped; rank 0 writes the results."""
    for name, case in CASES.items():
        _write(ranks, first_steps(ranks, case, STEPS), folder / f"{name}.pt")
    saved = torch.load(folder / "alone.pt", weights_only=True)
    _write(ranks, more_steps(ranks, CASES[RESUMED], saved, STEPS), folder / "resumed.pt")


def _write(ranks: Ranks, result: dict[str, object], path: Path) -> None:
    if ranks.leads:
        torch.save(result, path)


class FailingSource:
    """At rank 0 the second draw fails, with `error`."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._draws = 0

    def sample(self, count: int) -> pa.RecordBatch:
        self._draws += 1
        if self._draws > 1:
            raise self._error
        return random_trajectories("expert", count, seed=1)


def failing_draws(ranks: Ranks, folder: Path) -> None:
    """A request to stop, and a failure, at rank 0: every rank writes down what it is told."""
    told = []
    for error in (StopRequestedError(), TimeoutError("no rollouts came")):
        source = SharedBatchSource(ranks, FailingSource(error) if ranks.leads else None, lambda: False)
        assert source.sample(3).equals(random_trajectories("expert", 3, seed=1))
        told.append(_error_of(source.sample, 3))
    asked = SharedBatchSource(ranks, RandomTrajectories("expert") if ranks.leads else None, lambda: True)
    told.append(_error_of(asked.sample, 3))
    (folder / f"draws {ranks.rank}.txt").write_text("\n".join(told))


def diverges(ranks: Ranks, folder: Path) -> None:
    """A loss beyond all numbers: every rank writes down what it is told."""
    case = CASES["llama, untied, clipped"]
    model = case.model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e25)
    _, trainer = make_trainer(case, ranks, model=model)
    (folder / f"diverged {ranks.rank}.txt").write_text(_error_of(trainer.train_step))


def loses_a_rank(ranks: Ranks, folder: Path) -> None:
    """The last rank is killed in the middle of a step; the others write down what they are told, and after how long."""
    _, trainer = make_trainer(CASES["gpt2"], ranks)
    if ranks.rank == ranks.size - 1:
        trainer._accumulate = lambda passes: os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    told = _error_of(trainer.train_step)
    (folder / f"lost {ranks.rank}.txt").write_text(f"{time.monotonic() - started}\n{told}")


def hangs(ranks: Ranks, folder: Path) -> None:
    """Rank 1 does nothing for much longer than `HANG_TIMEOUT_S`; rank 0 writes down what it is told."""
    if ranks.leads:
        (folder / "hung.txt").write_text(_error_of(ranks.maximum, 1))
    else:
        time.sleep(2 * HANG_TIMEOUT_S)


def failures(ranks: Ranks, folder: Path) -> None:
    """One after the other, so that processes are started once."""
    failing_draws(ranks, folder)
    diverges(ranks, folder)
    loses_a_rank(ranks, folder)


def _error_of(function: Callable[..., object], *arguments: object) -> str:
    try:
        function(*arguments)
    except (FloatingPointError, RuntimeError, TimeoutError, StopRequestedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
