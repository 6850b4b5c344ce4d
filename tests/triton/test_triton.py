"""What is particular to the Triton backend: when it runs, what it compiles, and what it never waits for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import looksam_kernels as lk
from looksam_kernels.backends import triton as backend
from looksam_kernels.backends.triton import gpu
from looksam_kernels.backends.triton.launch import Launch
from looksam_kernels.backends.triton.tuning import TABLE, Tuning, compiler_options, tuning_of, use_tuning
from looksam_kernels.updates import BASES
from tests import bases

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning"),
    pytest.mark.skipif(
        not lk.backend_info(DEVICE)["triton"].available, reason=lk.backend_info(DEVICE)["triton"].reason
    ),
]
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")]

RULES = {"rho": 0.05, "alpha": 0.7, "perturb_eps": 1e-12, "norm_scope": "global"}
HYPER: dict[str, Any] = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "nesterov": False,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "always_adapt": False,
    "trust_clip": False,
    "bias_correction": True,
    "trust_coefficient": 0.02,
    "lr_decay": 0.1,
    "base.alpha": 0.9,
    "base.rho": 0.9,
    "centered": True,
}


def table(shapes: list[tuple[int, ...]], name: str = "triton", seed: int = 0) -> lk.TensorTable:
    random = torch.Generator().manual_seed(seed)

    def column() -> list[Tensor]:
        return [torch.randn(shape, generator=random).abs().to(DEVICE) for shape in shapes]

    states = {state for base in BASES.values() for state in base.states}
    columns = {c: column() for c in ("w", "b", "g", "s", "q", *sorted(states))}
    columns["step"] = [torch.zeros((), device=DEVICE) for _ in shapes]
    columns["q_norm_sq"] = [torch.ones((), dtype=torch.float64, device=DEVICE) for _ in shapes]
    return lk.TensorTable(backend=name, **columns)


def looksam(made: lk.TensorTable, base: str, **changes: Any) -> None:
    """A refresh and a reuse step."""
    groups, lars = [{**RULES, **HYPER, **bases.with_all_states(base), **changes}], BASES[base].takes_trust_ratio
    known, up = lk.measure(made, "sam", groups, trust_ratio=lars)
    lk.perturb(made, up)
    _, down = lk.measure(made, "looksam_refresh", groups, known=known, found_inf=up.found_inf, trust_ratio=lars)
    lk.step(made, base, down, groups)
    _, down = lk.measure(made, "looksam_reuse", groups, trust_ratio=lars)
    lk.step(made, base, down, groups)


# Where it runs --------------------------------------------------------------------------------------------------------


def in_a_new_process(code: str, **environment: str) -> str:
    import os

    variables = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "LOOKSAM_BACKEND")}
    variables |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_interprets_when_asked_for_and_says_so() -> None:
    said = in_a_new_process(
        "import looksam_kernels as lk, torch, sys\n"
        "assert lk.TensorTable([torch.ones(3)]).backend_name != 'triton'\n"
        "assert 'triton' not in sys.modules\n"
        "info = lk.backend_info()['triton']\n"
        "assert info.available and not info.selected and 'interpreter' in info.reason, info\n"
        "with lk.use_backend('triton'):\n"
        "    table = lk.TensorTable([torch.ones(3)], g=[torch.ones(3)])\n"
        "assert table.backend_name == 'triton'\n"
        "assert lk.sums(table, [('g', 'g')]).values.item() == 3\n"
    )
    assert "interpreter" in said


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_it_cannot_interpret_once_triton_was_imported_to_compile() -> None:
    in_a_new_process(
        "import triton, torch, looksam_kernels as lk\n"
        "info = lk.backend_info()['triton']\n"
        "assert not info.available and 'TRITON_INTERPRET' in info.reason, info\n"
        "try:\n"
        "    lk.TensorTable([torch.ones(3)], backend='triton')\n"
        "except RuntimeError as error:\n"
        "    assert 'TRITON_INTERPRET' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )


@pytest.mark.parametrize(("version", "said"), [("3.2.0", "triton 3.2 is too old; 3.6 or newer"), ("3.10.1", None)])
def test_a_triton_that_lacks_what_the_kernels_use_is_no_backend(
    version: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch 2.6 installs Triton 3.2: on a GPU its first step must not fail for that."""
    (tmp_path / "__init__.py").write_text(f"__version__ = '{version}'\n")
    spec = importlib.util.spec_from_file_location("triton", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    gpu._not_usable.cache_clear()
    try:
        why = gpu._not_usable()
        assert why is None if said is None else said in str(why)
        assert said is None or backend.unavailable(torch.device("cuda")) == why
    finally:
        gpu._not_usable.cache_clear()


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_gpus_of_every_maker_are_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's are torch's cuda devices, Intel's are xpu devices."""
    device = torch.device(kind)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for there, why in ((False, "torch finds no GPU with a driver here"), (True, None)):
        monkeypatch.setattr(torch.get_device_module(kind), "is_available", lambda there=there: there)
        assert backend.unavailable(device) == why


@pytest.mark.parametrize(
    ("name", "lanes", "options"),
    [
        ("cuda", 32, {"num_warps": 8, "maxnreg": 128}),
        ("hip", 64, {"num_warps": 4}),
        ("hip", 32, {"num_warps": 8}),  # RDNA, whose compiler knows no maxnreg either
        ("xpu", 16, {"num_warps": 16}),
    ],
)
def test_compiler_options_go_by_the_name_of_tritons_backend(name: str, lanes: int, options: dict[str, int]) -> None:
    assert compiler_options(SimpleNamespace(backend=name, arch=None, warp_size=lanes)) == options


def test_sizes_are_those_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a table's first op stay: the results have the same bits only with the same chunks."""
    monkeypatch.setitem(TABLE, ("hip", "gfx942"), Tuning(64, 32))
    monkeypatch.setattr(gpu, "target", lambda device: SimpleNamespace(backend="hip", arch="gfx942", warp_size=32))
    made, other = table([(100,), (4, 8)]), table([(100,), (4, 8)], "reference")
    for x in (made, other):
        looksam(x, "adamw")
    assert made.handle.layout.chunks == 3
    for x, y in zip((*made["w"], *made["q"]), (*other["w"], *other["q"]), strict=True):
        torch.testing.assert_close(x, y)
    with use_tuning(Tuning(32, 32)):
        assert tuning_of(gpu.target(made.device)).chunk == 32
        again = table([(100,), (4, 8)])
        looksam(again, "adamw")
        looksam(made, "adamw")
    assert (again.handle.layout.chunks, made.handle.layout.chunks) == (5, 3)


def test_threads_divide_the_chunks_of_every_architecture() -> None:
    for tuning in TABLE.values():
        assert tuning.width * tuning.threads == tuning.chunk
        assert tuning.chunk & (tuning.chunk - 1) == 0


def test_gradients_whose_numbers_are_not_those_in_memory_take_the_reference() -> None:
    """Negated when they are read, in one of two rows."""
    found = []
    for name in ("triton", "reference"):
        made = table([(4,), (4,)], name)
        made["g"] = [torch._neg_view(made["g"][0]), made["g"][1]]
        assert made["g"][0].is_neg()
        looksam(made, "adamw")
        found.append([x.clone() for name in ("w", "q", "exp_avg") for x in made[name]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# What it compiles -----------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """What the compiler distinguishes in each launch: the kernel, the arguments' types, the constexprs."""
    seen: set[Any] = set()
    launch = Launch.__call__

    def text_of(x: Any) -> str:
        """A rule's function is made for each table."""
        return str(getattr(getattr(x, "fn", None), "__code__", x))

    def kind(x: Any) -> Any:
        return tuple(map(kind, x)) if isinstance(x, tuple) else getattr(x, "dtype", type(x))

    def record(prepared: Launch, grid: Any, device: Any, *arguments: Any) -> None:
        constexprs = sorted((name, text_of(x)) for name, x in prepared.constexprs.items())
        seen.add((prepared.kernel.__name__, kind(arguments), str(constexprs)))
        launch(prepared, grid, device, *arguments)

    monkeypatch.setattr(Launch, "__call__", record)
    return seen


@pytest.mark.parametrize("base", BASES)
def test_nothing_is_compiled_again_when_numbers_change(base: str, launches: set[Any]) -> None:
    """lr, decay, momentum, rho, alpha, the step count, and how many tensors there are and how large."""
    made = table([(16,), (4, 8)])
    looksam(made, base)
    compiled = set(launches)
    looksam(
        made,
        base,
        lr=1.0,
        weight_decay=0.0,
        rho=0.5,
        alpha=1.0,
        betas=(0.0, 0.5, 0.9),
        momentum=0.0,
        nesterov=True,
        centered=0,
    )
    looksam(table([(16,)]), base, lr=1)
    looksam(table([(i,) for i in range(17)]), base, rho=1)
    assert launches == compiled


def test_no_run_time_argument_of_a_kernel_is_specialised() -> None:
    code = (
        "import triton\n"
        "from triton.runtime.jit import JITFunction\n"
        "from looksam_kernels.backends.triton import kernels as k\n"
        "kernels = ('inner_products', 'add_partials', 'evaluate', 'perturb', 'restore', 'advance', 'step')\n"
        "kernels += ('finish_step', 'apply_lamb')\n"
        "for name in kernels:\n"
        "    for p in getattr(k, name).params:\n"
        "        assert p.is_constexpr or p.do_not_specialize, (name, p.name)\n"
    )
    in_a_new_process(code)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_the_cache_of_compiled_kernels_does_not_grow(device: str) -> None:
    kernels = gpu.kernels()
    names = ("inner_products", "add_partials", "evaluate", "perturb", "advance", "step", "finish_step")

    def compiled() -> list[int]:
        return [len(cache[0]) for name in names for cache in getattr(kernels, name).device_caches.values()]

    looksam(table([(16,), (4, 8)]), "adamw")
    before = compiled()
    looksam(table([(16,)]), "adamw", lr=1, rho=0.5)
    looksam(table([(i,) for i in range(17)]), "adamw", weight_decay=0.0)
    assert compiled() == before


# Nothing waits for the device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("base", BASES)
def test_no_op_synchronises(device: str, base: str) -> None:
    made = table([(5000,), (3,)])
    looksam(made, base)
    torch.cuda.set_sync_debug_mode("error")
    try:
        looksam(made, base, lr=0.02)
        made["g"] = [g.clone() for g in made["g"]]
        looksam(made, base, lr=0.03)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_a_captured_step_replays_to_the_same_bits(device: str) -> None:
    eager, captured = table([(5000,), (3,)]), table([(5000,), (3,)])
    looksam(eager, "adamw")
    looksam(captured, "adamw")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        looksam(captured, "adamw")
    for _ in range(3):
        graph.replay()
        looksam(eager, "adamw")
    for name in ("w", "q", "exp_avg", "step"):
        assert all(torch.equal(x, y) for x, y in zip(eager[name], captured[name], strict=True))
