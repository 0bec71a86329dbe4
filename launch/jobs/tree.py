"""What a submitted job works in: our packages as they are installed here, and the recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

import launch
from launch.settings.recipe import write_recipe
from launch.settings.run import RunSettings

PACKAGES = ("actors", "buffer", "launch", "learner")
RECIPE_FILE = "recipe.yaml"
_NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.pyc")


def write_job_tree(folder: Path, settings: RunSettings | None) -> None:
    """Fill an empty folder, from a checkout and from an installation alike; nothing else of either is sent.

    settings: become the tree's `recipe.yaml`; None where the job goes on with a run that has its own.
    """
    source = Path(launch.__file__).parents[1]
    for package in PACKAGES:
        shutil.copytree(source / package, folder / package, ignore=_NOT_SHIPPED)
    if settings is not None:
        write_recipe(settings, folder / RECIPE_FILE)
