"""Files that a person writes: text, YAML and JSON, with errors that name the file, and the line where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from launch.errors import UserError


def read_text(path: Path, what: str, where: str = "") -> str:
    """The file's text. For the messages, what: the file is to be, as `recipe`; where: such files are.

    Raises:
        UserError: the file is absent, a folder, not readable, or not in UTF-8.
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
    """The file's content. what, where: as for `read_text`.

    Raises:
        UserError: see `read_text`; or the file is not YAML, or has a key twice.
    """
    text = read_text(path, what, where)
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def parse_yaml(text: str) -> object:
    """The content of plain YAML, which builds no objects.

    Raises:
        yaml.YAMLError: it is none. ValueError: a mapping has a key twice.
    """
    return yaml.load(text, _UniqueKeyLoader)  # a safe loader


def read_json(path: Path, what: str) -> object:
    """The file's content. what: as for `read_text`.

    Raises:
        UserError: see `read_text`; or the file is not JSON, or has a key twice.
    """
    try:
        return json.loads(read_text(path, what), object_pairs_hook=_unique)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML takes the last of several values of a key, which the YAML specification (3.2.1.3) forbids."""

    def compose_mapping_node(self, anchor: dict[object, yaml.Node]) -> yaml.MappingNode:  # as typed by types-PyYAML
        """A mapping, before its merges (`<<`) are made, which may bring a key that stands in it too.

        Raises:
            ValueError: a key stands in it twice.
        """
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            before = first.setdefault((key.tag, str(key.value)), key)
            if before is not key:
                lines = sorted({before.start_mark.line + 1, key.start_mark.line + 1})
                where = " and ".join(f"line {line}" for line in lines)
                raise ValueError(f"key {key.value!r} stands twice, in {where}: leave one of them out")
        return node


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found
