"""Muon for the matrices and AdamW for the rest in one optimizer, as examples/muon_transformer.py has it, under SAM and LookSAM.

(Adafactor and Muon alone are among the bases of test_against_formulas.py and test_identities.py.)
"""

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looksam
from tests.optim.cases import QUICK

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
EXAMPLE = Path(__file__).parents[2] / "examples" / "muon_transformer.py"
STEPS, K, RHO, ALPHA = 5, 2, 0.3, 0.7
MUON = {"lr": 0.02, "weight_decay": 0.1}
ADAMW = {"lr": 0.01, "weight_decay": 0.05}
on_backends = pytest.mark.parametrize("backend", QUICK)
on_variants = pytest.mark.parametrize("variant", [looksam.SAM, looksam.LookSAM])


@pytest.fixture(scope="module")
def muon_and_adamw() -> Any:
    return runpy.run_path(str(EXAMPLE))["MuonAndAdamW"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    params = [*model.parameters()]
    return [
        {"params": [p for p in params if p.ndim == 2], "muon": True, **MUON},
        {"params": [p for p in params if p.ndim != 2], **ADAMW},
    ]


def loss(model: nn.Module, step: int) -> Tensor:
    random = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 6, generator=random, dtype=torch.float64), torch.randint(3, (16,), generator=random)
    return F.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            value = loss(model, step)
            value.backward()
            return value

        optimizer.step(closure)


def by_hand(variant: type) -> tuple[list[list[Tensor]], Any]:
    """The directions of all steps, with one norm over all parameters; how to step along one with torch's own classes."""
    model = network()
    params = [*model.parameters()]
    muon = torch.optim.Muon([p for p in params if p.ndim == 2], **MUON)
    adamw = torch.optim.AdamW([p for p in params if p.ndim != 2], **ADAMW)

    def dot(a: Any, b: Any) -> Tensor:
        return sum(((x * y).sum() for x, y in zip(a, b, strict=True)), start=torch.zeros((), dtype=torch.float64))

    def descend(d: list[Tensor]) -> list[Tensor]:
        for p, x in zip(params, d, strict=True):
            p.grad = x.clone()
        muon.step()
        adamw.step()
        return [p.detach().clone() for p in params]

    def directions(step: int, q: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        g = torch.autograd.grad(loss(model, step), params)
        if step % K:
            scale = ALPHA * (dot(g, g) / dot(q, q)).sqrt() if variant is looksam.LookSAM else 0.0
            return [x + scale * y for x, y in zip(g, q, strict=True)], q
        before = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, x in zip(params, g, strict=True):
                p.add_(RHO * x / dot(g, g).sqrt())
        s = torch.autograd.grad(loss(model, step), params)
        with torch.no_grad():
            for p, x in zip(params, before, strict=True):
                p.copy_(x)
        return list(s), [x - dot(g, s) / dot(g, g) * y for x, y in zip(s, g, strict=True)]

    return directions, descend  # type: ignore[return-value]


@on_backends
@on_variants
def test_directions_have_joint_norms_and_each_parameter_follows_its_own_optimizer(
    backend: str, variant: Any, muon_and_adamw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon rounds to bfloat16 inside, so the weights are compared with those of torch's classes along the very same d."""
    model = network()
    optimizer = variant(groups(model), muon_and_adamw, rho=RHO, k=K, backend=backend)
    seen: list[list[Tensor]] = []
    step_of_base = muon_and_adamw.step

    def noted(self: Any, closure: Any = None) -> None:
        seen.append([p.grad.clone() for p in model.parameters()])
        step_of_base(self)

    monkeypatch.setattr(muon_and_adamw, "step", noted)
    directions, descend = by_hand(variant)
    q: list[Tensor] = []
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        expected, q = directions(step, q)  # type: ignore[operator]
        for a, b in zip(seen[-1], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for a, b in zip(model.parameters(), descend(seen[-1]), strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-14)


@on_backends
@on_variants
def test_a_run_continues_from_a_checkpoint_bit_for_bit(backend: str, variant: Any, muon_and_adamw: Any) -> None:
    model, other = network(), network()
    optimizer = variant(groups(model), muon_and_adamw, rho=RHO, k=K, backend=backend)
    train(model, optimizer, 0, 3)
    other.load_state_dict(model.state_dict())
    second = variant(groups(other), muon_and_adamw, rho=RHO, k=K, backend=backend)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, second)):
        train(m, o, 3, 6)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
