"""Reading a recipe: YAML, dotted overrides, and errors that say what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from buffer.disk import writing_to
from buffer.settings import ABSOLUTE_PATHS
from launch.errors import UserError
from launch.settings.files import parse_yaml, read_yaml
from launch.settings.run import RunSettings

Tree = dict[str, object]
JsonSchema = dict[str, Any]


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Read `path` and apply overrides such as `actors.count=2` or `stages.trunk.steps=100`.

    A stage is addressed by its name or its index; values are YAML.

    Raises:
        UserError: see `read_yaml`; or the file holds no mapping, an override is malformed, or a key or value is not
            accepted.
    """
    tree = read_yaml(path, "recipe", "the packaged ones are in launch/recipes/")
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no settings; a recipe is a YAML mapping (see launch/recipes/)")
    for override in overrides:
        apply_override(tree, override)
    return settings_from(tree, str(path))


def settings_from(tree: Tree, where: str) -> RunSettings:
    """Settings of a recipe's content. where: begins the error message.

    Raises:
        UserError: a key or value is not accepted.
    """
    try:
        return RunSettings.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, RunSettings.model_json_schema())}") from None


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
    """Set `KEY=VALUE`, in place.

    Raises:
        UserError: it is malformed, or has no place in the tree.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value, e.g. actors.count=2")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value") from None
    except ValueError as error:
        raise UserError(f"override {override!r}: {error}") from None
    *parents, last = key.split(".")
    node: object = tree
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {override!r}: nothing lies below {'.'.join(parents)}")


def _child(node: object, part: str, override: str) -> object:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    raise UserError(f"override {override!r}: nothing lies below {part!r}")


def _index(items: list[object], part: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = ", ".join(str(name) for name in names)
    raise UserError(f"override {override!r}: no entry {part!r} (entries: {known})")


def explain(error: ValidationError, schema: JsonSchema) -> str:
    """What is wrong with settings, and what to write instead. schema: that of the settings, from pydantic."""
    explanations = []
    for detail in error.errors():
        location = _keys_of(schema, detail["loc"])
        where = ".".join(str(part) for part in location) or "recipe"
        if detail["type"] == "extra_forbidden":
            explanations.append(_unknown_key(schema, where, location, detail["loc"]))
        else:
            message = detail["msg"].removeprefix("Value error, ")
            explanations.append(f"{where}: {message}")
    return "; ".join(explanations)


def _unknown_key(schema: JsonSchema, where: str, location: list[int | str], raw: tuple[int | str, ...]) -> str:
    known = sorted(_known_keys(schema, raw[:-1]))
    nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"unknown key {where!r}; {hint}"


def _keys_of(schema: JsonSchema, path: Sequence[int | str]) -> list[int | str]:
    """An error's location as users wrote it: pydantic also names the chosen member of a tagged union in it."""
    node, keys = schema, []
    for part in path:
        node, is_key = _step(schema, node, part)
        if is_key:
            keys.append(part)
    return keys


def _step(schema: JsonSchema, node: JsonSchema, part: int | str) -> tuple[JsonSchema, bool]:
    """The schema of a part of `node` (empty where it is unknown), and whether the part is a key and no tag."""
    node = _resolve(schema, node)
    if isinstance(part, int):
        return node.get("items", {}), True
    if part in node.get("properties", {}):
        return node["properties"][part], True
    if part in node.get("discriminator", {}).get("mapping", {}):
        return {"$ref": node["discriminator"]["mapping"][part]}, False
    of_any_key = node.get("additionalProperties")  # in a mapping whose keys are the user's
    return of_any_key if isinstance(of_any_key, dict) else {}, True


def _known_keys(schema: JsonSchema, path: Sequence[int | str]) -> set[str]:
    """Keys that the settings class at `path` accepts."""
    node = schema
    for part in path:
        node, _ = _step(schema, node, part)
    node = _resolve(schema, node)
    options = [_resolve(schema, option) for option in node.get("oneOf", [])]
    return {key for option in [node, *options] for key in option.get("properties", {})}


def _resolve(schema: JsonSchema, node: JsonSchema) -> JsonSchema:
    for option in node.get("anyOf", []):  # settings that may be left out: a class (or one of several) or null
        if "$ref" in option or "discriminator" in option:
            node = option
    if "$ref" not in node:
        return node
    definition: JsonSchema = schema["$defs"][str(node["$ref"]).rsplit("/", 1)[-1]]
    return definition
