"""A whole run that publishes its adapters alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from buffer.experts.tasks import load_task
from launch.settings.recipe import read_recipe
from learner.model.policy import load_policy
from learner.settings.model import ScratchModelSettings
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess, metrics_of, trajectories_of, trajectory_of

RUN_TIMEOUT_S = 280.0
PUBLICATIONS = 4  # in the stage with rollouts, after the two before its first step


@pytest.mark.slow
def test_a_run_that_publishes_adapters_alone(tmp_path: Path) -> None:
    with TrainProcess(
        tmp_path / "runs",
        str(recipe_with_adapters(tmp_path)),
        "--no-evaluate",
        *(override for override in TINY if not override.startswith("model.")),
        "learner.publish=adapter",
    ) as process:
        assert process.wait(RUN_TIMEOUT_S) == 0, process.printed()
        process.assert_nothing_left()
        folder = process.folder
    steps = metrics_of(folder, "sequencematch")
    assert [row["policy_version"] for row in steps] == [1 + step // 10 for step in range(10 * PUBLICATIONS)]
    assert all(row["staleness_max"] <= 2 for row in steps)
    acted = {
        version for batch in trajectories_of(folder) for row in batch["policy_version"].to_pylist() for version in row
    }
    assert len(acted) >= 3
    assert trajectory_of(folder, "weights_loaded")
    assert not [line for line in trajectory_of(folder) if line["level"] != "info"]


def recipe_with_adapters(folder: Path) -> Path:
    """The recipe of arithmetic for a pretrained model: what its own model is before the first step."""
    settings = read_recipe(
        Path(ARITHMETIC), [override for override in TINY if override.startswith(("model.", "task."))]
    )
    assert isinstance(settings.model, ScratchModelSettings)
    task = load_task(settings.task, max_length=settings.model.max_positions)
    policy = load_policy(settings.model, task.tokenizer)
    policy.model.save_pretrained(folder / "model")
    task.tokenizer.save_pretrained(folder / "model")
    recipe = yaml.safe_load(Path(ARITHMETIC).read_text())
    recipe["model"] = {
        "source": "pretrained",
        "name": str(folder / "model"),
        "dtype": "float32",
        "backspace_token": settings.model.backspace_token,
        "add_backspace_row": False,
        "adapter": {"rank": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
