"""What building an image would do, without Docker: its own install steps in a clean folder and a new environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dockerfiles import CPU, CUDA, ROOT, Stage, ignored, read_stages, without_mounts

INSTALL_TIMEOUT_S = 1200.0
RESOLVE_TIMEOUT_S = 240.0
pytestmark = pytest.mark.timeout(INSTALL_TIMEOUT_S + 60.0)


def lay_out(stage: Stage, folder: Path) -> None:
    """COPY, as far as `.dockerignore` lets it."""

    def left_out(parent: str, names: list[str]) -> list[str]:
        here = Path(parent).relative_to(ROOT)
        return [name for name in names if ignored(str(here / name))]

    for sources, target in stage.copies():
        for source in sources:
            assert not ignored(source), f"{source} is copied, and .dockerignore leaves it out"
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target, ignore=left_out)
            else:
                shutil.copy(ROOT / source, folder / target)


def run(command: str, folder: Path, environment: dict[str, str], timeout_s: float) -> str:
    done = subprocess.run(
        ["sh", "-ec", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def clean_environment() -> dict[str, str]:
    """That of this process, without what would lead into the environment that the tests run in."""
    own = {"VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL"}
    return {name: value for name, value in os.environ.items() if name not in own}


def test_the_steps_of_the_cpu_image_give_a_program_that_runs(tmp_path: Path) -> None:
    build, final = read_stages(CPU)
    folder, target = tmp_path / "build", tmp_path / "venv"
    folder.mkdir()
    lay_out(build, folder)
    python = getattr(sys, "_base_executable", sys.executable)
    environment = clean_environment() | build.environment() | {"VENV": str(target), "PYTHON": python}
    steps = [without_mounts(step) for step in build.all("RUN") if "apt-get" not in step]
    assert steps == ["make dependencies", "make install"]
    for step in steps:
        run(step, folder, environment, INSTALL_TIMEOUT_S)

    shutil.rmtree(folder)  # the final stage has the environment alone
    home = tmp_path / "home"
    home.mkdir()
    environment = clean_environment() | {"PATH": f"{target}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    checks = [step for step in final.all("RUN") if "apt-get" not in step]
    assert checks, "the image is not tried when it is built"
    for check in checks:
        run(check, home, environment, RESOLVE_TIMEOUT_S)
    plan = run(
        f"sequencematch train {ROOT}/launch/recipes/arithmetic_cpu.yaml --dry-run", home, environment, RESOLVE_TIMEOUT_S
    )
    assert "name: arithmetic" in plan
    installed = run("python -c 'import launch; print(launch.__file__)'", home, environment, RESOLVE_TIMEOUT_S)
    assert installed.startswith(str(target))


def test_the_versions_of_the_cuda_image_fit_together(tmp_path: Path) -> None:
    """Its wheels have many gigabytes: resolved, not downloaded."""
    build = read_stages(CUDA)[0]
    environment = build.environment()
    assert environment["ENGINE"] == "gpu"
    extras = [word for extra in ("gpu", *environment["EXTRAS"].split()) for word in ("--extra", extra)]
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    command = [uv, "pip", "install", "--dry-run", "--python", str(tmp_path / "venv" / "bin" / "python")]
    done = subprocess.run(
        [*command, "--constraint", "constraints.txt", "-r", "pyproject.toml", *extras],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RESOLVE_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    planned = {line[3:] for line in done.stderr.splitlines() if line.startswith(" + ")}
    assert [name for name in planned if name.startswith("torch==")] == ["torch==2.13.0"]
    assert any(name.startswith("nvidia-cudnn") for name in planned)
    assert any(name.startswith("vllm==") for name in planned)
    # Whoever builds the image next month gets the same versions.
    pinned = set((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    assert {name for name in planned - pinned if not name.startswith(UNPINNED)} == set()


UNPINNED = ("torchvision==", "torchaudio==", "torchcodec==")
"""Named exactly by vLLM's own requirements."""
