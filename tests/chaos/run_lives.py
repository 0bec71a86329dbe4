"""A run of several lives: each ends by a fault, the next goes on with `--resume`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.run_folder.folder import CLUSTER_FILE, CONFIG_FILE
from learner.checkpoints.store import read_progress
from tests.checkpoints import checkpoints_of
from tests.integration.train_process import ROOT, TrainProcess, metrics_of, trajectory_of

STAGE = "sequencematch"
STEPS = 5000
LONG = (f"stages.{STAGE}.steps={STEPS}", f"stages.{STAGE}.optimizer.schedule=constant")
"""The stage has so many steps that no fault comes too late; `shorten` says how many the last life does. A learning rate
that falls toward the last step would then fall sooner, and steps that are repeated would not be the same.
"""

START_TIMEOUT_S = 200.0
END_TIMEOUT_S = 90.0
AUDIT_TIMEOUT_S = 60.0

# What a repeated step computes again; clocks and version numbers go on.
REPEATED = ("loss", "beta", "gradient_norm", "learning_rate", "penalty", "value", "r_", "backspace", "staleness")


@dataclass(frozen=True)
class Life:
    """What one life of the run printed, and its end. step: newest one logged; checkpoint: newest one on disk."""

    folder: Path
    code: int
    stdout: str
    errors: list[str]
    step: int
    checkpoint: int


def wait_for_steps(process: TrainProcess, folder: Path, beyond: int) -> None:
    process.wait_until(lambda: newest_step(folder) > beyond + 2, START_TIMEOUT_S, f"steps beyond {beyond}")


def assert_failed(life: Life, why: str) -> None:
    assert life.code == 1, life
    assert len(life.errors) == 1, life
    assert why in life.errors[0]
    assert "go on with: sequencematch train --resume" in life.stdout


def ended(process: TrainProcess, folder: Path) -> Life:
    """After the run has ended, leaving no process, no sign of life and no traceback."""
    code = process.wait(END_TIMEOUT_S)
    process.assert_nothing_left()
    assert "Traceback" not in process.stdout + process.stderr, process.printed()
    assert not (folder / CLUSTER_FILE).exists()
    return end_of_life(folder, code, process)


def end_of_life(folder: Path, code: int, process: TrainProcess) -> Life:
    """What is on disk now."""
    return Life(
        folder,
        code,
        process.stdout,
        [line for line in process.stderr.splitlines() if line.startswith("error: ")],
        newest_step(folder),
        read_progress(checkpoints_of(folder / "checkpoints" / STAGE)[-1]).step,
    )


def newest_step(folder: Path) -> int:
    return int(metrics_of(folder, STAGE)[-1]["step"])


def shorten(folder: Path, steps: int) -> None:
    """The run was planned long, so that no kill could come too late; its rest need not be."""
    config = folder / CONFIG_FILE
    text = config.read_text()
    assert text.count(f"steps: {STEPS}\n") == 1
    config.write_text(text.replace(f"steps: {STEPS}\n", f"steps: {steps}\n"))


def pool_events(folder: Path) -> list[str]:
    """What the actor pool has told since the run began, in all lives."""
    return [line["message"] for line in trajectory_of(folder) if line["role"] == "pool"]


def assert_same_steps(folder: Path, total: int, lost: set[int]) -> None:
    """Every step was taken, those of `lost` more than once and number for number, although the actors made other
    rollouts in each life.
    """
    by_step: dict[int, list[dict[str, float]]] = {}
    for row in metrics_of(folder, STAGE):
        by_step.setdefault(int(row["step"]), []).append(row)
    assert sorted(by_step) == list(range(1, total + 1))
    assert {step for step, rows in by_step.items() if len(rows) > 1} == lost, "what no checkpoint had, and nothing else"
    for step, rows in by_step.items():
        names = [name for name in rows[0] if name.startswith(REPEATED)]
        assert len(names) > 10
        told = {name: [row[name] for row in rows] for name in names}
        assert {name: values for name, values in told.items() if len(set(values)) > 1} == {}, f"step {step}"
        versions = [row["policy_version"] for row in rows]
        assert versions == sorted(set(versions)), "weights that are published again get new numbers"


def steps_lost(*lives: Life) -> set[int]:
    """Steps that no checkpoint of these lives had, and the next life has to take again."""
    return {step for life in lives for step in range(life.checkpoint + 1, life.step + 1)}


def assert_audit_is_clean(folder: Path) -> None:
    """By the command that people use: everything is accounted for, and no id is there twice."""
    command = [str(Path(sys.executable).with_name("sequencematch")), "audit", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=AUDIT_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
