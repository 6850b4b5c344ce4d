"""``looksam cache``: the decoded data sets on disk."""

from __future__ import annotations

import click

from ..cache import cache_folder, cache_limit, cached_files


@click.command("cache")
@click.option("--clear", is_flag=True, help="Remove them all; they are decoded again when needed.")
def command(clear: bool) -> None:
    """Show where decoded data sets are kept, and how much room they take.

    The oldest used are removed where together they exceed $LOOKSAM_CACHE_GB.
    """
    try:
        limit = cache_limit()
        files = cached_files()
        size = sum(file.stat().st_size for file in files)
        for file in files if clear else ():
            file.unlink(missing_ok=True)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.strerror}: {error.filename}") from error
    done = "removed from" if clear else "in"
    click.echo(f"{len(files)} data set(s), {size / 1e6:.1f} MB, {done} {cache_folder()} (limit {limit / 1e9:g} GB)")
