"""The built pages, as a reader opens them from a folder: tables, code, links, search.

Markdown that is almost right gives no error: a table with a line too few becomes a paragraph, a missing backtick runs on
through the page. What remains of the markup in the text shows it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("mkdocs", reason="the documentation's tools are not installed: pip install '.[docs]'")
pytest.importorskip("latex2mathml", reason="the documentation's tools are not installed: pip install '.[docs]'")

ROOT = Path(__file__).parents[2]
WIDEST = 84
"""Columns of a code block in a window of 1280 pixels."""
REPOSITORY = "https://example.org/a/repository"
FILE = r"<!-- file: (\S+) -->"
LITERAL = ("pre", "code", "math", "script", "style")
"""Elements whose text may hold any character."""
REMAINS = re.compile(r"\|\s*:?-{3,}|\*\*|`|\]\[|\]\(|\$\$|\\[()\[]|^\s*:::|<!--|^\s*\|", re.MULTILINE)
LOADED = (("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"))


class Page(HTMLParser):
    """What a built page holds: text outside code and formulas, tables as counts of cells, code blocks, what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tables: list[list[int]] = []
        self.code: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self._open: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self.loaded += [given[name] for element, name in LOADED if tag == element and name in given]
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append(0)
        elif tag in ("td", "th"):
            self.tables[-1][-1] += 1
        elif tag == "pre":
            self.code.append("")
        if tag in LITERAL:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in LITERAL:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self._open:
            self.code[-1] += data
        elif not self._open:
            self.text.append(data)


def build(into: Path) -> Path:
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(into))
    env = {"LOOKSAM_REPOSITORY_URL": REPOSITORY, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return into


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("site"))


class Built(NamedTuple):
    name: str
    page: Page


@pytest.fixture(scope="module")
def pages(site: Path) -> list[Built]:
    return [Built(str(path.relative_to(site)), Page(path)) for path in sorted(site.rglob("*.html"))]


def faults(page: Page) -> Iterator[str]:
    """What a reader would see as broken."""
    for cells in page.tables:
        if len(cells) < 2 or len(set(cells)) > 1:
            yield f"a table with rows of {cells} cells"
    for match in filter(None, map(REMAINS.search, page.text)):
        yield f"markup in the text: {match.string.strip()[:80]!r}"
    for line in (line for block in page.code for line in block.splitlines() if len(line) > WIDEST):
        yield f"code of {len(line)} columns: {line}"
    for address in page.loaded:
        if address.startswith(("http:", "https:", "//")):
            yield f"something from elsewhere: {address}"


def test_no_page_has_a_fault(pages: list[Built]) -> None:
    assert len(pages) > 20
    assert [f"{name}: {fault}" for name, page in pages for fault in faults(page)] == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("<p>| a | b |\n|---|---|\n| 1 | 2 |</p>", "markup"),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td></tr></table>", "rows of [2, 1] cells"),
        ("<p>the **length of w</p>", "markup"),
        ("<p>see [the guide](quickstart.md</p>", "markup"),
        (f"<pre><code>{'x' * 85}</code></pre>", "85 columns"),
        ('<script src="https://unpkg.com/x"></script>', "elsewhere"),
    ],
)
def test_what_counts_as_a_fault(broken: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(broken)
    assert any(said in fault for fault in faults(Page(tmp_path / "page.html")))


def test_every_link_and_anchor_leads_somewhere(pages: list[Built], site: Path) -> None:
    ids = {site / name: page.ids for name, page in pages}
    for name, page in pages:
        for link in page.links:
            if name == "404.html" or link.startswith(("http:", "https:", "javascript:")):
                continue  # that page is served for any address: its links begin at the root
            target, _, anchor = link.partition("#")
            path = ((site / name).parent / target).resolve() if target else site / name
            assert path.exists(), f"{name}: {link}"
            assert not anchor or path.suffix != ".html" or anchor in ids[path], f"{name}: {link}"


def test_the_home_page_says_how_to_install_which_version_and_where(pages: list[Built]) -> None:
    home = dict(pages)["index.html"]
    assert any("pip install" in block for block in home.code)
    assert re.search(r"Version\s+\d+\.\d+", "".join(home.text))
    assert REPOSITORY in home.links


def test_the_examples_are_shown_whole(pages: list[Built]) -> None:
    shown = [block.strip() for block in dict(pages)["examples.html"].code]
    assert shown == [
        (ROOT / link).read_text().strip() for link in re.findall(FILE, (ROOT / "docs/examples.md").read_text())
    ]
    assert len(shown) == len(list((ROOT / "examples").glob("*.py")))


def test_pages_lead_to_the_previous_and_the_next(site: Path) -> None:
    for path in site.rglob("*.html"):
        if path.name not in ("index.html", "404.html", "kernels.html"):
            assert path.read_text().count("md-footer__link--") == 2, path


def test_frequent_questions_have_headings(pages: list[Built]) -> None:
    questions = re.findall(r"^## (.+)$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
    assert len(questions) > 10
    assert len([link for link in dict(pages)["faq.html"].links if link.startswith("#")]) > 2 * len(questions)


needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


def shown(address: str, profile: Path, *settings: str) -> str:
    """A page as a browser has it after its scripts have run, without a server."""
    options = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=8000",
    )
    command = ("chromium", *options, *settings, "--dump-dom", f"file://{address}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_browser
@pytest.mark.parametrize("start", ["index.html", "api/looksam.html"])
def test_the_search_works_from_a_folder(start: str, site: Path, tmp_path: Path) -> None:
    """A page asked with ``?q=`` searches by itself."""
    found = re.search(r"(\d+) matching documents", shown(f"{site / start}?q=checkpoint", tmp_path))
    assert found is not None
    assert int(found[1]) > 5


@needs_browser
@pytest.mark.parametrize(("preferred", "scheme"), [(0, "slate"), (1, "default")])
def test_dark_and_light_follow_the_system(preferred: int, scheme: str, site: Path, tmp_path: Path) -> None:
    page = shown(f"{site / 'index.html'}", tmp_path, f"--blink-settings=preferredColorScheme={preferred}")
    assert re.search(rf'<body[^>]*data-md-color-scheme="{scheme}"', page)
