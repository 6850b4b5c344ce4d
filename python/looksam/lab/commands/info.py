"""``looksam info``: what is installed and which backends work."""

from __future__ import annotations

import os

import click
from rich.table import Table

import looksam_kernels

from ..console import make_console
from ..environment import environment


@click.command("info")
def command() -> None:
    """Show versions, devices and backends, and why a backend is not available."""
    console = make_console()
    for label, text in environment().items():
        console.print(f"[bold]{label:>16}[/]  {text}", highlight=False)
    table = Table("backend", "available", "selected", "reason", title="Backends", title_justify="left")
    for name, backend in looksam_kernels.backend_info().items():
        table.add_row(name, "yes" if backend.available else "no", "*" if backend.selected else "", backend.reason)
    console.print(table)
    asked_for = os.environ.get("LOOKSAM_BACKEND")
    if asked_for and not any(backend.selected for backend in looksam_kernels.backend_info().values()):
        raise click.ClickException(f"LOOKSAM_BACKEND={asked_for}: no such backend can run here")
