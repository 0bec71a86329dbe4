"""docs/architecture.md names files, functions and classes that exist; so do the paths in the other documents."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
MAX_FILES_OF_FIRST_WALK = 30

_PATH = r"(?:actors|buffer|docs|launch|learner|tests)/[\w./-]*"
_REFERENCE = re.compile(rf"`({_PATH}\.py):([\w.]+)`")


@cache
def tracked() -> frozenset[str]:
    """Files of the project and the folders above them; folders end in a slash."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    paths = [path for path in files.split("\0") if path]
    return frozenset(paths) | {f"{parent}/" for path in paths for parent in Path(path).parents}


def names_in(statements: list[ast.stmt], prefix: str = "") -> set[str]:
    """Functions, classes with their members, and variables that a module defines."""
    names: set[str] = set()
    for statement in statements:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(prefix + name)
            case ast.ClassDef(name=name, body=body):
                names |= {prefix + name} | names_in(body, f"{prefix}{name}.")
            case ast.Assign(targets=targets):
                names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(prefix + name)
    return names


def first_walk() -> str:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition("\n## Walk 1")
    return rest.partition("\n## ")[0]


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_every_path_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = {path.rstrip(".") for path in re.findall(rf"`({_PATH})[`:]", text)}
    assert not {path for path in named if path not in tracked() and f"{path}/" not in tracked()}


def test_every_name_is_defined_in_its_file() -> None:
    references = _REFERENCE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(references) > 80
    defined = {file: names_in(ast.parse((ROOT / file).read_text(encoding="utf-8")).body) for file, _ in references}
    assert not [f"{file}:{name}" for file, name in references if name not in defined[file]]


def test_the_first_walk_is_short() -> None:
    files = set(re.findall(rf"`({_PATH}\.py)[`:]", first_walk()))
    assert 15 < len(files) <= MAX_FILES_OF_FIRST_WALK, sorted(files)
