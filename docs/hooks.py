"""What MkDocs does beside Markdown: formulas become MathML, the table of variants is made from the docstrings, and the
home page says its version."""

from __future__ import annotations

import ast
import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.utils import get_relative_url

log = get_plugin_logger("looksam")
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "looksam"
VARIANTS = tuple(
    PACKAGE / name for name in ("variants.py", "esam.py", "aesam.py", "sampa.py", "one_pass.py", "standalone.py")
)
FILE = re.compile(r"^<!-- file: (\S+) -->$", re.MULTILINE)
SOURCE = re.compile(r"([A-Z][\w-]+ (?:& [A-Z][\w-]+|et al\.) \d{4})\.$")
COSTS = re.compile(r"Passes per step: (?P<passes>.+?)\. Extra memory: (?P<memory>.+?)\. When: (?P<when>.+)")
SHIM = "https://unpkg.com/iframe-worker/shim"
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """``<!-- variants -->`` -> one row for each variant; ``<!-- version -->`` -> that of the sources;
    ``<!-- file: examples/ddp.py -->`` -> that file as a block of code."""
    for comment, made in (("<!-- variants -->", table), ("<!-- version -->", version)):
        if comment in markdown:
            markdown = markdown.replace(comment, made(), 1)
    return FILE.sub(lambda m: f'```python title="{m[1]}"\n{(ROOT / m[1]).read_text()}```', markdown)


def version() -> str:
    """From git, as pip would install it; pyproject.toml says how."""
    done = subprocess.run(
        [sys.executable, "-m", "setuptools_scm"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.split()[-1]


def on_page_content(content: str, **_: Any) -> str:
    """LaTeX -> MathML, which browsers draw without a script."""
    return MATH.sub(_mathml, content)


def _mathml(formula: re.Match[str]) -> str:
    if formula[1] == "span":
        return str(convert(html.unescape(formula[2]), display="inline"))
    return f'<div class="equation">{convert(html.unescape(formula[2]), display="block")}</div>'


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The theme takes the script with which search works in a folder from the network; here it is one of the site's."""
    return output.replace(SHIM, get_relative_url("iframe-worker.js", page.url))


def on_post_template(output_content: str, **_: Any) -> str:
    return output_content.replace(SHIM, "iframe-worker.js")


def table() -> str:
    """A row for each class that is a sharpness-aware optimizer, in the order of the files.

    All of it stands in the docstring: the source at the end of its first paragraph, the rest in the one that reads
    "Passes per step: ... . Extra memory: ... . When: ...". A docstring without them is a warning, which ``--strict``
    makes an error.
    """
    rows = ["| class | passes per step | extra memory | when | source |", "|---|---|---|---|---|"]
    for node in (node for path in VARIANTS for node in ast.parse(path.read_text()).body):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_") or "fused_base" in ast.unparse(node):
            continue  # a base is no variant
        paragraphs = [" ".join(p.split()) for p in (ast.get_docstring(node) or "").split("\n\n")]
        source = SOURCE.search(paragraphs[0])
        costs = next(filter(None, map(COSTS.fullmatch, paragraphs)), None)
        if source is None or costs is None:
            log.warning(
                "%s: its docstring has no source, or no 'Passes per step: ... Extra memory: ... When: ...'", node.name
            )
            continue
        passes = costs["passes"]
        if k := default(node, "k"):
            once, sharp = map(float, re.fullmatch(r"([\d.]+) \+ ([\d.]+)/k", passes).groups())
            passes += f" = {once + sharp / int(k):g} at k = {k}"
        name = f"[`{node.name}`](api/looksam.md#looksam.{node.name})"
        when = costs["when"]
        rows.append(f"| {name} | {passes} | {costs['memory']} | {when[0].upper()}{when[1:]} | {source[1]} |")
    return "\n".join(rows)


def default(node: ast.ClassDef, argument: str) -> str:
    """The default of an argument of the constructor, as it is written; empty where there is none."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            args = item.args.args[len(item.args.args) - len(item.args.defaults) :]
            return {a.arg: ast.unparse(d) for a, d in zip(args, item.args.defaults, strict=True)}.get(argument, "")
    return ""
