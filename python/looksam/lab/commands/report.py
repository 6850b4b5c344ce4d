"""``looksam report``: tables, figures, report.md and report.html again, from results.jsonl."""

from __future__ import annotations

from pathlib import Path

import click

from ..console import make_console
from ..experiment import report
from ..records import RESULTS, DamagedResults
from ..report import write_page


@click.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--page", type=click.Path(dir_okay=False, path_type=Path), help="Write all of them as one HTML page too.")
def command(folders: tuple[Path, ...], page: Path | None) -> None:
    """Rebuild the report of the experiment in each of FOLDERS from its results.jsonl."""
    for folder in folders:
        if not (folder / RESULTS).exists():
            raise click.UsageError(f"{folder} holds no {RESULTS}; give the --out folder of an experiment")
    try:
        parts = [(folder, report(folder, make_console())) for folder in folders]
        if page is not None:
            write_page(page, parts)
            click.echo(page)
    except DamagedResults as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.strerror}: {error.filename}") from error
