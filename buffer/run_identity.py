"""What a run is called where its folder is not: below folders and URLs that several runs share."""

from __future__ import annotations

from pathlib import Path

RUN_ID_FILE = "run_id"


def run_id(run_folder: Path) -> str:
    """The name that the run was given when it began, however its folder is called by now: no two runs share it. The
    name of the folder, where a run was made without one.
    """
    file = run_folder / RUN_ID_FILE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else run_folder.resolve().name
