"""Reading a recipe: YAML with dotted overrides, and errors that name the file, the key and what to write instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from buffer.disk import writing_to
from buffer.settings import ABSOLUTE_PATHS
from launch.errors import UserError
from launch.settings.run import RunSettings

Tree = dict[str, object]
Recipe = Path | str | Mapping[str, object] | RunSettings


def read_recipe(recipe: Recipe, overrides: Sequence[str] = ()) -> RunSettings:
    """A recipe with overrides such as `actors.count=2` or `stages.pretrain.steps=100`; it is a YAML file, or what
    such a file holds, or settings.

    A stage is addressed by its name or its index; values are YAML.
    UserError: the file holds no mapping, an override is malformed, or a key or value is not accepted.
    """
    if isinstance(recipe, RunSettings):
        tree, where = recipe.model_dump(mode="json"), "recipe"
    elif isinstance(recipe, Mapping):
        tree, where = json.loads(json.dumps(recipe)), "recipe"
    else:
        content = read_yaml(Path(recipe), "recipe", "the packaged ones are in launch/recipes/")
        if not isinstance(content, dict):
            raise UserError(f"{recipe} holds no settings; a recipe is a YAML mapping (see launch/recipes/)")
        tree, where = content, str(recipe)
    for override in overrides:
        apply_override(tree, override)
    return settings_from(tree, where)


def settings_from(tree: Tree, where: str) -> RunSettings:
    """Settings of a recipe's content; UserError, which begins with `where`, if a key or value is not accepted."""
    try:
        return RunSettings.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, tree)}") from None


def with_absolute_paths(settings: RunSettings) -> RunSettings:
    """The settings with paths that mean the same from every folder; names that are no path here stay as they are."""
    return RunSettings.model_validate(settings.model_dump(), context=ABSOLUTE_PATHS)


def write_recipe(settings: RunSettings, path: Path) -> None:
    """Write resolved settings, so that `read_recipe` gives them back."""
    with writing_to(path):
        path.write_text(to_yaml(settings), encoding="utf-8")


def to_yaml(settings: RunSettings) -> str:
    """Resolved settings as YAML."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, width=110)


def apply_override(tree: Tree, override: str) -> None:
    """Set `KEY=VALUE` in the tree; UserError if it is malformed, or has no place there."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value, e.g. actors.count=2")
    try:
        value = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value") from None
    except ValueError as error:
        raise UserError(f"override {override!r}: {error}") from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        place = _place(node, part, override)
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]
    node[_place(node, last, override)] = value


def explain(error: ValidationError, tree: object) -> str:
    """What is wrong with settings, and where. tree: what they were made of."""
    explanations = []
    for detail in error.errors():
        node, keys = tree, []
        loc: tuple[Any, ...] = detail["loc"]
        for number, part in enumerate(loc, 1):
            if (isinstance(node, list) and isinstance(part, int)) or (isinstance(node, dict) and part in node):
                node = node[part]
            elif detail["type"] != "missing" or number < len(loc):
                continue  # pydantic also names the chosen member of a tagged union
            keys.append(str(part))
        explanations.append(": ".join(filter(None, (".".join(keys), detail["msg"].removeprefix("Value error, ")))))
    return "; ".join(explanations)


def read_text(path: Path, what: str, where: str = "") -> str:
    """The text of a file that a person wrote; UserError if there is none that can be read.

    For the messages, what: the file is to be, as `recipe`; where: such files are.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}{where and f'; {where}'}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name the file of the {what} in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 ({error}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_yaml(path: Path, what: str, where: str = "") -> object:
    """The content of a YAML file, as `read_text`; UserError also if it is not YAML, or has a key twice."""
    text = read_text(path, what, where)
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML takes the last of several values of a key, which the YAML specification (3.2.1.3) forbids."""

    def compose_mapping_node(self, anchor: dict[object, yaml.Node]) -> yaml.MappingNode:  # as typed by types-PyYAML
        """A mapping before its merges (`<<`), which may bring a key that it has; ValueError for a key twice."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            before = first.setdefault((key.tag, str(key.value)), key)
            if before is not key:
                lines = sorted({before.start_mark.line + 1, key.start_mark.line + 1})
                where = " and ".join(f"line {line}" for line in lines)
                raise ValueError(f"key {key.value!r} stands twice, in {where}: leave one of them out")
        return node


def _place(node: object, part: str, override: str) -> str | int:
    """What a part of a key is in a section, or in a list whose entries go by their names or numbers."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise UserError(f"override {override!r}: nothing lies below what comes before {part!r}")
    names = [item.get("name") if isinstance(item, dict) else None for item in node]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(node):
        return int(part)
    known = ", ".join(str(name) for name in names)
    raise UserError(f"override {override!r}: no entry {part!r} (entries: {known})")
