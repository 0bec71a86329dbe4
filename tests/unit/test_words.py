"""Retired words stay out of the project: code, recipes, documents, dashboards, and the names of files.

Only identifiers and unmistakable words: a word that is ordinary English too is left to readers.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPED = {Path(__file__).relative_to(ROOT).as_posix(), "LICENSE"}

CLASSES = "FinishedLog EvaluatedLogs LogCounts Roster _Crew _Hand Sighting Lane LiveFacts RowFacts Tally _Fates"
NAMES = (
    "put_to_work hand_over held_back needy upkeep trunk planted planting renews_proposal mixture_coefficient "
    "beta_start beta_end beta_steps max_nodes_per_batch insert_rows compact_below right_taken_back wrong_taken_back "
    "nodes_per_s floor_mask hold-back"
)
BRITISH = (
    r"\w*isations? behaviours? colours? coloured neighbour\w* favour\w* honour\w* labour\w* licences? centred? "
    r"defence grey catalogues? analysed? cancelled cancelling labell(?:ed|ing) modell(?:ed|ing) programmes? fulfil "
    r"(?:real|normal|initial|synchron|serial|optim|minim|maxim|quant|priorit|penal|recogn|general|summar|final|special)"
    r"is(?:e|es|ed|ing)"
)


def alternatives(words: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """Any of `words`, alone or as a part of an identifier that `_` separates."""
    return re.compile(rf"(?<![A-Za-z])(?:{'|'.join(words.split())})(?![A-Za-z])", flags)


RETIRED = (alternatives(CLASSES), alternatives(f"{NAMES} {BRITISH}", re.IGNORECASE))


def retired_words(text: str) -> list[str]:
    return [match.group() for pattern in RETIRED for match in pattern.finditer(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a = FinishedLog(upkeep_s, MAX_NODES_PER_BATCH)", ["FinishedLog", "upkeep", "MAX_NODES_PER_BATCH"]),
        (
            "Initialised; quantisation of is_quantised behaviours",
            ["Initialised", "quantisation", "quantised", "behaviours"],
        ),
        ("precise, otherwise raised; FinishedRollout, planed, airplane, centers, behavior, by_hand, lane", []),
    ],
)
def test_retired_words_are_found(text: str, found: list[str]) -> None:
    assert sorted(retired_words(text)) == sorted(found)


def test_no_retired_word_is_left() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    paths = {path for path in listed.split("\0") if path and (ROOT / path).is_file()} - SKIPPED
    assert len(paths) > 300
    left = []
    for path in sorted(paths):
        content = (ROOT / path).read_bytes()
        text = "" if b"\0" in content else content.decode()
        left += [f"{path}: {word}" for word in retired_words(f"{path}\n{text}")]
    assert not left
