"""What an audit of the replay buffer found, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from buffer.reading.audit import Account, AuditReport, DrawLimits
from buffer.store.catalog import EVICTED, REASONS

_CLEAN = "clean: every row is accounted for, no id twice, no draw beyond its limits"

SHOWN_NAMES = 10
"""Ids per finding on a terminal; the JSON has all."""


def show_audit(report: AuditReport, limits: DrawLimits, console: Console) -> None:
    """Print the account of every source, then either that it is clean or what is wrong with which trajectories."""
    console.print(_table(report))
    console.print(_facts(report, limits), style="dim")
    if not report.findings:
        console.print(_CLEAN, style="green")
    for finding in report.findings:
        where = "" if finding.shard is None else f"shard {finding.shard}: "
        names = ", ".join(finding.names[:SHOWN_NAMES])
        more = len(finding.names) - SHOWN_NAMES
        line = Text.assemble((f"{where}{finding.what}", "red"))
        if finding.names:
            line.append(f": {names}" + (f", … {more} more (--json names all)" if more > 0 else ""))
        console.print(line)


def audit_to_json(report: AuditReport, limits: DrawLimits) -> dict[str, object]:
    """The same for programs, with all ids."""
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
                "drawn": each.drawn,
            }
            for each in report.accounts
        ],
        "rejected": report.rejected,
        "draws": report.num_draws,
        "limits": {"max_times_sampled": limits.max_times_sampled, "max_staleness": limits.max_staleness},
        "findings": [
            {"shard": finding.shard, "what": finding.what, "ids": list(finding.names)} for finding in report.findings
        ],
    }


def _facts(report: AuditReport, limits: DrawLimits) -> str:
    bounds = {"max_times_sampled": limits.max_times_sampled, "max_staleness": limits.max_staleness}
    given = ", ".join(f"{name} {value}" for name, value in bounds.items() if value is not None)
    return f"{report.num_draws:,} draws, {report.rejected:,} trajectories rejected on insert; limits: {given or 'none'}"


def _table(report: AuditReport) -> Table:
    """Reasons for which nothing was removed are left out."""
    reasons = [reason for reason in REASONS if any(each.removed[reason] for each in report.accounts)]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("shard")
    table.add_column("source")
    for name in ("inserted", "live"):
        table.add_column(name, justify="right")
    for reason in reasons:
        table.add_column(f"{'evicted' if reason in EVICTED else 'dropped'}\n{reason}", justify="right")
    table.add_column("drawn", justify="right")
    for label, accounts in _lines(report):
        numbers = (
            sum(each.inserted for each in accounts),
            sum(each.live for each in accounts),
            *(sum(each.removed[reason] for each in accounts) for reason in reasons),
            sum(each.drawn for each in accounts),
        )
        table.add_row(label, accounts[0].source, *(f"{number:,}" for number in numbers))
    return table


def _lines(report: AuditReport) -> Iterator[tuple[str, list[Account]]]:
    """Each account by itself, then the sums over shards; sources without a row are left out."""
    by_source: dict[str, list[Account]] = {}
    present = {account.source for account in report.accounts if account.inserted}
    for account in report.accounts:
        if account.source not in present:
            continue
        by_source.setdefault(account.source, []).append(account)
        yield str(account.shard), [account]
    for accounts in by_source.values():
        if len(accounts) > 1:
            yield "all", accounts
