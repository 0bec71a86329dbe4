"""What differs between two recipes, setting by setting."""

from __future__ import annotations

from dataclasses import dataclass

from launch.settings.recipe import Tree
from launch.settings.run import RunSettings


@dataclass(frozen=True)
class Change:
    """A setting that two recipes have otherwise. key: as in an override, e.g. `stages.trunk.steps`."""

    key: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"


def changes_between(before: RunSettings, after: RunSettings) -> list[Change]:
    """Every setting that differs, in the order of `after`; one that only one of them has is None in the other."""
    old, new = _flat(before), _flat(after)
    keys = [*new, *(key for key in old if key not in new)]
    return [Change(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _flat(settings: RunSettings) -> Tree:
    """Value by dotted key. Entries of a list that have names, as stages do, go by them; other lists are values."""
    leaves: Tree = {}

    def visit(node: object, key: str) -> None:
        if isinstance(node, list) and node and all(isinstance(item, dict) and "name" in item for item in node):
            node = {item["name"]: item for item in node}
        if isinstance(node, dict) and node:
            for part, child in node.items():
                visit(child, f"{key}.{part}" if key else str(part))
        else:
            leaves[key] = node

    visit(settings.model_dump(mode="json"), "")
    return leaves


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
