"""The folder of a run: what is written, and what is said where it is not one."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.errors import UserError
from launch.run_folder.folder import (
    CLUSTER_FILE,
    LiveCluster,
    create_run_folder,
    open_run_folder,
    read_cluster,
    remove_cluster,
    shown_path,
    write_cluster,
)
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings

NEW_RUN = {"config.yaml", "environment.txt", "run_id", "used_configs"}


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return read_recipe(Path("launch/recipes/arithmetic_cpu.yaml"), [f"runs_folder={tmp_path}/runs"])


def test_a_run_folder_gives_its_settings_back(settings: RunSettings) -> None:
    folders = {create_run_folder(settings) for _ in range(3)}  # of the same second
    assert len(folders) == 3
    for folder in folders:
        assert folder.name.startswith("arithmetic-")
        assert open_run_folder(folder) == (folder, settings)
        assert "python: 3" in (folder / "environment.txt").read_text()


def test_a_live_run_is_found_until_it_ends(settings: RunSettings) -> None:
    folder = create_run_folder(settings)
    cluster = LiveCluster("10.0.0.1:6379", folder.name, 123)
    write_cluster(folder, cluster)
    assert read_cluster(folder) == cluster
    assert {path.name for path in folder.iterdir()} == {CLUSTER_FILE, *NEW_RUN}
    remove_cluster(folder)
    remove_cluster(folder)  # a second end is no error
    with pytest.raises(UserError, match="is not live; start it with"):
        read_cluster(folder)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a run folder"):
            open_run_folder(path)
        with pytest.raises(UserError, match="not a run folder"):
            read_cluster(path)


def test_a_run_folder_appears_whole_and_takes_no_place_that_is_taken(settings: RunSettings) -> None:
    runs = Path(settings.runs_folder)
    (runs / "empty").mkdir(parents=True)
    assert {path.name for path in create_run_folder(settings, "empty").iterdir()} == NEW_RUN
    with pytest.raises(UserError, match=f"empty is there already and is a run: .* `--resume {runs}/empty`"):
        create_run_folder(settings, "empty")
    (runs / "notes").mkdir()
    (runs / "notes" / "mine.txt").write_text("")
    (runs / "file").write_text("")
    for name in ("notes", "file"):
        with pytest.raises(UserError, match=f"{name} is there already and is no run"):
            create_run_folder(settings, name)
    assert sorted(path.name for path in runs.iterdir()) == ["empty", "file", "notes"], "no draft is left"


def test_a_folder_is_shown_as_it_would_be_typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (here / "runs").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert shown_path(here / "runs") == Path("runs")
    assert shown_path(tmp_path) == tmp_path
    (here / "runs").rmdir()
    here.rmdir()  # as Ray does with the working directory of a job that has ended
    assert shown_path(tmp_path / "run") == tmp_path / "run"
