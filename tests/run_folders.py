"""Run folders as a run of minutes leaves them, made in a moment: by the writers of the real thing, without a model."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from actors.pool.controller import MemberStatus, PoolStatus
from actors.rollout_actor import ActorStatus
from buffer.experts.tasks import Task
from buffer.service.shard import shard_folder
from buffer.settings import BufferSettings
from buffer.store.shard import SampleKey
from buffer.store.store import ReplayStore
from launch.evaluation.report import write_evaluation
from launch.evaluation.results import CheckpointResult, Evaluation
from launch.monitoring.live_view import RunView
from launch.monitoring.run_log import RunLog
from launch.report.gather import Action, Report, Rollout, gather
from launch.run_folder.folder import BUFFER_FOLDER, CONFIG_FILE
from launch.run_folder.task import save_run_tokenizer
from launch.settings.recipe import read_recipe, write_recipe
from launch.statistics import Estimate
from learner.messages import LearnerStatus
from learner.metrics.log import MetricsLog
from tests.rollouts import rollouts

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "arithmetic_cpu.yaml"
STEPS = {"pretrain": 60, "sequencematch": 40, "mle_control": 40}
VERSIONS = 4
ROWS_PER_VERSION = 30
CLOCK_STARTS = 1_700_000_000.0


class Clock:
    """What `time.time` says to everything below; `tick_s` pass with each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tick_s: float) -> None:
        self.now = CLOCK_STARTS
        self._tick_s = tick_s
        monkeypatch.setattr(time, "time", self)

    def __call__(self) -> float:
        self.now += self._tick_s
        return self.now


def new_run(folder: Path) -> Path:
    """A run folder of the arithmetic recipe in which nothing has happened yet."""
    folder.mkdir(parents=True)
    overrides = [f"stages.{stage}.steps={steps}" for stage, steps in STEPS.items()]
    write_recipe(read_recipe(RECIPE, overrides), folder / CONFIG_FILE)
    (folder / "environment.txt").write_text("command: sequencematch train arithmetic_cpu.yaml\npython: 3.11\n")
    return folder


def write_metrics(run: Path, stages: dict[str, int] = STEPS) -> None:
    """Every step of the stages, with a few metrics and one that no chart knows."""
    with MetricsLog(run, trackers=()) as log:
        for stage, steps in stages.items():
            for step in range(1, steps + 1):
                metrics = {"loss": 5.0 / step, "gradient_norm": 1.0, "step_s": 0.1, "of_tomorrow": float(step)}
                if stage == "sequencematch":
                    metrics |= {"backspace_rate": 0.1, "backspace_prob": 0.2, "staleness_mean": 1.0}
                log.write(stage, step, metrics)


def write_log(run: Path) -> None:
    """Two actors; actor 1 dies and is born again, and takes every second version only."""
    learner = LearnerStatus("sequencematch", 0, STEPS["sequencematch"], 0.1, -1, "training", {})
    with RunLog(run) as log:
        log.write("info", "driver", "run_started", "the run begins")
        for version in range(VERSIONS):
            status = LearnerStatus(learner.stage, 10 * version, 40, 0.1, version, "training", {})
            view = RunView(run.name, [], learner=status)
            for seen in (0, 1):  # the driver hears of the push first
                members = [member(0, version if seen else version - 1, 100 * version + 50)]
                members.append(member(1, version - version % 2, 10 * (version % 3)))
                view.pool = PoolStatus(2, version, tuple(members))
                log.follow(view)
        log.write("warning", "learner", "learner_warning", "<b>backspaces take over</b>")
        log.write("info", "driver", "run_finished", "the run is finished")


def member(index: int, version: int, actions: int) -> MemberStatus:
    """A running actor."""
    name = f"actor-{index}"
    return MemberStatus(name, "running", 0, ActorStatus(name, version, actions, 1.0, 0, 0, 0, 0, "generating"))


def write_buffer(run: Path, task: Task) -> None:
    """Rollouts of every version, and a draw after each of them."""
    folder = shard_folder(run / BUFFER_FOLDER, 0)
    store = ReplayStore(folder, task.contract(), BufferSettings(capacity=400, min_size=1), seed=0)
    for version in range(VERSIONS):
        store.insert(rollouts(task, version * ROWS_PER_VERSION, ROWS_PER_VERSION, version))
        assert store.sample(SampleKey("sequencematch", version, "policy"), 16, version) is not None
    store.close()
    save_run_tokenizer(task.tokenizer, run)


def write_evaluation_file(run: Path) -> None:
    """Two checkpoints: one recovers, the other does not; both are equally right."""
    checkpoints = [
        evaluated("sequencematch", accuracy=(0.90, 500), recovery=(0.75, 500), of_tomorrow=(3.5, 500)),
        evaluated("mle_control", accuracy=(0.89, 500), recovery=(0.0, 500), of_tomorrow=(2.5, 500)),
    ]
    write_evaluation(Evaluation.of("arithmetic", 500, 0, checkpoints, {}, {}), run)


def evaluated(label: str, **shares: tuple[float, int]) -> CheckpointResult:
    """A checkpoint's result; shares: value and number of cases, in one group of rollouts."""
    numbers = {
        name: Estimate(value, (abs(value * (1 - value)) / count) ** 0.5, count)
        for name, (value, count) in shares.items()
    }
    return CheckpointResult(label, Path("checkpoints") / label, {"greedy": numbers})


def finished_run(folder: Path, task: Task) -> Path:
    """With everything that a report can show."""
    run = new_run(folder)
    write_metrics(run)
    write_log(run)
    write_buffer(run, task)
    write_evaluation_file(run)
    (run / "samples" / "mle_control.txt").write_text("> 1 + 1\n3   (wrong)\n")
    return run


HOSTILE = "</script><script>window.broken=1</script><img src=x onerror=window.broken=1>\u2028{{ 7*7 }}"


def hostile_report(folder: Path) -> Report:
    """Whatever a model, a data set or an error can write into a page tries to break out of it."""
    run = new_run(folder)
    write_metrics(run)
    write_log(run)
    write_evaluation_file(run)
    (run / "samples" / "sequencematch.txt").write_text(HOSTILE)
    report = gather(run)
    report.notes.append(HOSTILE)
    actions = [Action("write", HOSTILE, True, -9.0, 3), Action("backspace", "", False, -0.5, 3)]
    actions.append(Action("end", "", False, -0.1, 4))
    rollout = Rollout(HOSTILE, CLOCK_STARTS, HOSTILE, "aborted", 0.5, tuple(actions))
    report.rollouts = [rollout]
    return report
