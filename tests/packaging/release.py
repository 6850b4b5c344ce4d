"""``make release-check``: the artefacts, installed as users install them, in fresh environments.

For each torch: a new virtual environment; the wheel, the sdist, the checkout and its repository, each installed by pip in
isolation and without a flag, and by uv; what is said before anything is compiled; the one command that compiles; a
training step on the native backend; an editable install, and what mypy and pyright make of it.

``--python`` names environments that have a torch already, such as one with CUDA: they are not changed, only the wheel is
tried there, from a folder beside.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.packaging.support import ROOT, copy_tree, run

STEP = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
import torch, looksam, looksam_kernels
steps = []
for backend in (None, "reference"):
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 40)
    opt = looksam.LookSAM(model.parameters(), "adamw", lr=0.01, k=2, backend=backend)
    x = torch.randn(16, 300)
    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss
    for _ in range(4):
        opt.step(closure)
    steps.append(model.weight.detach())
assert torch.allclose(*steps, atol=1e-5), (steps[0] - steps[1]).abs().max()
print("version", looksam.__version__, "torch", torch.__version__, "in", looksam.__file__)
"""
TYPES = "import looksam, looksam_kernels\nx: int = looksam.LookSAM\nlooksam_kernels.nothing\n"


@contextmanager
def step(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"ok {time.monotonic() - began:6.0f} s  {what}", flush=True)


def artefacts(folder: Path) -> dict[str, str]:
    """What to give to pip, by name. The checkout is a copy: nothing in the real one can be seen from it."""
    with step("python -m build, in isolation"):
        run(sys.executable, "-m", "build", "--outdir", folder, ".", cwd=ROOT)
    repository = folder / "repository"
    run("git", "clone", "-q", "--no-hardlinks", ROOT, repository, cwd=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    tree = copy_tree(folder / "checkout")
    return {"wheel": str(wheel), "sdist": str(sdist), "checkout": str(tree), "repository": f"git+file://{repository}"}


def use(python: Path, folder: Path, expected: str, env: dict[str, str] | None = None) -> None:
    """A few steps, from an empty folder: ``expected`` must be in what is said."""
    empty = folder / "elsewhere"
    empty.mkdir(exist_ok=True)
    said = run(python, "-c", STEP, cwd=empty, env=env).stdout
    assert expected in said, said
    print("    " + "\n    ".join(said.strip().splitlines()), flush=True)


def fresh(torch: str, folder: Path, found: dict[str, str], base: str) -> None:
    print(f"== a fresh environment: {base}, torch {torch}", flush=True)
    cache = {"LOOKSAM_CACHE_DIR": str(folder / "cache")}
    python = folder / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "-q", "--disable-pip-version-check", "install")
    with step("a virtual environment with torch"):
        run(base, "-m", "venv", folder / "venv", cwd=folder)
        run(*pip, f"torch=={torch}", cwd=folder)
    for name, what in found.items():
        with step(f"pip install {name}"):
            run(*pip, "--force-reinstall", "--no-deps", what, cwd=folder)
            if name == "wheel":
                run(*pip, what, "uv", cwd=folder)
        use(python, folder, "A faster one could run here: there is no compiled extension; run: python -m", cache)
    with step("uv pip install checkout"):
        command = (python, "-m", "uv", "pip", "install", "-q", "--reinstall", "--no-deps", "--python", python)
        run(*command, found["checkout"], cwd=folder)
    with step("python -m looksam_kernels build"):
        run(python, "-m", "looksam_kernels", "build", cwd=folder, env=cache)
    use(python, folder, "INFO looksam: backend native on cpu tensors", cache)
    with step("pip install --editable checkout, and its types"):
        run(*pip, "--no-deps", "--editable", found["checkout"], cwd=folder)
        run(*pip, "mypy", "pyright", cwd=folder)
        use(python, folder, "backend native", cache)
        types(python, folder)


def types(python: Path, folder: Path) -> None:
    """Both checkers find both packages: each says what is wrong with the program."""
    program = folder / "program.py"
    program.write_text(TYPES)
    for checker, option in (("mypy", "--python-executable"), ("pyright", "--pythonpath")):
        done = run(python, "-m", checker, option, python, program, cwd=folder, code=1)
        for word in ("nothing", "LookSAM"):
            assert word in done.stdout, done.stdout + done.stderr


def existing(python: str, folder: Path, wheel: str) -> None:
    print(f"== the environment of {python}", flush=True)
    env = {"PYTHONPATH": str(folder / "packages"), "LOOKSAM_CACHE_DIR": str(folder / "cache")}
    with step("pip install --target wheel"):
        run(
            sys.executable,
            "-m",
            "pip",
            "-q",
            "install",
            "--no-deps",
            "--target",
            folder / "packages",
            wheel,
            cwd=folder,
        )
    use(Path(python), folder, "A faster one could run here", env)
    with step("python -m looksam_kernels build"):
        print(run(python, "-m", "looksam_kernels", "build", cwd=folder, env=env).stderr, flush=True)
    print(run(python, "-m", "looksam_kernels", "build", "--check", cwd=folder, env=env).stdout, flush=True)
    use(Path(python), folder, "INFO looksam: backend native on", env)


def supported() -> list[str]:
    """The oldest torch that pyproject.toml allows, and the one that constraints.txt pins."""
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert oldest is not None
    assert pinned is not None
    return [f"{oldest[1]}.0", pinned[1]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = ", ".join(supported())
    parser.add_argument("--torch", action="append", help=f"a version to install; default: {default}")
    parser.add_argument("--base", default=sys.executable, help="the Python that makes the environments")
    parser.add_argument("--python", action="append", default=[], help="of an environment that has torch already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="looksam-release-") as temporary:
        folder = Path(temporary)
        found = artefacts(folder)
        for number, torch in enumerate(options.torch or ([] if options.python else supported())):
            (folder / str(number)).mkdir()
            fresh(torch, folder / str(number), found, options.base)
        for number, python in enumerate(options.python):
            (folder / f"python{number}").mkdir()
            existing(python, folder / f"python{number}", found["wheel"])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AssertionError, subprocess.SubprocessError) as error:
        sys.exit(f"failed: {error}")
