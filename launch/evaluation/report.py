"""An evaluation as tables and rollouts on a terminal, and as files of the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from buffer.full_disk import writing_to
from launch.evaluation.results import CheckpointResult, Evaluation, ShownRollout
from launch.evaluation.tables import answer_tables, difference_table, text_tables
from launch.generation import rollout_text
from launch.settings.decodings import RECOVERY, SAMPLED

EVALUATION_FILE = "evaluation.json"
SAMPLES_FOLDER = "samples"

_GROUP_TITLES = {
    SAMPLED: "sampled at temperature 1 (those that take tokens back first)",
    RECOVERY: "after a forced wrong first token",
}


def render_evaluation(evaluation: Evaluation) -> RenderableType:
    """The tables of an evaluation, and what it left out."""
    title = f"{evaluation.num_examples} held-out examples of {evaluation.task}"
    tables = (answer_tables if evaluation.has_answers else text_tables)(evaluation)
    parts: list[RenderableType] = [Text(title, "bold"), *tables]
    if len(evaluation.results) > 1:
        parts += difference_table(evaluation)
    parts += [Text(f"left out: {what} ({why})", "dim") for what, why in evaluation.left_out.items()]
    return Group(*parts)


def render_rollouts(result: CheckpointResult, console: Console) -> RenderableType:
    """The rollouts of one checkpoint with their deletions, in the way that `console` can show them."""
    parts: list[RenderableType] = []
    for group, rollouts in _by_group(result.rollouts):
        parts.append(Text.assemble((result.label, "bold"), f", {_GROUP_TITLES[group]}"))
        for rollout in rollouts:
            mark = {None: Text(""), True: Text("✓ ", "green"), False: Text("✗ ", "red")}[rollout.is_correct]
            parts.append(Padding(mark + rollout_text(rollout.view, console), (0, 0, 0, 2), expand=False))
    return Group(*parts)


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print tables and rollouts."""
    console.print(render_evaluation(evaluation))
    for result in evaluation.results:
        if result.rollouts:
            console.print()
            console.print(render_rollouts(result, console))


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write `evaluation.json` and `samples/<label>.txt` into a folder."""
    text = json.dumps(evaluation.to_json(), indent=2)
    with writing_to(folder):
        (folder / EVALUATION_FILE).write_text(text + "\n", encoding="utf-8")
        samples = folder / SAMPLES_FOLDER
        samples.mkdir(exist_ok=True)
        for result in evaluation.results:
            name = result.label.replace("/", "-")  # of a stage and a step
            (samples / f"{name}.txt").write_text(samples_text(result), encoding="utf-8")


def samples_text(result: CheckpointResult) -> str:
    """The rollouts of one checkpoint as plain text; `launch.rollout_view` explains the marks."""
    lines = [f"checkpoint: {result.checkpoint}", "[-x-] was taken back, {x} was forced, … was cut off"]
    for group, rollouts in _by_group(result.rollouts):
        lines += ["", f"## {_GROUP_TITLES[group]}"]
        for rollout in rollouts:
            mark = {None: "", True: "   (right)", False: "   (wrong)"}[rollout.is_correct]
            lines += [f"> {rollout.view.prompt}", f"{rollout.view.plain()}{mark}"]
    return "\n".join(lines) + "\n"


def _by_group(rollouts: Sequence[ShownRollout]) -> Iterator[tuple[str, list[ShownRollout]]]:
    for group in _GROUP_TITLES:
        if members := [rollout for rollout in rollouts if rollout.group == group]:
            yield group, members
