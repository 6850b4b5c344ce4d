"""Docstrings are plain text with a little reStructuredText; here they become the Markdown that mkdocstrings reads."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|mod|meth|attr|data):`~?([\w.]+)`")
SIMPLE_TABLE = re.compile(r"^(?:=+ +)+=+\n(?:.+\n)+(?:=+ +)+=+$", re.MULTILINE)
INNER_PRODUCT = re.compile(r"<(?=\w+, ?\w+>)")
API = Path(__file__).parent / "api"
DOCUMENTED = {
    name.rpartition(".")[2]: name
    for page in API.glob("*.md")
    for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
}
"""The last part of a name -> all of it, for what has a place on the pages."""


class Markdown(griffe.Extension):
    """Roles become links, or code where there is no page; simple tables become pipe tables; ``::`` announces Python code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    text = text.replace("{bases}", bases()) if "{bases}" in text else text
    text = ROLE.sub(lambda m: link(m[1]), text)
    text = INNER_PRODUCT.sub("&lt;", text)  # Markdown would take it for HTML
    text = SIMPLE_TABLE.sub(lambda m: pipe_table(m[0]), text)
    return code_blocks(text)


def bases() -> str:
    """The table of the base updates, which looksam_kernels.updates.formulas makes of its docstrings: here of the source."""
    tree = ast.parse((Path(__file__).parent.parent / "looksam_kernels" / "updates.py").read_text())
    functions = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    table = next(node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "BASES")
    rows = ["| | |", "|---|---|"]
    for name, base in zip(table.value.keys, table.value.values, strict=True):
        formula = functions.get(ast.unparse(base.args[0])) or "x_0 <- d, w restored: the update is another optimizer's"
        cell = re.sub(r"(?<!\\)\|", r"\\|", " ".join(formula.split())).replace("*=", r"\*=")
        rows.append(f"| `{name.value}` | {cell} |")
    return "\n".join(rows)


def link(name: str) -> str:
    target = DOCUMENTED.get(name.rpartition(".")[2])
    return f"[`{name}`][{target}]" if target else f"`{name}`"


def pipe_table(text: str) -> str:
    """A simple table, with or without a header, whose first column is the narrow one; rows may be continued."""
    lines = text.splitlines()
    starts = [m.start() for m in re.finditer("=+", lines[0])]
    ends = [*starts[1:], None]
    header, rows = lines[2].startswith("==") if len(lines) > 2 else False, []
    for line in lines:
        if line.startswith("=="):
            continue
        cells = [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
    if not header:
        rows.insert(0, [""] * len(starts))
    rows = [[re.sub(r"(?<!\\)\|", r"\\|", cell).replace("*=", r"\*=") for cell in row] for row in rows]
    rows.insert(1, ["---"] * len(starts))
    return "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def code_blocks(text: str) -> str:
    """``text::`` and an indented block -> a fenced block."""
    done: list[str] = []
    inside = False
    for line in text.splitlines():
        if inside and line and not line.startswith(" "):
            done.insert(len(done) - (done[-1] == ""), "```")
            inside = False
        if line.endswith("::") and not inside:
            done += [line[:-1], "", "```python"]
            inside, fresh = True, True
            continue
        if inside:
            if fresh and not line:
                continue
            fresh = False
            line = line.removeprefix("    ")
        done.append(line)
    return "\n".join([*done, "```"] if inside else done)
