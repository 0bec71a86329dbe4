"""docs/coming_from.md names keys of ours that exist."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Annotated, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from launch.settings.run import RunSettings

PAGE = Path("docs/coming_from.md")
COLUMNS = re.compile(r"\s*\|\s*")


def has_key(annotation: object, parts: list[str]) -> bool:
    """Whether settings of this type have the key. A stage, or an entry of a mapping, goes by any name."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        kinds = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
        return any(has_key(kind, parts) for kind in kinds)
    if not parts:
        return True
    if get_origin(annotation) in (tuple, dict):
        return any(has_key(kind, parts[1:]) for kind in get_args(annotation))
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return False
    field = annotation.model_fields.get(parts[0])
    return field is not None and has_key(field.annotation, parts[1:])


def named_keys(page: str) -> set[str]:
    """All keys in the second column of tables of three, and, but in the first, what begins as a key of ours."""
    keys: set[str] = set()
    for line in page.splitlines():
        rest = line
        if line.startswith("|"):
            _, _, *others, _ = COLUMNS.split(line)
            rest = " ".join(others)
            if len(others) == 2:
                keys.update(re.findall(r"`([^`-][^`]*)`", others[0]))
        found = re.findall(r"[`\s]((?:[a-z_]+)(?:\.[A-Za-z_]+)+)", rest)
        keys.update(key for key in found if key.partition(".")[0] in RunSettings.model_fields)
    return keys


def test_every_key_of_ours_exists() -> None:
    keys = named_keys(PAGE.read_text(encoding="utf-8"))
    assert len(keys) > 50, "the tables were found"
    assert [key for key in sorted(keys) if not has_key(RunSettings, key.split("."))] == []


@pytest.mark.parametrize("key", ["stages.any.objective.beta", "scoring.features.any", "model.adapter.rank", "name"])
def test_a_key_of_a_nested_section_is_found(key: str) -> None:
    assert has_key(RunSettings, key.split("."))


@pytest.mark.parametrize("key", ["stages.any.objective.betta", "model.adapter.rank.more", "nothing"])
def test_a_key_that_is_not_there_is_not_found(key: str) -> None:
    assert not has_key(RunSettings, key.split("."))
