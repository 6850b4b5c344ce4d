"""What MkDocs does beside Markdown: formulas become MathML, and the table of variants is made from the docstrings."""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger

log = get_plugin_logger("looksam")
VARIANTS = Path(__file__).parent.parent / "python" / "looksam" / "variants.py"
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """``<!-- variants -->`` -> one row for each variant."""
    return markdown.replace("<!-- variants -->", table(page.meta.get("when", {})), 1)


def on_page_content(content: str, **_: Any) -> str:
    """LaTeX -> MathML, which browsers draw without a script."""
    return MATH.sub(lambda m: convert(html.unescape(m[2]), display="inline" if m[1] == "span" else "block"), content)


def table(when: dict[str, str]) -> str:
    """A row for each class in variants.py that is a sharpness-aware optimizer, in the order of the file.

    Passes and memory are the docstring's line "Passes per step: ... Extra memory: ...", the source is the end of its
    first paragraph. A docstring without them is a warning, which ``--strict`` makes an error. When to use a variant is
    written on the page that shows the table.
    """
    rows = ["| class | passes per step | extra memory | when | source |", "|---|---|---|---|---|"]
    for node in ast.parse(VARIANTS.read_text()).body:
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        text = " ".join((ast.get_docstring(node) or "").split())
        costs = re.search(r"Passes per step: (.+?)\. Extra memory: (.+?)\.(?: |$)", text)
        source = re.search(r"([A-Z][\w-]+ (?:& [A-Z][\w-]+|et al\.) \d{4})", text)
        if costs is None:
            if "SharpnessAware" in {ast.unparse(b) for b in node.bases} and node.name != "LAMB":
                log.warning("%s: its docstring has no line 'Passes per step: ... Extra memory: ...'", node.name)
            continue
        passes = f"{costs[1]}; k = {k}" if "k" in costs[1] and (k := default(node, "k")) else costs[1]
        name = f"[`{node.name}`](api/looksam.md#looksam.{node.name})"
        rows.append(f"| {name} | {passes} | {costs[2]} | {when.get(node.name, '')} | {source[1] if source else ''} |")
    return "\n".join(rows)


def default(node: ast.ClassDef, argument: str) -> str:
    """The default of an argument of the constructor, as it is written; empty where there is none."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            args = item.args.args[len(item.args.args) - len(item.args.defaults) :]
            return {a.arg: ast.unparse(d) for a, d in zip(args, item.args.defaults, strict=True)}.get(argument, "")
    return ""
