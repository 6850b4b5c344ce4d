"""A report as a list of blocks, written as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 90% }
th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left }
th { background: #f4f4f4 } img { max-width: 100% } pre { background: #f4f4f4; padding: .6rem; overflow-x: auto }"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; in it ``**bold**`` and `` `code` `` as in Markdown."""

    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Rows:
    """A table."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """The figure ``stem``.png, and the same as ``stem``.svg, in the folder of the report."""

    title: str
    stem: str


Block: TypeAlias = Heading | Text | Bullets | Code | Rows | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Bullets(items):
            return "\n".join(f"* {item}" for item in items)
        case Code(text):
            return f"```\n{text}\n```"
        case Rows(columns, rows):
            return "\n".join(map(_line, [columns, ["---"] * len(columns), *rows]))
        case Picture(title, stem):
            return f"![{title}]({stem}.png)"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def to_html(title: str, parts: Sequence[tuple[Path, Sequence[Block]]]) -> str:
    """One page that needs no other file: the figures, each from the folder of its part, are in it."""
    body = "\n".join(_html(block, folder) for folder, blocks in parts for block in blocks)
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>\n{STYLE}\n</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Rows(columns, rows):
            return "<table>" + _row("th", columns) + "".join(_row("td", row) for row in rows) + "</table>"
        case Picture(title, stem):
            # An image of its own: figures put into the page itself would share the names of their parts.
            data = base64.b64encode((folder / f"{stem}.svg").read_bytes()).decode()
            return f'<p><img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}"></p>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>"


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
