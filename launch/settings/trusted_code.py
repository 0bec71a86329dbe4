"""Which modules a recipe may have imported: those that whoever runs it names outside of the recipe."""

from __future__ import annotations

import os

from actors.scoring.settings import FunctionSettings, ScoringSettings
from launch.errors import UserError

TRUSTED_MODULES = "SEQUENCEMATCH_TRUSTED_MODULES"
"""Environment variable with the names of modules, separated by commas."""


def check_trusted(scoring: ScoringSettings) -> None:
    """Refuse scorers that run code of modules which are not trusted by name.

    Raises:
        UserError: there are some; it names them.
    """
    trusted = {name.strip() for name in os.environ.get(TRUSTED_MODULES, "").split(",")}
    for name, settings in scoring.scorers.items():
        if not isinstance(settings, FunctionSettings):
            continue
        module = settings.function.partition(":")[0]
        if module not in trusted:
            raise UserError(
                f"{name} of the recipe runs code, function {settings.function}. Read it, and if you trust it say so "
                f"with {TRUSTED_MODULES}={module} in the environment (`submit`: --env {TRUSTED_MODULES}={module})"
            )
