"""Every Python block in README.md and docs/*.md runs.

The blocks of a page run in order in one namespace, which begins with what :func:`prelude` gives: a model, a loader, a
loss. Every block imports what it uses, so that it can be copied. A comment in the line before a block says what is
special about it:

* ``<!-- needs: timm, gpu -->``: the block stands alone, and is skipped where that package, or a GPU, is missing;
* ``<!-- skip: reason -->``: it is not run;
* ``<!-- raises: RuntimeError -->``: it must raise that.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import os
import re
import socket
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^[ ]*<!-- (?P<tag>needs|skip|raises): (?P<value>.+?) -->\n\s*)?"
    r"^(?P<indent> *)```(?:python|py)\b[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    page: str
    line: int
    code: str
    tag: str | None
    value: str

    def run(self, namespace: dict[str, Any]) -> None:
        """Traceback lines are the page's."""
        source = "\n" * self.line + self.code
        if self.tag == "raises":
            with pytest.raises(Exception) as caught:  # noqa: PT011
                exec(compile(source, self.page, "exec"), namespace)
            assert caught.type.__name__ == self.value
        else:
            exec(compile(source, self.page, "exec"), namespace)


def blocks_of(page: Path) -> list[Block]:
    text, name = page.read_text(), str(page.relative_to(ROOT))
    return [
        Block(name, text.count("\n", 0, m.start("code")), textwrap.dedent(m["code"]), m["tag"], m["value"] or "")
        for m in BLOCK.finditer(text)
    ]


def prelude() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    dataset = TensorDataset(torch.randn(64, 20), torch.randint(3, (64,)))
    loader = DataLoader(dataset, batch_size=16)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return {
        "__name__": "docs",
        "device": "cpu",
        "quiet": quiet,
        "model": model,
        "loader": loader,
        "dataset": dataset,
        "loss_fn": nn.CrossEntropyLoss(),
    }


@pytest.fixture(autouse=True)
def like_one_process_of_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOOKSAM_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainers about this machine; ours have tests of their own
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert os.environ.get("LOOKSAM_BACKEND") is None


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
ALONE = [b for b in BLOCKS if b.tag in ("needs", "skip")]


@pytest.mark.parametrize("page", dict.fromkeys(b.page for b in BLOCKS if b not in ALONE))
def test_page(page: str) -> None:
    namespace = prelude()
    for block in BLOCKS:
        if block.page == page and block not in ALONE:
            block.run(namespace)


@pytest.mark.parametrize("block", [pytest.param(b, id=f"{b.page}:{b.line}") for b in ALONE])
def test_block_with_needs(block: Block) -> None:
    if block.tag == "skip":
        pytest.skip(block.value)
    for name in block.value.split(", "):
        if not torch.cuda.is_available() if name == "gpu" else importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    block.run(prelude())


def names(code: str) -> tuple[set[str], set[str], set[str]]:
    """What a block imports, what else it gives a name, and what it uses."""
    imported, bound, used = set(), set(), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return imported, bound, used


@pytest.mark.parametrize("page", dict.fromkeys(b.page for b in BLOCKS))
def test_every_block_imports_what_it_uses(page: str) -> None:
    """What earlier blocks have computed may be used, what they have imported may not."""
    known = {*prelude(), *vars(builtins)}
    for block in (b for b in BLOCKS if b.page == page):
        imported, bound, used = names(block.code)
        missing = used - imported - bound - known
        assert not missing, f"{page}:{block.line} uses {', '.join(sorted(missing))}"
        known |= bound


def test_every_page_is_found() -> None:
    assert len(BLOCKS) > 20
    assert all(page.name != "quickstart.md" or blocks_of(page) for page in PAGES)


def test_the_example_of_contributing_is_the_source() -> None:
    """Three pieces of real code: a formula, its row and a class."""
    sources = [ROOT / "looksam_kernels" / "formulas.py", ROOT / "python" / "looksam" / "variants.py"]
    text = "".join(path.read_text() for path in sources)
    blocks = blocks_of(ROOT / "CONTRIBUTING.md")
    assert len(blocks) == 3
    assert all(textwrap.indent(block.code, " " * 4) in text or block.code in text for block in blocks)
