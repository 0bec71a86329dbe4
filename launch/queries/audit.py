"""`sequencematch audit`: whether every trajectory of a run is accounted for, as a table and findings or as JSON."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.commands import AsJson, reported_errors, stdout_kept_clean
from launch.errors import setting_up
from launch.queries.query import RunFolder, catalog_image

if TYPE_CHECKING:
    from buffer.reading.audit import AuditReport, SampleLimits

SHOWN_NAMES = 10
"""Ids per finding on a terminal; the JSON has all."""


def audit(run: RunFolder, as_json: AsJson = False) -> None:
    """Check that every trajectory of a run is accounted for, also while the run goes on.

    Inserted = live + evicted + dropped, no id twice, no row sampled beyond the limits, log and files consistent.
    Exit code 0: all is well; 1: it is not, and the ids are named.

    [dim]Example:[/dim] sequencematch audit runs/arithmetic-20260101-120000
    """
    with reported_errors(), stdout_kept_clean(as_json), setting_up():
        from buffer.reading.audit import SampleLimits, audit_buffer
        from launch.run_folder.folder import BUFFER_FOLDER, open_run_folder

        folder, settings = open_run_folder(run)
        limits = SampleLimits(settings.buffer.max_times_sampled, settings.buffer.max_staleness)
        report = audit_buffer(folder / BUFFER_FOLDER, limits, partial(catalog_image, folder))
        if not as_json:
            _show(report, limits, Console())
    if as_json:
        typer.echo(json.dumps(_to_json(report, limits)))
    if report.findings:
        raise typer.Exit(1)


def _show(report: AuditReport, limits: SampleLimits, console: Console) -> None:
    """Reasons for which nothing was removed are left out."""
    from buffer.store.catalog import EVICTED, REASONS

    accounts = [each for each in report.accounts if each.inserted]
    reasons = [reason for reason in REASONS if any(each.removed[reason] for each in accounts)]
    table = Table("shard", "source", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    removed = [f"{'evicted' if reason in EVICTED else 'dropped'}\n{reason}" for reason in reasons]
    for name in ("inserted", "live", *removed, "sampled"):
        table.add_column(name, justify="right")
    for each in accounts:
        numbers = each.inserted, each.live, *(each.removed[reason] for reason in reasons), each.sampled
        table.add_row(str(each.shard), each.source, *(f"{number:,}" for number in numbers))
    console.print(table)
    given = ", ".join(f"{name} {limit}" for name, limit in vars(limits).items() if limit is not None) or "none"
    facts = f"{report.num_samples:,} samples, {report.rejected:,} trajectories rejected on insert; limits: {given}"
    console.print(facts, style="dim")
    if not report.findings:
        console.print("clean: every row is accounted for, no id twice, none sampled beyond its limits", style="green")
    for finding in report.findings:
        where = "" if finding.shard is None else f"shard {finding.shard}: "
        more = len(finding.names) - SHOWN_NAMES
        names = ", ".join(finding.names[:SHOWN_NAMES]) + (f", … {more} more (--json names all)" if more > 0 else "")
        console.print(Text.assemble((f"{where}{finding.what}", "red"), f": {names}" if names else ""))


def _to_json(report: AuditReport, limits: SampleLimits) -> dict[str, object]:
    """The same for programs, with all ids."""
    from buffer.store.catalog import EVICTED, REASONS

    return {
        "clean": not report.findings,
        "accounts": [
            {
                "shard": each.shard,
                "source": each.source,
                "inserted": each.inserted,
                "live": each.live,
                "evicted": {reason: each.removed[reason] for reason in REASONS if reason in EVICTED},
                "dropped": {reason: each.removed[reason] for reason in REASONS if reason not in EVICTED},
                "sampled": each.sampled,
            }
            for each in report.accounts
        ],
        "rejected": report.rejected,
        "samples": report.num_samples,
        "limits": vars(limits),
        "findings": [
            {"shard": finding.shard, "what": finding.what, "ids": list(finding.names)} for finding in report.findings
        ],
    }
