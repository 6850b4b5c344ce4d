"""setup.py where something is missing or does not fit: what can be built is built, and the reason for the rest is said."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from looksam_kernels.build import recipe
from tests.packaging.support import QuickCompiler, build, copy_tree, run, unpack

NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo 'nvcc: NVIDIA (R) Cuda compiler driver'; echo 'Cuda compilation tools, release {release}, V{release}.88' ;;
  *) echo 'host_config.h:1:2: error: #error -- unsupported GNU version!' >&2; exit 1 ;;
esac
"""
PRETENDS = """
import os
import torch
from torch.utils import cpp_extension
torch.version.cuda = "13.0"
cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]
"""


def toolkit(folder: Path, release: str) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(release=release))
    nvcc.chmod(0o755)
    return folder


@pytest.mark.slow
def test_what_stands_in_the_way_of_cuda_does_not_cost_the_cpu(tmp_path: Path) -> None:
    """A g++ that nvcc does not take, on a torch that says it is for CUDA."""
    tree = copy_tree(tmp_path / "tree")
    (tmp_path / "sitecustomize.py").write_text(PRETENDS)
    env = {
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "CUDA_HOME": str(toolkit(tmp_path / "cuda", "13.0")),
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "CXX": str(QuickCompiler(tmp_path / "compiler").path),
    }
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, env=env)
    assert "native backend built for the CPU" in done.stderr
    assert "no CUDA kernels: the compiler failed (" in done.stderr
    assert "unsupported GNU version" in done.stderr
    assert len(list(tree.glob("looksam_kernels/_C.*.so"))) == 1
    assert list(tree.glob("looksam_kernels/_cuda*.so")) == []


def test_nvcc_of_another_major_version_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "12", "12.4")))
    assert f"is of CUDA 12, torch {torch.__version__} of CUDA 13.0" in str(recipe.why_no_cuda())
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "13", "13.1")))
    assert recipe.why_no_cuda() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "nvcc was not found" in str(recipe.why_no_cuda())


@pytest.mark.slow
def test_without_isolation_the_wheel_holds_the_module_and_is_for_this_python(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="the package `build` is not installed")
    pytest.importorskip("setuptools_scm", reason="setuptools-scm is not installed")
    compiler = QuickCompiler(tmp_path / "compiler")
    wheel = build(copy_tree(tmp_path / "tree"), tmp_path / "dist", "wheel", {"CXX": str(compiler.path)})
    assert "-none-any" not in wheel.name
    module = unpack(wheel, tmp_path / "site") / "looksam_kernels" / f"_C.{recipe.python_abi()}.so"
    stamp = recipe.read_stamp(module)
    assert stamp is not None
    assert stamp.sources == recipe.digest(module.parent / "csrc", recipe.CPU), "of the sources beside it"


WRAPPER = """#!/bin/sh
case "$*" in
  *--dryrun*) echo '#$ _NVVM_BRANCH_=nvvm' >&2; echo '#$ TOP={top}/bin/..' >&2 ;;
  *--list-gpu-arch*) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_99\\n' ;;
esac
"""


def test_the_toolkit_and_the_architectures_are_what_nvcc_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvcc on the search path may be a script elsewhere, beside which there are no headers."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nvcc = tmp_path / "path" / "nvcc"
    nvcc.parent.mkdir()
    (tmp_path / "cuda").mkdir()
    nvcc.write_text(WRAPPER.format(top=tmp_path / "cuda"))
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}:{os.environ['PATH']}")
    assert recipe.nvcc() == nvcc
    assert recipe.cuda_home(nvcc) == tmp_path / "cuda"
    assert recipe.cuda_arch_list() == "7.5;8.0;9.0+PTX"
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert recipe.cuda_home(nvcc) == Path("/opt/cuda")


@pytest.mark.parametrize("variable", ["LOOKSAM_CUDA", "LOOKSAM_NATIVE"])
def test_other_values_than_0_1_auto_are_refused(variable: str, tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    done = run(sys.executable, "setup.py", "--name", cwd=tree, env={variable: "yes"}, code=1)
    assert f"{variable}='yes' means nothing; set it to 0 (leave out), 1 (required) or auto" in done.stderr


def test_asked_for_and_not_possible_is_an_error(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    env = {"CXX": "/no/compiler", "LOOKSAM_NATIVE": "1"}
    assert "there is no C++ compiler" in run(sys.executable, "setup.py", "--name", cwd=tree, env=env, code=1).stderr
