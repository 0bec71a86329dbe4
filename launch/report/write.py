"""From a run folder to its page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from buffer.full_disk import is_disk_full, writing_to
from launch.errors import UserError
from launch.report.gather import gather
from launch.report.page import render

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class WrittenReport:
    """notes: what could not be shown, and why; the page says it too."""

    path: Path
    notes: tuple[str, ...]


def write_report(run: Path, path: Path | None = None) -> WrittenReport:
    """Write the report of a run; a reader never sees half of one.

    path: of the page; by default `report.html` in the run folder.

    Raises:
        UserError: see `launch.report.gather.gather`; or a file cannot be read, or the page not be written.
    """
    path = run / REPORT_FILE if path is None else path
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        report = gather(run)
        with writing_to(path):
            temporary.write_text(render(report), encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        if is_disk_full(error):
            raise  # the command says where to make room
        raise UserError(str(error)) from None
    finally:
        temporary.unlink(missing_ok=True)
    return WrittenReport(path, tuple(report.notes))
