"""What is compared: objectives, each under a label, with settings of their own and of the recipe where asked."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from buffer.settings import Settings
from launch.errors import UserError
from launch.settings.files import read_yaml
from launch.settings.recipe import JsonSchema, Tree, apply_override, explain
from learner.settings.objectives import ObjectiveSettings
from learner.settings.stages import StageSettings

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

RECIPE_KEY = "recipe"
"""In a file of objectives, beside an objective's own settings: what else is different in its runs."""


class Arm(Settings):
    """One side of a comparison. recipe: overrides of the recipe, as `noise.rate=0.1`, that hold for its runs alone."""

    objective: ObjectiveSettings
    recipe: tuple[str, ...] = ()


_OBJECTIVE: TypeAdapter[ObjectiveSettings] = TypeAdapter(ObjectiveSettings)


def parse_objectives(text: str, stages: tuple[StageSettings, ...]) -> dict[str, Arm]:
    """Arms of `name` or `name:key=value,key=value`, separated by commas, by label.

    An objective that `stages` (the first of them that has it) uses has the settings from there, then its own.

    Raises:
        UserError: one is unknown, malformed or named twice.
    """
    arms: dict[str, Arm] = {}
    for spec in _specs(text):
        name, colon, settings = spec.partition(":")
        _check_name(name)
        if colon and not settings:
            raise UserError(f"--objectives {spec}: no setting after the colon; write {name}, or {name}:key=value")
        tree = _settings_in(stages, name)
        for override in settings.split(",") if settings else []:
            apply_override(tree, override)
        label = re.sub(r"[^A-Za-z0-9_.]+", "-", spec).strip("-")
        if label in arms:
            raise UserError(f"objective {spec} is named twice")
        arms[label] = Arm(objective=_resolve(tree, f"--objectives {spec}"))
    return arms


def read_objectives(path: Path) -> dict[str, Arm]:
    """Arms of a YAML file: a mapping from labels to objectives as a stage of a recipe has them, each of which may have
    a list `recipe` of overrides beside its own settings.

    Raises:
        UserError: see `read_yaml`; or the file holds no such mapping.
    """
    tree = read_yaml(path, "file of objectives")
    if not isinstance(tree, dict) or not all(isinstance(value, dict) for value in tree.values()):
        raise UserError(f"{path} is no mapping from labels to objectives, as in `cautious: {{name: emo, mode: 2}}`")
    for label in tree:
        if not _LABEL.fullmatch(str(label)):
            raise UserError(f"{path}: label {label!r} is to name a folder: use letters, digits, '_', '.' and '-'")
    return {str(label): _arm(settings, f"{path}: {label}") for label, settings in tree.items()}


def _arm(tree: Tree, where: str) -> Arm:
    overrides = tree.pop(RECIPE_KEY, [])
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise UserError(f"{where}: {RECIPE_KEY} is no list of overrides, as in `{RECIPE_KEY}: [noise.rate=0.1]`")
    return Arm(objective=_resolve(tree, where), recipe=tuple(overrides))


def _resolve(tree: Tree, where: str) -> ObjectiveSettings:
    _check_name(str(tree.get("name")))
    try:
        return _OBJECTIVE.validate_python(tree)
    except ValidationError as error:
        schema: JsonSchema = _OBJECTIVE.json_schema()
        raise UserError(f"{where}: {explain(error, schema)}") from None


def _check_name(name: str) -> None:
    known = sorted(_OBJECTIVE.json_schema()["discriminator"]["mapping"])
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
        raise UserError(f"unknown objective {name!r}; {hint}")


def _specs(text: str) -> list[str]:
    """Splits at commas; a part such as `alpha=0.1` goes on with the settings of the objective before it."""
    specs: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        is_setting = "=" in part.partition(":")[0]
        if is_setting and specs and ":" in specs[-1]:
            specs[-1] += f",{part}"
        elif is_setting:
            raise UserError(f"--objectives: setting {part} follows no objective with settings; write NAME:{part}")
        elif part:
            specs.append(part)
    return specs


def _settings_in(stages: tuple[StageSettings, ...], name: str) -> Tree:
    for stage in stages:
        if stage.objective.name == name:
            return stage.objective.model_dump(mode="json")
    return {"name": name}
