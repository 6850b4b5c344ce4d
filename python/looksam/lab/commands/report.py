"""``looksam report``: tables, figures, report.md and report.html again, from results.jsonl."""

from __future__ import annotations

from pathlib import Path

import click

from ..console import make_console
from ..experiment import report
from ..records import RESULTS, DamagedResults, read_experiment
from ..report import report_blocks, write_page


@click.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--page", type=click.Path(dir_okay=False, path_type=Path), help="Write all of them as one HTML page too.")
def command(folders: tuple[Path, ...], page: Path | None) -> None:
    """Rebuild the report of the experiment in each of FOLDERS from its results.jsonl."""
    for folder in folders:
        if not (folder / RESULTS).exists():
            raise click.UsageError(f"{folder} holds no {RESULTS}; give the --out folder of an experiment")
    try:
        for folder in folders:
            report(folder, make_console())
        if page is not None:
            write_page(page, [(folder, report_blocks(read_experiment(folder), folder)) for folder in folders])
            click.echo(page)
    except DamagedResults as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.strerror}: {error.filename}") from error
