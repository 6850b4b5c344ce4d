"""What an sdist and a wheel hold, and what making them leaves behind."""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.packaging.conftest import Artefacts
from tests.packaging.support import LEFT_BEHIND, PARTS, ROOT, VERSION, build, copy_tree, run, unpack

pytest.importorskip("build", reason="the package `build` is not installed")
pytest.importorskip("setuptools_scm", reason="setuptools-scm is not installed")


def contents(wheel: Path) -> dict[str, str]:
    """The digest of every file. RECORD holds the same; metadata of the environment are left out."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith("RECORD")
        }


def test_the_sdist_holds_the_whole_checkout(sdist: Path) -> None:
    for part in PARTS:
        here = [ROOT / part, *(ROOT / part).rglob("*")] if (ROOT / part).is_dir() else [ROOT / part]
        for path in here:
            if path.is_file() and not any(LEFT_BEHIND(str(path.parent), [name]) for name in path.parts):
                assert (sdist / path.relative_to(ROOT)).is_file(), path


def test_a_wheel_from_the_sdist_equals_one_from_the_checkout(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    assert contents(build(sdist, tmp_path, "wheel")) == contents(wheel)


def test_the_wheel_holds_the_native_sources_and_runs_on_every_python(wheel: Path) -> None:
    names = contents(wheel)
    assert wheel.name == f"looksam_kernels-{VERSION}-py3-none-any.whl"
    for name in (
        "bindings/cpu.cpp",
        "core/updates.h",
        "cpu/ops.cpp",
        "bindings/cuda.cpp",
        "cuda/step.cu",
        "cuda/step.cuh",
    ):
        assert f"looksam_kernels/csrc/{name}" in names
    assert {name.split("/")[0] for name in names} == {
        "looksam", "looksam_kernels", f"looksam_kernels-{VERSION}.dist-info",
    }  # fmt: skip
    assert "looksam/py.typed" in names
    assert "looksam_kernels/py.typed" in names


def test_stale_builds_reach_nothing_and_nothing_is_written_into_the_tree(artefacts: Artefacts, sdist: Path) -> None:
    assert artefacts.after == artefacts.before
    inside = [*contents(artefacts.wheel), *map(str, sdist.rglob("*"))]
    assert [name for name in inside if name.endswith(("gone.py", ".so"))] == []


def test_twine_and_check_wheel_contents_have_no_objection(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed")
    pytest.importorskip("check_wheel_contents", reason="check-wheel-contents is not installed")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, cwd=tmp_path)
    run(sys.executable, "-m", "check_wheel_contents", "--config", ROOT / "pyproject.toml", wheel, cwd=tmp_path)


def test_the_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"looksam_kernels-{VERSION}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    classifiers = metadata.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)} <= set(classifiers)
    readme = metadata.get_payload()
    assert isinstance(readme, str)
    relative = [part.split(")")[0] for part in readme.split("](")[1:] if not part.startswith(("http", "#"))]
    assert relative == [], "links that lead nowhere on a package index"
    for image in re.findall(r"<img\s[^>]*>", readme):
        told = re.search(r'alt="[^"]*\d[^"]*"', image)
        assert 'src="http' in image or told, "an image without its numbers says nothing on a package index"


def test_the_version_comes_from_git(tmp_path: Path) -> None:
    """Every commit has a higher one, so that pip upgrades from a repository."""
    tree = copy_tree(tmp_path / "tree")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    run("git", "init", "-q", cwd=tree)
    versions = []
    for message in ("first", "second"):
        run(*git, "add", "-A", cwd=tree)
        run(*git, "commit", "-q", "--allow-empty", "-m", message, cwd=tree)
        versions.append(run(sys.executable, "-m", "setuptools_scm", cwd=tree).stdout.strip())
    assert [version.split("+")[0] for version in versions] == ["0.1.0.dev1", "0.1.0.dev2"]
    run("rm", "-rf", ".git", cwd=tree)
    assert run(sys.executable, "-m", "setuptools_scm", cwd=tree).stdout.strip() == "0.1.0.dev0"


def editable_wheel(folder: Path) -> Path:
    tree = copy_tree(folder / "tree")
    code = "import build_backend, sys; build_backend.build_editable(sys.argv[1])"
    path = ":".join([str(tree), *(entry for entry in sys.path if entry)])
    env = {"CXX": "/no/compiler", "SETUPTOOLS_SCM_PRETEND_VERSION": VERSION, "PYTHONPATH": path}
    run(sys.executable, "-c", code, folder / "dist", cwd=tree, env=env)
    return next((folder / "dist").glob("*.whl"))


@pytest.mark.parametrize("editable", [False, True])
def test_type_checkers_see_both_packages(
    editable: bool, wheel: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A virtual environment with nothing but the wheel. torch is not in it: its types are Any here."""
    cache = tmp_path_factory.getbasetemp() / "mypy"  # of the standard library's types, for both
    mypy = pytest.importorskip("mypy.api", reason="mypy is not installed")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    unpack(editable_wheel(tmp_path) if editable else wheel, packages)
    program = tmp_path / "program.py"
    program.write_text("import looksam, looksam_kernels\nreveal_type(looksam.LookSAM)\nlooksam_kernels.nothing\n")
    options = ["--python-executable", str(tmp_path / "venv/bin/python"), "--cache-dir", str(cache)]
    out, _, _ = mypy.run([*options, "--config-file", "/dev/null", "--ignore-missing-imports", str(program)])
    assert "looksam.variants.LookSAM" in out, out
    assert 'Module has no attribute "nothing"' in out, out
