"""Dockerfiles as tests read them: instructions of each stage, and what would be sent to the builder."""

from __future__ import annotations

import fnmatch
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
CPU = ROOT / "docker" / "Dockerfile.cpu"
CUDA = ROOT / "docker" / "Dockerfile.cuda"


@dataclass
class Stage:
    """One FROM and what follows. instructions: pairs of keyword and the rest, continuation lines joined."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        """What stands behind each instruction of that kind."""
        return [rest for found, rest in self.instructions if found == keyword]

    def environment(self) -> dict[str, str]:
        """Of its ENV instructions."""
        return dict(pair.split("=", 1) for rest in self.all("ENV") for pair in shlex.split(rest))

    def copies(self) -> list[tuple[list[str], str]]:
        """Sources in the build context, and target, of its COPY instructions."""
        parts = [shlex.split(rest) for rest in self.all("COPY")]
        return [(words[:-1], words[-1]) for words in parts if not words[0].startswith("--from")]


def read_stages(dockerfile: Path) -> list[Stage]:
    """The stages in order; the ARG instructions before the first one are put in where they are used."""
    stages: list[Stage] = []
    arguments: dict[str, str] = {}
    for line in _logical_lines(dockerfile):
        keyword, rest = line.split(maxsplit=1)
        if keyword == "ARG" and not stages:
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            for argument, value in arguments.items():
                base = base.replace(f"${{{argument}}}", value)
            stages.append(Stage(base, name))
        else:
            stages[-1].instructions.append((keyword, rest))
    return stages


def ignored(path: str) -> bool:
    """Whether `.dockerignore` keeps a path of the tree (relative) from the builder: the last rule that fits decides."""
    decision = False
    for rule in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = Path(path).parts
        candidates = parts if "**/" in rule else ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if any(fnmatch.fnmatch(candidate, pattern) for candidate in candidates):
            decision = not rule.startswith("!")
    return decision


def without_mounts(run: str) -> str:
    """The shell command of a RUN instruction."""
    return " ".join(word for word in run.split(" ") if not word.startswith("--mount="))


def _logical_lines(dockerfile: Path) -> list[str]:
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]
