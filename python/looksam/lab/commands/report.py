"""``looksam report``: table, figures and report.md again, from results.jsonl."""

from __future__ import annotations

from pathlib import Path

import click

from ..console import make_console
from ..experiment import report
from ..records import RESULTS, DamagedResults


@click.command("report")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def command(folder: Path) -> None:
    """Rebuild the report of an experiment in FOLDER from its results.jsonl."""
    if not (folder / RESULTS).exists():
        raise click.UsageError(f"{folder} holds no {RESULTS}; give the --out folder of an experiment")
    try:
        report(folder, make_console())
    except DamagedResults as error:
        raise click.ClickException(str(error)) from error
