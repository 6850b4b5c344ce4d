"""Which compiled module is loaded: only one made for this torch, this Python and these sources, wherever it lies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import looksam_kernels
from looksam_kernels import extension
from looksam_kernels.build import builder, recipe
from tests.packaging.support import ALONE, ROOT, run

SAY = (
    "import logging, sys; logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')\n"
    "import torch, looksam\n"
    "for lr in (0.1, 0.2): looksam.SAM([torch.nn.Parameter(torch.ones(3))], 'sgd', lr=lr)\n"
)
IN_EACH = """
import logging, os, torch, looksam, looksam_kernels
looksam.SAM
torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])  # the first optimizer imports half of torch
logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')
for setting in {settings}:
    if os.fork() == 0:
        print(setting, file=sys.stderr)
        os.environ.update(setting)
        for lr in (0.1, 0.2):
            looksam.SAM([torch.nn.Parameter(torch.ones(3))], 'sgd', lr=lr)
        os._exit(0)
    assert os.wait()[1] == 0
"""
"""Two optimizers in a process for each setting of the environment: importing torch is what takes the time."""


def here(module: str = recipe.CPU) -> recipe.Stamp:
    """What a module that fits would carry."""
    return recipe.Stamp(
        module, torch.__version__, recipe.python_abi(), torch.version.cuda if module == recipe.CUDA else None,
        recipe.platform.machine(), recipe.digest(ROOT / "csrc", module), "a compiler", "",
    )  # fmt: skip


def module_file(folder: Path, stamp: recipe.Stamp | None) -> Path:
    """A file with that stamp, which is all that is read before it is loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    abi = recipe.python_abi() if stamp is None else stamp.python
    file = folder / f"{stamp.module if stamp else recipe.CPU}.{abi}.so"
    text = b"" if stamp is None else recipe.MARK + recipe.json.dumps(stamp._asdict()).encode()
    file.write_bytes(b"\x7fELF and more\0" + text + b"\0 the rest")
    return file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "1.2.3"}, f"was built for torch 1.2.3, this is torch {torch.__version__}"),
        (
            {"python": "cpython-39-x86_64-linux-gnu"},
            f"for Python cpython-39-x86_64-linux-gnu, this is {recipe.python_abi()}",
        ),
        ({"machine": "sparc"}, "was built for sparc, this is"),
        ({"sources": "0" * 16}, "was built from other sources than those in"),
        ({}, None),
    ],
)
def test_what_a_module_was_made_for_decides(change: dict[str, str], said: str | None, tmp_path: Path) -> None:
    _, why = extension.judge(module_file(tmp_path, here()._replace(**change)), recipe.CPU)
    assert why is None if said is None else said in str(why)


def test_the_cuda_module_is_bound_to_torchs_cuda_and_the_other_is_not(tmp_path: Path) -> None:
    stamp = here(recipe.CUDA)._replace(cuda="7.0")
    assert "was built for CUDA 7.0" in str(extension.judge(module_file(tmp_path, stamp), recipe.CUDA)[1])
    assert extension.judge(module_file(tmp_path, here()), recipe.CPU)[1] is None


def test_a_module_without_a_stamp_is_not_loaded(tmp_path: Path) -> None:
    assert extension.judge(module_file(tmp_path, None), recipe.CPU) == (
        None, "the compiled extension does not say what it was built for",
    )  # fmt: skip


def test_one_for_another_torch_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade of torch: the reason must not be that there is no extension. One that fits elsewhere would be taken."""
    monkeypatch.setattr(extension, "_modules_in", lambda folder, name: [])
    monkeypatch.setenv("LOOKSAM_CACHE_DIR", str(tmp_path))
    module_file(tmp_path / "builds" / "_C-old", here()._replace(torch="1.2.3"))
    found = extension.load(recipe.CPU)
    assert found.module is None
    assert found.reason == (
        f"the compiled extension was built for torch 1.2.3, this is torch {torch.__version__}; "
        "run: python -m looksam_kernels build"
    )
    os.utime(module_file(tmp_path / "builds" / "_C-damaged", here()), (9e9, 9e9))  # the newest comes first
    assert "cannot be loaded" in str(extension.load(recipe.CPU).reason)


def test_every_source_counts(tmp_path: Path) -> None:
    before = {module: recipe.digest(ROOT / "csrc", module) for module in (recipe.CPU, recipe.CUDA)}
    csrc = recipe.shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert before == {module: recipe.digest(csrc, module) for module in before}
    for name, changed in (
        ("core/updates.h", {recipe.CPU, recipe.CUDA}),
        ("cpu/chunks.h", {recipe.CPU}),
        ("cuda/step.cuh", {recipe.CUDA}),
        ("harness/execute.h", set()),
    ):
        path = csrc / name
        original = path.read_text()
        path.write_text(original + "\n")
        assert {module for module in before if recipe.digest(csrc, module) != before[module]} == changed
        path.write_text(original)


@pytest.mark.slow
def test_an_installed_package_without_a_module_says_so_once(site: Path, tmp_path: Path) -> None:
    settings = [{}, {"LOOKSAM_BACKEND": "reference"}, {"LOCAL_RANK": "1"}]
    program = ALONE.format(site=str(site)) + IN_EACH.format(settings=settings)
    env = {"PYTHONPATH": str(site), "LOOKSAM_CACHE_DIR": str(tmp_path)}
    assert run(sys.executable, "-c", program, cwd=tmp_path, env=env).stderr.splitlines() == [
        "{}",
        "WARNING looksam: backend reference on cpu tensors. A faster one could run here: there is no compiled extension; "
        "run: python -m looksam_kernels build",
        "{'LOOKSAM_BACKEND': 'reference'}",
        "{'LOCAL_RANK': '1'}",
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    not looksam_kernels.backend_info("cpu")["native"].available, reason="no compiled module is there to be found"
)
def test_a_python_started_in_the_checkout_runs_native_and_mixes_nothing(site: Path, tmp_path: Path) -> None:
    """``site`` stands for a normal installation: from the checkout's root, looksam is found there, and so must be
    looksam_kernels, though Python looks into its working folder first."""
    env = {"PYTHONPATH": str(site), "LOOKSAM_CACHE_DIR": str(tmp_path)}
    where = "print(looksam.__file__, looksam.SAM.__module__, sys.modules['looksam_kernels'].__file__)\n"
    first = "import looksam_kernels, looksam\n"
    program = (
        f"import os, sys, torch\nif os.fork() == 0:\n    {first}    os._exit(0)\nos.wait()\nimport looksam\n{where}"
    )
    done = run(sys.executable, "-c", program, cwd=ROOT, env=env)
    assert "looksam_kernels from" in done.stderr
    assert done.stderr.count("which may be another version") == 1, "where looksam_kernels was imported first"
    files = done.stdout.split()
    assert files[0] == str(site / "looksam" / "__init__.py")
    assert files[2] == str(site / "looksam_kernels" / "__init__.py")
    assert (
        "backend native on cpu tensors" in run(sys.executable, "-c", SAY, cwd=ROOT, env={"PYTHONPATH": "python"}).stderr
    )


def test_the_recipe_is_the_one_that_is_compiled() -> None:
    assert builder.csrc() == ROOT / "csrc"
    assert {path.name for path in recipe.sources(ROOT / "csrc", recipe.CPU)} >= {"cpu.cpp", "ops.cpp", "avx2.cpp"}
