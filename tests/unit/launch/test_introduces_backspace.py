"""Which stage of a recipe is the first to show backspaces, to which a pretrained model's new row is fitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.settings.recipe import read_recipe
from launch.settings.run import introduces_backspace

TEXT, ARITHMETIC = Path("launch/recipes/text_cpu.yaml"), Path("launch/recipes/arithmetic_cpu.yaml")


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        (TEXT, [], ["behaviour_cloning"]),
        (TEXT, ["noise.kind=none"], []),
        (TEXT, ["noise.kind=policy"], ["behaviour_cloning"]),
        (TEXT, ["stages.behaviour_cloning.objective={name: mle}"], ["sequencematch"]),
        (ARITHMETIC, [], ["sequencematch"]),  # its control starts from the trunk and shows none
        (ARITHMETIC, ["stages.mle_control.objective={name: behaviour_cloning}"], ["sequencematch", "mle_control"]),
    ],
)
def test_the_first_stage_of_each_line_that_shows_any(recipe: Path, overrides: list[str], expected: list[str]) -> None:
    settings = read_recipe(recipe, overrides)
    assert [stage.name for stage in settings.stages if introduces_backspace(settings, stage)] == expected
