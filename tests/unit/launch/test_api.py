"""The project from Python on run folders that are there: what a run gives, live or finished, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from buffer.experts.tasks import Task
from buffer.store.shard import SampleKey
from launch.api import UserError, evaluate, generate, open_run, resume, train
from launch.run_folder.folder import create_run_folder
from launch.settings.recipe import read_recipe
from launch.stop_signals import stop_handlers_kept, stop_signals_interrupt
from tests.checkpoints import progress_at, write_progress
from tests.run_folders import RECIPE, STEPS, finished_run, new_run
from tests.stores import open_store
from tests.trajectories import batch_of, row

REFUSED = "cluster.address=127.0.0.1:1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, task: Task) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "run", task)


def test_importing_it_imports_nothing_heavy() -> None:
    program = "import sys, launch.api; print([name for name in ('torch', 'ray', 'vllm', 'transformers', 'datasets') if "
    program += "name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout == "[]\n"


def test_metrics_of_a_run_and_of_a_stage(folder: Path) -> None:
    run = open_run(folder)
    table = run.metrics()
    assert table.num_rows == sum(STEPS.values())
    assert table.column("staleness_mean").null_count == STEPS["pretrain"] + STEPS["mle_control"]
    stage = run.metrics("pretrain")
    assert stage.column("step").to_pylist() == list(range(1, STEPS["pretrain"] + 1))
    assert stage.column("loss")[1].as_py() == 2.5
    with pytest.raises(UserError, match="has no stage 'pretrian'; its stages are: pretrain, sequencematch"):
        run.metrics("pretrian")


def test_a_run_without_a_step_has_no_metrics_and_no_buffer(tmp_path: Path) -> None:
    run = open_run(new_run(tmp_path / "run"))
    assert run.metrics().num_rows == 0
    assert (run.checkpoints(), run.evaluation) == ([], None)
    with pytest.raises(UserError, match="holds no replay buffer"):
        run.buffer()
    with pytest.raises(UserError, match="no checkpoint of stage 'sequencematch' yet"):
        assert run.result
    with pytest.raises(UserError, match="is not live"):
        run.status()


def test_the_buffer_as_table_data_set_and_sql(folder: Path) -> None:
    run = open_run(str(folder))
    table, before = run.buffer(), pa.total_allocated_bytes()
    data = run.dataset()
    assert pa.total_allocated_bytes() - before < table.nbytes / 2, "the columns are the mapped files of the shard"
    assert table.num_rows == len(data) == 120
    assert data.column_names == table.column_names
    assert data[7]["actions"] == table.column("actions")[7].as_py()
    found = run.query("select source, count(*) as n from trajectories group by source")
    assert found.to_pylist() == [{"source": "policy", "n": 120}]
    assert isinstance(run.query("select final_text from trajectories limit 1").column(0)[0].as_py(), str)
    with pytest.raises(UserError, match="nothing"):
        run.query("select nothing from trajectories")


def test_the_buffer_of_a_live_run(tmp_path: Path) -> None:
    """While its shard has it open, and after each insert."""
    run = open_run(new_run(tmp_path / "run"))
    store = open_store(run.folder / "buffer" / "shard-000")
    for count in (1, 2):
        store.insert(batch_of([row(f"a{count}")]))
        assert run.buffer().num_rows == count
    assert store.sample(SampleKey("sequencematch", 0, "policy"), 1, 1) is not None
    assert sorted(run.buffer().column("times_sampled").to_pylist()) == [0, 1]
    store.close()


def test_checkpoints_and_the_evaluation(tmp_path: Path, folder: Path) -> None:
    run = open_run(new_run(tmp_path / "run"))
    for stage, step in (("pretrain", 30), ("pretrain", 60), ("sequencematch", 40)):
        write_progress(run.settings, run.folder, progress_at(step, stage=stage, metrics={"loss": 60 / step}))
    found = run.checkpoints()
    assert [(each.stage, each.step, each.metrics["loss"]) for each in found] == [
        ("pretrain", 30, 2.0),
        ("pretrain", 60, 1.0),
        ("sequencematch", 40, 1.5),
    ]
    assert run.result == run.folder / "checkpoints" / "sequencematch" / "step-000040"
    assert found[-1].location == str(run.result)
    evaluation = open_run(folder).evaluation
    assert evaluation is not None
    assert evaluation.checkpoints[0].metrics["greedy"]["accuracy"].value == 0.9


def test_recipes_are_files_mappings_or_settings() -> None:
    settings = read_recipe(RECIPE, ["actors.count=2"])
    tree = settings.model_dump()
    assert read_recipe(tree) == read_recipe(settings) == read_recipe(str(RECIPE), ["actors.count=2"]) == settings
    assert read_recipe(settings, ["actors.count=3", "stages.pretrain.steps=5"]).stages[0].steps == 5
    read_recipe(tree, ["actors.count=3"])
    assert tree["actors"]["count"] == 2, "what the caller gave stays as it is"
    with pytest.raises(UserError, match="did you mean 'count'"):
        read_recipe({**tree, "actors": {"conut": 1}})


def test_what_is_refused_leaves_nothing_and_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = [f"runs_folder={tmp_path}", REFUSED]
    for name in (None, "mine"):
        with pytest.raises(UserError, match="no Ray cluster answers"):
            train(RECIPE, overrides, name=name, evaluate=False)
    with pytest.raises(UserError, match="give name too"):
        train(RECIPE, overrides, resume_if_exists=True)
    with pytest.raises(UserError, match="cannot name a run"):
        train(RECIPE, overrides, name="a/b")
    with pytest.raises(UserError, match="is not a run folder"):
        resume(tmp_path)
    with pytest.raises(UserError, match="name at least one"):
        evaluate([])
    with pytest.raises(UserError, match="no checkpoint at"):
        evaluate(tmp_path / "nothing")
    with pytest.raises(UserError, match="count >= 1"):
        generate(tmp_path, "1", count=0)
    with pytest.raises(UserError, match="is not a checkpoint: it has no config"):
        generate(tmp_path, "1")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_console_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(create_run_folder(read_recipe(RECIPE, [f"runs_folder={tmp_path}"])))
    for stage in run.settings.stages:
        write_progress(run.settings, run.folder, progress_at(stage.steps, stage=stage.name, stage_steps=stage.steps))
    assert resume(run.folder, evaluate=False) == open_run(run.folder)
    assert capsys.readouterr().out == ""
    resume(run.folder, evaluate=False, console=Console())
    assert "is finished: no stage is left to train" in capsys.readouterr().out


def test_beside_the_main_thread_signals_stay_as_they_are() -> None:
    """Python allows handlers to the main thread alone."""
    done: list[str] = []

    def work() -> None:
        with stop_signals_interrupt(), stop_handlers_kept():
            done.append("inside")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert done == ["inside"]
