"""docs/guide.md speaks of things that exist: metrics, settings, overrides that a recipe takes, commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.main import get_command

from launch.cli import app
from launch.report.evaluation import METRICS
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "launch" / "recipes" / "arithmetic_cpu.yaml"
QUOTED = re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"))
OVERRIDES = sorted({text for text in QUOTED if re.fullmatch(r"[a-z_.]+=[^ ]+", text)})


def test_every_name_is_a_metric_a_setting_or_a_choice() -> None:
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    schema = json.dumps(RunSettings.model_json_schema())
    names = {text for text in QUOTED if re.fullmatch(r"[a-z0-9_]+", text)}
    stages = {stage.name for stage in read_recipe(RECIPE).stages}
    unknown = {name for name in names if f"`{name}`" not in table and f'"{name}"' not in schema}
    assert unknown - METRICS.keys() - stages == set()
    assert len(names) > 30


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_of_the_guide_is_taken(override: str) -> None:
    read_recipe(RECIPE, [override])


def test_commands_exist() -> None:
    commands = {text.split()[1] for text in QUOTED if text.startswith("sequencematch ")}
    assert commands
    assert commands <= get_command(app).commands.keys()  # type: ignore[attr-defined]
