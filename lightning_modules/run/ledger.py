"""The command `ledger`: show, verify or report a record of deletion requests."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lightning_modules.ledger.chain import read_chain
from lightning_modules.ledger.page import write_page
from lightning_modules.ledger.place import PAGE, entries_at
from lightning_modules.ledger.rescore import rescore
from lightning_modules.ledger.table import table
from lightning_modules.ledger.verify import Finding, broken, verify
from lightning_modules.run.options.ledger import LedgerVerifyOptions


def show_ledger(folder: Path) -> None:
    """Print a ledger's table.

    Raises:
        FileNotFoundError: If there is no ledger in the folder.
        ValueError: If it is broken.
    """
    console, known = Console(), read_chain(entries_at(folder))
    console.print(table(known, str(folder)))
    if known:
        console.print(f"The last hash is {known[-1]['hash']}", highlight=False, soft_wrap=True)


def report_ledger(folder: Path) -> None:
    """Write report.html into a ledger's folder.

    Raises:
        FileNotFoundError: If there is no ledger in the folder.
        ValueError: If it is broken.
    """
    write_page(folder, *verify(folder))
    Console().print(f"The report is {folder / PAGE}", markup=False, highlight=False, soft_wrap=True)


def verify_ledger(folder: Path, options: LedgerVerifyOptions) -> None:
    """Check a ledger, and everything that it names.

    Raises:
        FileNotFoundError: If there is no ledger in the folder.
        ValueError: If it is broken, or something that an entry names is not as it was.
    """
    console = Console()
    entries, findings = verify(folder, options.head)
    if options.rescore and entries:
        findings += [finding for entry in entries for finding in rescore(folder, entry)]
    wrong = broken(findings, allow_missing=options.allow_missing)
    for finding in findings:
        _print(console, finding)
    if wrong:
        first = next((finding for finding in wrong if not finding.gone), wrong[0])
        raise ValueError(
            f"{folder}: expected everything that the ledger names as it was written, found {len(wrong)} that is not or is gone, first at "
            f"entry {first.entry}{'' if any(not one.gone for one in wrong) else '; --allow-missing lets pass what is gone'}"
        )
    what = "chain, criteria, runs and models" + (", and the scores," * options.rescore)
    last = f"; the last hash is {entries[-1]['hash']}" if entries else ""
    console.print(
        f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}: {what} are as they were written{last}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _print(console: Console, finding: Finding) -> None:
    where = f"Entry {finding.entry}" if finding.entry else "The ledger"
    console.print(f"{where}: {finding.said}{' (gone)' * finding.gone}", markup=False, highlight=False, soft_wrap=True)
