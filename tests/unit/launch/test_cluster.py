"""A Ray that cannot be started or joined is told in one line, after a time that is known."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from launch.cluster.connection import cluster_to_join, join_live_run, run_cluster
from launch.errors import RunFailedError, UserError
from launch.run_folder.folder import LiveCluster
from launch.settings.recipe import read_recipe

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers, as the head of a cluster that hangs or dies does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_cluster_that_hangs_is_not_waited_for(silent_server: str, tmp_path: Path) -> None:
    settings = read_recipe(RECIPE, [f"cluster.address={silent_server}", "cluster.connect_timeout_s=1"])
    message = (
        rf"no Ray cluster answers at {silent_server}, which cluster.address names: .* no answer within 1 s; .* raise "
        r"cluster.connect_timeout_s .* or set cluster.address=local to start Ray for this run"
    )
    with pytest.raises(UserError, match=message), run_cluster(settings, tmp_path):
        raise AssertionError("joined something")
    run = LiveCluster(silent_server, "run", driver_pid=1)
    with pytest.raises(UserError, match="no Ray cluster answers"), join_live_run(run, timeout_s=0.5):
        raise AssertionError("joined something")
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1, which RAY_ADDRESS names: .*; "),
        ("http://127.0.0.1:1", "which RAY_ADDRESS names: .* `sequencematch submit --address http://127.0.0.1:1`; "),
        ("nowhere", "which RAY_ADDRESS names: it is neither `auto`, `local` nor HOST:PORT; "),
    ],
)
def test_a_useless_ray_address_is_blamed_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, problem: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=problem) as caught, run_cluster(read_recipe(RECIPE), tmp_path):
        raise AssertionError("joined something")
    assert "cluster.address" not in str(caught.value)
    assert str(caught.value).endswith("or unset RAY_ADDRESS to start Ray for this run")


@pytest.mark.parametrize(("variable", "overrides"), [("local", []), ("127.0.0.1:1", ["cluster.address=local"])])
def test_local_is_the_word_for_a_ray_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, overrides: list[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cluster_to_join(read_recipe(RECIPE, overrides).cluster) is None


def start_that_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    def init(**options: object) -> None:
        assert options["address"] == "local"
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with run_cluster(read_recipe(RECIPE), tmp_path):
        raise AssertionError("started something")


def test_a_start_that_takes_too_long_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The class and the words are those of Ray 2.60."""
    late = Exception("The current node timed out during startup. This could happen because ...")
    with pytest.raises(RunFailedError, match=r"own time limit \(The current node timed out"):
        start_that_raises(monkeypatch, tmp_path, late)
    with pytest.raises(ZeroDivisionError):
        start_that_raises(monkeypatch, tmp_path, ZeroDivisionError("a defect keeps its traceback"))


def test_a_ray_for_one_run_does_not_grow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = read_recipe(RECIPE, ["cluster.grow_timeout_s=5"])
    with pytest.raises(UserError, match=r"leave it out or name the cluster"), run_cluster(settings, tmp_path):
        raise AssertionError("started something")


def test_ray_has_minutes_to_start_unless_the_user_says_otherwise() -> None:
    """Ray reads these once, so they are there before it is imported."""
    names = ("RAY_gcs_server_port_wait_time_s", "RAY_raylet_start_wait_time_s")
    inherited = {key: value for key, value in os.environ.items() if key not in names}
    program = f"import os, launch.cluster.connection; print(*(os.environ[name] for name in {names}))"
    shown = [
        subprocess.run(
            [sys.executable, "-c", program], env={**inherited, **given}, capture_output=True, text=True, check=True
        ).stdout.split()
        for given in ({}, {names[1]: "7"})
    ]
    assert shown == [["180", "180"], ["180", "7"]]
