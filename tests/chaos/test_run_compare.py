"""`sequencematch compare` as people start it: two objectives, interrupted after the first one, resumed with one more
seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.local_ray import cluster_to_join
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess, metrics_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

OBJECTIVES, SEEDS, STEPS, PRETRAIN_STEPS = ("mle", "behavior_cloning"), (0, 1), 6, 20
RUN_TIMEOUT_S = 300.0
COMPARISON_TIMEOUT_S = 800.0
RECIPE = (ARITHMETIC, *(override for override in TINY if not override.startswith("cluster.")))
OPTION = ("--objectives", ",".join(OBJECTIVES))


@dataclass(frozen=True)
class Compared:
    folder: Path
    first_stderr: str
    first_stdout: str
    stdout: str
    untouched_ns: tuple[int, int]
    """When the first objective's final weights were written: before the interruption, and as they are now."""

    def run(self, objective: str, seed: int) -> Path:
        return self.folder / "objectives" / f"{self.folder.name}-{objective}-seed{seed}"

    def tree(self) -> dict[str, list[dict[str, object]]]:
        found: dict[str, list[dict[str, object]]] = json.loads((self.folder / "compare.json").read_text())
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with cluster_to_join() as address:
        yield address


@pytest.fixture(scope="module")
def compared(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    runs = tmp_path_factory.mktemp("runs")
    folder = runs / "pair"
    options = (*OPTION, "--seeds", "1", "--steps", str(STEPS), "--name", folder.name)
    first_run = folder / "objectives" / f"pair-{OBJECTIVES[0]}-seed0"
    with TrainProcess(runs, *RECIPE, cluster, *options, command="compare") as process:
        second_run = folder / "objectives" / f"pair-{OBJECTIVES[1]}-seed0"
        process.wait_until(second_run.is_dir, RUN_TIMEOUT_S, "the second objective to begin")
        process.interrupt()
        assert process.wait(RUN_TIMEOUT_S) == 130, process.printed()
        first_stdout, first_stderr = process.stdout, process.stderr
    weights = first_run / "checkpoints" / "compared" / f"step-{STEPS:06d}" / "model.safetensors"
    written_ns = weights.stat().st_mtime_ns
    more_seeds = ("--seeds", str(len(SEEDS)))
    with TrainProcess(runs, "--resume", str(folder), *more_seeds, command="compare") as process:
        assert process.wait(COMPARISON_TIMEOUT_S) == 0, process.printed()
        stdout = process.stdout
    return Compared(folder, first_stderr, first_stdout, stdout, (written_ns, weights.stat().st_mtime_ns))


def test_an_interruption_says_how_to_go_on(compared: Compared) -> None:
    assert f"go on with: sequencematch compare --resume {compared.folder}" in compared.first_stdout
    assert "Traceback" not in compared.first_stdout + compared.first_stderr
    assert re.search(rf"run 2 of 3, about [\d:]+ left: {OBJECTIVES[0]}, seed 0", compared.first_stdout)


def test_what_was_finished_is_not_repeated(compared: Compared) -> None:
    before, now = compared.untouched_ns
    assert before == now
    assert f"{OBJECTIVES[0]}, seed 0" not in compared.stdout
    for objective in OBJECTIVES:
        for seed in SEEDS:
            rows = metrics_of(compared.run(objective, seed))
            assert [(row["stage"], row["step"]) for row in rows] == [("compared", step + 1) for step in range(STEPS)]


def test_objectives_of_a_seed_share_their_start_and_their_examples(compared: Compared) -> None:
    first_losses = {}
    for seed in SEEDS:
        start = compared.folder / "starts" / f"pair-start-seed{seed}"
        assert [row["stage"] for row in metrics_of(start)] == PRETRAIN_STEPS * ["pretrain"]
        for objective in OBJECTIVES:
            pretrain = compared.run(objective, seed) / "checkpoints" / "pretrain"
            assert pretrain.resolve() == (start / "checkpoints" / "pretrain").resolve()
            first_losses[objective, seed] = metrics_of(compared.run(objective, seed))[0]["loss"]
    # Maximum likelihood on clean data and behavior cloning on noise are different losses; so are the seeds.
    assert len(set(first_losses.values())) == len(OBJECTIVES) * len(SEEDS)


def test_the_table_and_its_files_hold_every_run(compared: Compared) -> None:
    tree = compared.tree()
    assert [(run["objective"], run["seed"], run["steps"]) for run in tree["runs"]] == [
        (objective, seed, STEPS) for seed in SEEDS for objective in OBJECTIVES
    ]
    assert tree["failures"] == {}
    # Corrected noise makes texts longer: in equal steps, the objectives are not trained on as many actions.
    actions = {(run["objective"], run["seed"]): run["actions"] for run in tree["runs"]}
    assert actions["behavior_cloning", 0] > actions["mle", 0]
    (accuracy,) = (metric for metric in tree["metrics"] if metric["name"] == "greedy.accuracy")
    difference = accuracy["differences"]["behavior_cloning"]
    assert (difference["basis"], difference["num_seeds"]) == ("examples", 2)
    evaluations = [compared.folder / "evaluation" / f"seed{seed}" / "evaluation.json" for seed in SEEDS]
    assert [json.loads(file.read_text())["seed"] for file in evaluations] == list(SEEDS)
    assert "The spread over seeds is unknown" in compared.stdout
    page = (compared.folder / "compare.html").read_text()
    reports = [f"objectives/{run.name}/report.html" for run in (compared.folder / "objectives").iterdir()]
    assert len(reports) == len(SEEDS) * len(OBJECTIVES)
    assert all((compared.folder / report).is_file() and f'href="{report}"' in page for report in reports)
