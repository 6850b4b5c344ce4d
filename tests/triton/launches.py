"""Compiles ahead of time, for GPUs that are not there, every launch that the ops make; prints what came out as JSON.

Usage: python launches.py cuda:90 | hip:gfx942 [ops | rules [CHUNK THREADS REGISTERS]]; ``rules``: the kernel that evaluates a
rule, for every rule. The sizes: in place of the table's (looksam_kernels/backends/triton/tuning.py)

The host code runs as it is, on CPU tensors, but a launch is compiled instead of run. So the element types, the
constexprs and the arguments are the ones that a GPU would see.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import looksam_kernels as lk
from looksam_kernels.backends import triton as backend
from looksam_kernels.backends.triton import gpu, kernels
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.tuning import Tuning, compiler_options, use_tuning
from looksam_kernels.formulas import ASCENTS, DESCENTS, Coefficients, Sums
from looksam_kernels.updates import BASES
from tests.kernels.cases import RULE_GROUPS

POINTERS = {
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


def type_of(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(type_of(x) for x in argument)
    if isinstance(argument, Tensor):
        return POINTERS[argument.dtype]
    return "constexpr" if argument is None else {int: "i32"}[type(argument)]


def _text(constexpr: Any) -> str:
    """A rule's function is told from others by what it does."""
    return str(getattr(constexpr, "src", constexpr))


def compile_launch(target: GPUTarget, kernel: Any, arguments: tuple[Any, ...], constexprs: dict[str, Any]) -> Any:
    signature = dict(zip(kernel.arg_names, map(type_of, arguments), strict=False))
    absent = {name: None for name, x in zip(kernel.arg_names, arguments, strict=False) if x is None}
    signature |= dict.fromkeys(constexprs, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs={**absent, **constexprs})
    return triton.compile(source, target=target, options=compiler_options(target))


def report(compiled: Any, kernel: Any, constexprs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"kernel": kernel.fn.__name__, "constexprs": str(constexprs)}
    if "ptx" in compiled.asm:
        accesses = re.findall(r"(?:ld|st)\.global[\w.:]*\.(?:v\d\.)?[bfsu]\d+", compiled.asm["ptx"])
        said = assemble(compiled.asm["ptx"])
        found["registers"] = int(re.search(r"Used (\d+) registers", said)[1])  # type: ignore[index]
        found["spilled"] = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
        found["loads"] = sum(map(words_of_16_bytes, (x for x in accesses if x.startswith("ld"))))
        found["stores"] = sum(map(words_of_16_bytes, (x for x in accesses if x.startswith("st"))))
    else:
        assembly = compiled.asm["amdgcn"]
        found["loads"] = len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly))
        found["stores"] = len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly))
        # Bytes of memory a thread. (Scalar registers may go to lanes of vector registers, which takes none.)
        found["spilled"] = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])  # type: ignore[index]
        found["spilled"] += sum(map(int, re.findall(r"vgpr_spill_count:\s+(\d+)", assembly)))
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])  # type: ignore[index]
    return found


def assemble(ptx: str) -> str:
    """What ptxas has to say about it."""
    architecture = re.search(r"\.target sm_(\w+)", ptx)[1]  # type: ignore[index]
    tool = get_ptxas(int(architecture.rstrip("a")))
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder, "kernel.ptx")).write_text(ptx)
        command = [tool.path, "-v", f"-arch=sm_{architecture}", str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def words_of_16_bytes(access: str) -> bool:
    vector = re.search(r"\.v(\d)\.[bfsu](\d+)$", access)
    return vector is not None and int(vector[1]) * int(vector[2]) == 128


def launch_everything() -> None:
    """Each op on float32 rows, and on bfloat16 rows with a master copy; for some bases on bfloat16 rows that are rounded
    stochastically, too."""
    pure = lk.Rounding()
    for dtype, rounding in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, pure)):
        for base, row in BASES.items():
            if rounding is not None and base not in ("sgd", "lamb", "adan"):
                continue
            states = row.states
            names = ("w", "b", "g", "s", "q", *states)
            wide = (*(("b",) if rounding is None else ()), "q", *states)
            columns: dict[str, Any] = {
                name: [torch.zeros(8192, dtype=torch.float32 if name in wide else dtype)] for name in names
            }
            columns |= {"step": [torch.zeros(())], "q_norm_sq": [torch.zeros((), dtype=torch.float64)]}
            table = lk.TensorTable(backend="triton", rounding=rounding, **columns)
            c = torch.ones(2, 1, dtype=torch.float64)
            up = Coefficients(("g",), c[:1], None, torch.tensor(0.0))
            down = Coefficients(("s", "g"), c, c, torch.tensor(0.0), None if row.update is None else c)
            down = down._replace(trust=c[0] if row.takes_trust_ratio else None)
            if base == "sgd":
                lk.sums(table, (("g", "g"), ("g", "s"), ("q", "q")))
                lk.sums(table, (("Tg", "Tg"),), [0.01])
                lk.perturb(table, up, [0.01])
                lk.restore(table)
                lk.perturb(table, up, None, lk.Mask(keep=0.6))
                lk.restore(table)
            lk.perturb(table, up)
            lk.step(table, base, down, [{**dict.fromkeys(row.read, 0.1), "betas": (0.9, 0.9, 0.9)}])


def evaluate_every_rule() -> None:
    """As it is, and with a loss scale, clipping and LARS's trust ratio."""
    groups = [{"norm_scope": "global", **group} for group in RULE_GROUPS]
    for rule in (*ASCENTS, *DESCENTS):
        table = lk.TensorTable([torch.zeros(4)] * len(groups), range(len(groups)), backend="triton")
        pairs = lk.ops.pairs_of(rule, clip=True, trust_ratio=True)
        sums = Sums(pairs, torch.ones(len(pairs), len(groups), dtype=torch.float64))
        lk.coefficients(table, rule, sums, groups)
        lk.coefficients(
            table, rule, sums, groups, grad_scale=torch.tensor(2.0), max_grad_norm=1.0, trust_ratio=rule in DESCENTS
        )


def main(name: str, what: str = "ops", *sizes: str) -> None:
    system, _, architecture = name.partition(":")
    target = GPUTarget("cuda", int(architecture), 32) if system == "cuda" else GPUTarget("hip", architecture, 64)
    found, seen = [], set()

    def launch(prepared: Any, grid: Any, device: Any, *arguments: Any) -> None:
        kernel, constexprs = prepared.kernel, prepared.constexprs
        key = (
            kernel.fn.__name__,
            str([type_of(x) for x in arguments]),
            str({n: _text(x) for n, x in constexprs.items()}),
        )
        if key not in seen:
            seen.add(key)
            found.append(report(compile_launch(target, kernel, arguments, constexprs), kernel, constexprs))

    Launch.__call__, gpu.kernels = launch, lambda: kernels  # type: ignore[method-assign, assignment]
    gpu.target = lambda device: target
    backend.unavailable = lambda device: None  # type: ignore[assignment]
    with use_tuning(Tuning(*map(int, sizes))) if sizes else contextlib.nullcontext():
        evaluate_every_rule() if what == "rules" else launch_everything()
    print(json.dumps({"triton": triton.__version__, "launches": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
