"""How far a run is from that of the code which people come from: the rows of docs/parity.md.

The method of a source is re-stated here in plain PyTorch, or, where it is a package, imported. Both train the same small
network in float64, over SGD if nothing else is named. ``python -m tests.optim.parity`` writes the table into the page.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import looksam

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
STEPS, BATCH = 14, 16
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ROUNDING = 1e-12
"""Of the largest weight: what 14 steps in float64 make of other orders of the same operations."""

Step = Callable[["Theirs"], None]
Tensors = list[Tensor]


def network() -> nn.Sequential:
    """With a norm layer, whose scale has one dimension and a name that contains "weight"."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 6, generator=random, dtype=torch.float64), torch.randint(3, (BATCH,), generator=random)


def groups(model: nn.Module, rates: tuple[float, ...]) -> list[dict[str, Any]]:
    """Two: the first layer, and all the others; with a learning rate each."""
    params = [*model.parameters()]
    return [{"params": p, "lr": lr} for p, lr in zip((params[:2], params[2:]), rates, strict=True)]


def norm(xs: Tensors) -> Tensor:
    return torch.stack([x.norm() for x in xs]).norm()


def dot(xs: Tensors, ys: Tensors) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)]).sum()


# What the sources do, one step each -----------------------------------------------------------------------------------


class Theirs:
    """A network under an optimizer of torch, and what a method needs to make its gradients."""

    def __init__(self, rates: tuple[float, ...], cls: Any = torch.optim.SGD, **options: Any) -> None:
        self.model = network()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.w = [*self.model.parameters()]
        self.inner = cls(groups(self.model, rates), **{**options, "lr": rates[0]})
        self.t, self.kept = 0, {}  # type: ignore[var-annotated]

    def losses(self, step: int, kept: Any = slice(None)) -> Tensor:
        x, y = batch(step)
        return F.cross_entropy(self.model(x[kept]), y[kept], reduction="none")

    def gradient(
        self, e: Tensors | None = None, step: int | None = None, kept: Any = slice(None), l2: float = 0.0
    ) -> Tensors:
        """At w + e, on the batch of ``step``, default this one; ``l2``: with l2 / 2 ||w||^2 in the loss."""
        before = [p.detach().clone() for p in self.w]
        with torch.no_grad():
            for p, x in zip(self.w, e or [], strict=False):
                p.add_(x)
        loss = self.losses(self.t if step is None else step, kept).mean()
        loss = loss + l2 / 2 * sum((p.square().sum() for p in self.w), start=torch.zeros(()))
        found = list(torch.autograd.grad(loss, self.w))
        with torch.no_grad():
            for p, x in zip(self.w, before, strict=True):
                p.copy_(x)
        return found

    def descend(self, d: Tensors) -> None:
        for p, x in zip(self.w, d, strict=True):
            p.grad = x.clone()
        self.inner.step()


def sam(at: Theirs, rho: float = 0.3, l2: float = 0.0) -> None:
    g = at.gradient(l2=l2)
    at.descend(at.gradient([rho * x / norm(g) for x in g], l2=l2))


def unified(at: Theirs, rho: float = 0.3, part: float = 0.4) -> None:
    g = at.gradient()
    at.descend(at.gradient([rho * (1 - part + part / norm(g)) * x for x in g]))


def norm_penalty(at: Theirs, rho: float = 0.3, a: float = 0.8) -> None:
    g = at.gradient()
    s = at.gradient([rho * x / norm(g) for x in g])
    at.descend([(1 - a) * x + a * y for x, y in zip(g, s, strict=True)])


def sam_on(at: Theirs, rho: float = 0.3) -> None:
    """The perturbation of the norm layer alone."""
    g = [x if name.startswith("1.") else 0 * x for name, x in zip(at.names, at.gradient(), strict=True)]
    at.descend(at.gradient([rho * x / norm(g) for x in g]))


def asam(at: Theirs, t: Callable[[str, Tensor], Tensor | float], rho: float = 0.5) -> None:
    """t(name, w) is T."""
    scales = [t(name, p.detach()) for name, p in zip(at.names, at.w, strict=True)]
    g = at.gradient()
    n = norm([s * x for s, x in zip(scales, g, strict=True)])
    at.descend(at.gradient([rho * s**2 * x / n for s, x in zip(scales, g, strict=True)]))


def named_weight(name: str, w: Tensor) -> Tensor | float:
    return w.abs() + 0.01 if "weight" in name else 1.0


def ssam(at: Theirs, rho: float = 0.3) -> None:
    g = at.gradient()
    s = at.gradient([rho * x / norm(g) for x in g])
    at.descend([norm(g) / norm(s) * x for x in s])


def gsam(at: Theirs, rho: float = 0.3, rho_min: float = 0.1, alpha: float = 0.4, lr_max: float = 0.2) -> None:
    """The radius follows the learning rate of the first group."""
    radius = rho_min + (rho - rho_min) * at.inner.param_groups[0]["lr"] / lr_max
    g = at.gradient()
    s = at.gradient([radius * x / norm(g) for x in g])
    cosine = dot(g, s) / (norm(g) * norm(s))
    vertical = [a - cosine * norm(g) * b / norm(s) for a, b in zip(g, s, strict=True)]
    at.descend([b - alpha * v for b, v in zip(s, vertical, strict=True)])


def wsam(at: Theirs, rho: float = 0.3, gamma: float = 0.6) -> None:
    a = gamma / (1 - gamma)
    g = at.gradient()
    s = at.gradient([rho * x / norm(g) for x in g])
    at.descend(g)
    with torch.no_grad():
        for p, x, y in zip(at.w, s, g, strict=True):
            p.sub_(at.inner.param_groups[0]["lr"] * a * (x - y))


def friendly(at: Theirs, rho: float = 0.3, sigma: float = 0.8, lambda_: float = 0.7, adaptive: bool = False) -> None:
    g = at.gradient()
    m = at.kept.get("m")
    c = g if m is None else [x - sigma * y for x, y in zip(g, m, strict=True)]
    at.kept["m"] = g if m is None else [lambda_ * y + (1 - lambda_) * x for x, y in zip(g, m, strict=True)]
    t = [p.detach().abs() if adaptive else torch.ones_like(p) for p in at.w]
    n = norm([s * x for s, x in zip(t, c, strict=True)])
    at.descend(at.gradient([rho * s**2 * x / n for s, x in zip(t, c, strict=True)]))


def vasso(at: Theirs, rho: float = 0.3, theta: float = 0.4, eps: float = 1e-7) -> None:
    g = at.gradient()
    m = at.kept.get("m")
    m = at.kept["m"] = g if m is None else [(1 - theta) * y + theta * x for x, y in zip(g, m, strict=True)]
    at.descend(at.gradient([rho * x / (norm(m) + eps) for x in m]))


def crsam(at: Theirs, rho: float = 0.3, gamma: float = 0.2, beta: float = 0.1) -> None:
    g = at.gradient()
    e = [rho * x / norm(g) for x in g]
    worst, best = at.gradient(e), at.gradient([-x for x in e])
    rows = zip(worst, best, g, strict=True)
    at.descend([a + gamma * (a + b - 2 * c) + beta * (a - b) for a, b, c in rows])


def esam(at: Theirs, rho: float = 0.3, gamma: float = 1.0) -> None:
    """Of gamma B samples the one whose loss grew least is left out: only those above the cutoff stay."""
    g = at.gradient()
    e = [rho * x / norm(g) for x in g]
    kept: Any = slice(None)
    if gamma < 0.99:
        with torch.no_grad():
            before = at.losses(at.t)
            for p, x in zip(at.w, e, strict=True):
                p.add_(x)
            rise = at.losses(at.t) - before
            for p, x in zip(at.w, e, strict=True):
                p.sub_(x)
        kept = rise > rise.topk(int(BATCH * gamma)).values[-1]
    at.descend(at.gradient(e, kept=kept))


def sampa(at: Theirs, rho: float = 0.3, lambda_: float = 0.2, sgd: bool = True) -> None:
    """The gradient at the perturbed weights is on the batch of the step before."""
    y = at.kept.get("y", [torch.zeros_like(p) for p in at.w])
    lr = at.inner.param_groups[0]["lr"]
    ahead = y
    if sgd and at.t:
        buffers = [at.inner.state[p]["momentum_buffer"] for p in at.w]
        rows = zip(y, at.w, buffers, strict=True)
        ahead = [v + SGD["weight_decay"] * p.detach() + SGD["momentum"] * b for v, p, b in rows]
    s = at.gradient([rho * x / (norm(y) + 1e-12) for x in y], step=max(at.t - 1, 0))
    r = at.gradient([-lr * x for x in ahead])
    at.kept["y"] = r
    at.descend([(1 - lambda_) * a + lambda_ * b for a, b in zip(s, r, strict=True)])


def msam(at: Theirs, rho: float = 0.3) -> None:
    """The decay that is added to the gradient is that of the perturbed weights."""
    e = at.kept.get("e", [torch.zeros_like(p) for p in at.w])
    at.descend([x + SGD["weight_decay"] * y for x, y in zip(at.gradient(e), e, strict=True)])
    v = [at.inner.state[p]["momentum_buffer"] for p in at.w]
    at.kept["e"] = [-rho * x / (norm(v) + 1e-12) for x in v]


def msam_adamw(at: Theirs, rho: float = 0.3, decay: float = 0.0) -> None:
    """The decay comes after the step."""
    at.descend(at.gradient(at.kept.get("e")))
    with torch.no_grad():
        for p in at.w:
            p.mul_(1 - at.inner.param_groups[0]["lr"] * decay)
    v = [at.inner.state[p]["exp_avg"] for p in at.w]
    at.kept["e"] = [-rho * x / (norm(v) + 1e-12) for x in v]


def s2sam(at: Theirs, rho: float = 0.3) -> None:
    y = at.kept.get("y", [torch.zeros_like(p) for p in at.w])
    y = at.kept["y"] = at.gradient([rho * x / (norm(y) + 1e-12) for x in y])
    at.descend(y)


def plain(at: Theirs) -> None:
    at.descend(at.gradient())


class AlbertLAMB(torch.optim.Optimizer):
    """u = m / (sqrt(v) + eps) + wd w, without bias corrections; w -= lr (||w|| / ||u||) u."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * p.grad
                v = state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * p.grad.square()
                u = m / (v.sqrt() + 1e-6) + group["weight_decay"] * p
                p.sub_(group["lr"] * (p.norm() / u.norm() if p.norm() > 0 else 1.0) * u)


# Packages -------------------------------------------------------------------------------------------------------------


def of_package(package: str, name: str, *args: Any, **options: Any) -> Any:
    """An optimizer of a package, which is imported no earlier than this."""
    cls = from_timm(name) if package == "timm" else getattr(importlib.import_module(package), name)
    return cls(*args, **options)


def from_timm(name: str) -> Any:
    """From its file: the package around it imports torchvision, which these tests do without."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    package = types.ModuleType("timm_optim_alone")
    package.__path__ = [str(Path(folder) / "optim") for folder in spec.submodule_search_locations or ()]
    sys.modules.setdefault(package.__name__, package)
    return getattr(importlib.import_module(f"{package.__name__}.{name.lower()}"), name)


def two_passes(package: str, name: str, two_calls: bool = False, **options: Any) -> Tensors:
    """The weights after a package's sharpness-aware optimizer, over torch's SGD."""
    model = network()
    if name == "WSAM":
        options["model"] = model
    optimizer = of_package(
        package, name, params=model.parameters(), base_optimizer=torch.optim.SGD, **{**SGD, **options}
    )
    for step in range(STEPS):
        x, y = batch(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if two_calls:
            closure()
        optimizer.step(closure)
    return [p.detach() for p in model.parameters()]


# The rows -------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    method: str
    source: str
    year: int
    setting: str
    """What is given here, as in code."""
    theirs: Callable[[], Tensors]
    ours: Callable[[nn.Module], Any]
    """The optimizer on a network."""
    reason: str = ""
    """Why they differ; "" where they must not."""
    package: str | None = None
    """Without which there is nothing to compare with."""
    l2: float = 0.0
    """In the loss of ours: l2 / 2 ||w||^2."""


def restated(step: Step, rates: tuple[float, ...] = (0.1, 0.1), cls: Any = torch.optim.SGD, **options: Any) -> Any:
    def run() -> Tensors:
        at = Theirs(rates, cls, **(options or {"momentum": SGD["momentum"], "weight_decay": SGD["weight_decay"]}))
        for at.t in range(STEPS):
            step(at)
        return [p.detach() for p in at.w]

    return run


def over_sgd(cls: Any, rates: tuple[float, ...] = (0.1, 0.1), per_group: Any = ({}, {}), **options: Any) -> Any:
    def make(model: nn.Sequential) -> Any:
        parts = [{**group, **own} for group, own in zip(groups(model, rates), per_group, strict=True)]
        names = {p for name, p in model.named_parameters() if "weight" in name}
        given = {"rho": 0.3, **{k: v for k, v in SGD.items() if k != "lr"}, **options}
        if given.get("adaptive_filter") == "names":
            given["adaptive_filter"] = names.__contains__
        if given.get("perturb_filter") == "norms":
            given["perturb_filter"] = {*model[1].parameters()}.__contains__
        return cls(parts, "sgd", **given)

    return make


def alone(cls: Any, **options: Any) -> Any:
    return lambda model: cls(model.parameters(), **options)


EVERYWHERE = {"eta": 0.0, "adaptive_filter": lambda p: True}
FLOAT32 = "‖g‖ is a float32 number there"
LARS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}
LAMB = {"lr": 0.01, "weight_decay": 0.01}

ROWS = (
    Row("SAM", "davda54/sam", 2021, "", restated(sam), over_sgd(looksam.SAM)),
    Row(
        "SAM", "google-research/sam", 2021, "`weight_decay=0`, and λ/2 ‖w‖² in the loss",
        restated(partial(sam, l2=0.01), momentum=0.9), over_sgd(looksam.SAM, weight_decay=0.0), l2=0.01,
    ),
    Row(
        "SAM", "google-research/sam", 2021, "`weight_decay=λ`",
        restated(partial(sam, l2=0.01), momentum=0.9), over_sgd(looksam.SAM),
        "the decay is part of the loss there, and of the perturbation",
    ),
    Row(
        "SAM, adaptive", "davda54/sam", 2021, "`adaptive=True, eta=0.0, adaptive_filter=lambda p: True`",
        restated(partial(asam, t=lambda name, w: w.abs())),
        over_sgd(looksam.SAM, rho=0.5, adaptive=True, **EVERYWHERE),
    ),
    Row(
        "SAM, adaptive", "davda54/sam", 2021, "`adaptive=True`",
        restated(partial(asam, t=lambda name, w: w.abs())), over_sgd(looksam.SAM, rho=0.5, adaptive=True),
        "T = \\|w\\| on all tensors there",
    ),
    Row(
        "ASAM", "SamsungLabs/ASAM", 2021, "`adaptive_filter=named_weight.__contains__`",
        restated(partial(asam, t=named_weight)), over_sgd(looksam.ASAM, rho=0.5, adaptive_filter="names"),
    ),
    Row(
        "ASAM", "SamsungLabs/ASAM", 2021, "",
        restated(partial(asam, t=named_weight)), over_sgd(looksam.ASAM, rho=0.5),
        "the scale of a norm layer is named weight there, and has one dimension",
    ),
    Row(
        "Unified SAM", "Oikonomou & Loizou", 2025, "`SAM(normalization=λ)`",
        restated(unified), over_sgd(looksam.SAM, normalization=0.4),
    ),
    Row(
        "Gradient norm penalty", "zhaoyang-0204/gnp", 2022, "`SAM(strength=α)`",
        restated(norm_penalty), over_sgd(looksam.SAM, strength=0.8),
    ),
    Row("SSAM", "cltan023/stablesam2024", 2024, "", restated(ssam), over_sgd(looksam.SSAM)),
    Row(
        "GSAM", "juntang-zhuang/GSAM", 2022, "`rho_min`, `lr_max`",
        restated(gsam), over_sgd(looksam.GSAM, rho_min=0.1, lr_max=0.2),
    ),
    Row(
        "GSAM", "juntang-zhuang/GSAM", 2022, "two learning rates, `lr_max` per group in proportion to them",
        restated(gsam, (0.1, 0.02)),
        over_sgd(looksam.GSAM, (0.1, 0.02), ({"lr_max": 0.2}, {"lr_max": 0.04}), rho_min=0.1),
    ),
    Row(
        "GSAM", "juntang-zhuang/GSAM", 2022, "two learning rates, one `lr_max`",
        restated(gsam, (0.1, 0.02)), over_sgd(looksam.GSAM, (0.1, 0.02), rho_min=0.1, lr_max=0.2),
        "all radii follow the first group's learning rate there",
    ),
    Row("WSAM", "intelligent-machine-learning/atorch", 2023, "", restated(wsam), over_sgd(looksam.WSAM, gamma=0.6)),
    Row(
        "Friendly SAM", "nblt/F-SAM", 2024, "", restated(friendly), over_sgd(looksam.FriendlySAM, sigma=0.8, lambda_=0.7),
    ),
    Row(
        "Friendly SAM, adaptive", "nblt/F-SAM", 2024, "`adaptive=True, eta=0.0, adaptive_filter=lambda p: True`",
        restated(partial(friendly, adaptive=True)),
        over_sgd(looksam.FriendlySAM, sigma=0.8, lambda_=0.7, adaptive=True, **EVERYWHERE),
    ),
    Row(
        "VaSSO", "BingcongLi/VaSSO", 2023, "`perturb_eps=1e-7`",
        restated(vasso), over_sgd(looksam.VaSSO, theta=0.4, perturb_eps=1e-7),
    ),
    Row("CR-SAM", "TrustAIoT/CR-SAM", 2024, "", restated(crsam), over_sgd(looksam.CRSAM, gamma=0.2, beta=0.1)),
    Row("ESAM", "dydjw9/Efficient_SAM", 2022, "`beta=1, gamma=1`", restated(esam), over_sgd(looksam.ESAM, beta=1.0, gamma=1.0)),
    Row(
        "ESAM", "dydjw9/Efficient_SAM", 2022, "`beta=1, gamma=0.5 - 1/B`",
        restated(partial(esam, gamma=0.5)), over_sgd(looksam.ESAM, beta=1.0, gamma=0.5 - 1 / BATCH),
    ),
    Row(
        "ESAM", "dydjw9/Efficient_SAM", 2022, "`beta=1, gamma=0.5`",
        restated(partial(esam, gamma=0.5)), over_sgd(looksam.ESAM, beta=1.0, gamma=0.5),
        "one sample fewer is kept there. With β < 1 whole tensors are left out there, elements here",
    ),
    Row(
        "SAM-ON", "mueller-mp/SAM-ON", 2023, "`perturb_filter=norms.__contains__, perturb_eps=1e-16`",
        restated(sam_on), over_sgd(looksam.SAM, perturb_filter="norms", perturb_eps=1e-16),
    ),
    Row("SAMPa", "LIONS-EPFL/SAMPa", 2024, "`sgd_step=True`", restated(sampa), over_sgd(looksam.SAMPa, sgd_step=True)),
    Row(
        "SAMPa", "the paper's algorithm", 2024, "",
        restated(partial(sampa, sgd=False)), over_sgd(looksam.SAMPa),
    ),
    Row(
        "SAMPa", "LIONS-EPFL/SAMPa", 2024, "",
        restated(sampa), over_sgd(looksam.SAMPa), "w − lr y of the paper; weight decay and momentum are in it there",
    ),
    Row("MSAM", "MarlonBecker/MSAM, SGD", 2024, "", restated(msam), over_sgd(looksam.MSAM)),
    Row(
        "MSAM", "MarlonBecker/MSAM, AdamW", 2024, "`weight_decay=0`",
        restated(msam_adamw, (0.01, 0.01), torch.optim.AdamW, weight_decay=0.0),
        alone(looksam.MSAM, base_optimizer="adamw", lr=0.01, weight_decay=0.0),
    ),
    Row(
        "MSAM", "MarlonBecker/MSAM, AdamW", 2024, "",
        restated(partial(msam_adamw, decay=0.1), (0.01, 0.01), torch.optim.AdamW, weight_decay=0.0),
        alone(looksam.MSAM, base_optimizer="adamw", lr=0.01, weight_decay=0.1),
        "the decay comes after the step there, before it in torch's AdamW",
    ),
    Row("S2-SAM", "jjsrf/SSAM-NEURIPS2024", 2024, "", restated(s2sam), over_sgd(looksam.S2SAM)),
    Row(
        "SAM, adaptive", "pytorch_optimizer 4.1", 2026, "`adaptive=True, eta=0.0, adaptive_filter=lambda p: True`",
        partial(two_passes, "pytorch_optimizer", "SAM", True, rho=0.5, adaptive=True),
        over_sgd(looksam.SAM, rho=0.5, adaptive=True, **EVERYWHERE), FLOAT32, package="pytorch_optimizer",
    ),
    Row(
        "LookSAM", "pytorch_optimizer 4.1", 2026, '`k=3, norm_scope="tensor"`',
        partial(two_passes, "pytorch_optimizer", "LookSAM", True, rho=0.3, k=3),
        over_sgd(looksam.LookSAM, k=3, norm_scope="tensor"),
        FLOAT32 + ", and 10⁻⁸ is added to ‖q‖", package="pytorch_optimizer",
    ),
    Row(
        "LookSAM", "pytorch_optimizer 4.1", 2026, "`k=3`",
        partial(two_passes, "pytorch_optimizer", "LookSAM", True, rho=0.3, k=3),
        over_sgd(looksam.LookSAM, k=3), "projection and ratio are per tensor there", package="pytorch_optimizer",
    ),
    Row(
        "WSAM", "pytorch_optimizer 4.1", 2026, "",
        partial(two_passes, "pytorch_optimizer", "WSAM", rho=0.3, gamma=0.6),
        over_sgd(looksam.WSAM, gamma=0.6), FLOAT32, package="pytorch_optimizer",
    ),
    Row(
        "WSAM", "pytorch_optimizer 4.1", 2026, "`max_grad_norm=0.5`",
        partial(two_passes, "pytorch_optimizer", "WSAM", rho=0.3, gamma=0.6, max_norm=0.5),
        over_sgd(looksam.WSAM, gamma=0.6, max_grad_norm=0.5),
        "s is clipped there; here d = g is, and the decoupled term is not", package="pytorch_optimizer",
    ),
    Row(
        "LAMB", "timm 1.0", 2025, "",
        restated(plain, (0.01, 0.01), partial(of_package, "timm", "Lamb"), weight_decay=0.01),
        alone(looksam.LAMB, **LAMB), package="timm",
    ),
    Row(
        "LAMB", "google-research/albert", 2020, "`bias_correction=False, max_grad_norm=None`",
        restated(plain, (0.01, 0.01), AlbertLAMB, weight_decay=0.01),
        alone(looksam.LAMB, bias_correction=False, max_grad_norm=None, **LAMB),
    ),
    Row(
        "LAMB", "pytorch_optimizer 4.1", 2026, "`bias_correction=False`",
        restated(plain, (0.01, 0.01), partial(of_package, "pytorch_optimizer", "Lamb"), weight_decay=0.01),
        alone(looksam.LAMB, bias_correction=False, **LAMB),
        "the decay is AdamW's there, outside the ratio, and nothing is clipped by default", package="pytorch_optimizer",
    ),
    Row(
        "LARS", "timm 1.0", 2025, "",
        restated(plain, (0.5, 0.5), partial(of_package, "timm", "Lars"), momentum=0.9, weight_decay=0.01),
        alone(looksam.LARS, **LARS), package="timm",
    ),
    Row(
        "LARS", "pytorch_optimizer 4.1", 2026, "",
        restated(plain, (0.5, 0.5), partial(of_package, "pytorch_optimizer", "LARS"), momentum=0.9, weight_decay=0.01),
        alone(looksam.LARS, **LARS),
        "the decay is outside the ratio there, and tensors of one dimension take no part", package="pytorch_optimizer",
    ),
    Row(
        "Lion", "timm 1.0", 2025, "",
        restated(plain, (0.01, 0.01), partial(of_package, "timm", "Lion"), weight_decay=0.01),
        alone(looksam.Lion, lr=0.01, weight_decay=0.01), package="timm",
    ),
)  # fmt: skip


def there(row: Row) -> bool:
    return row.package is None or importlib.util.find_spec(row.package) is not None


def ours(row: Row) -> Tensors:
    model = network()
    optimizer = row.ours(model)
    last = None
    for step in range(STEPS):
        here = batch(step)

        def closure(kept: Tensor | None = None, previous: bool = False, here: Any = here, last: Any = last) -> Tensor:
            x, y = last if previous and last is not None else here
            if getattr(optimizer, "per_sample", False):
                x, y = (x, y) if kept is None else (x[kept], y[kept])
                return F.cross_entropy(model(x), y, reduction="none")
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss = loss + row.l2 / 2 * sum((p.square().sum() for p in model.parameters()), start=torch.zeros(()))
            loss.backward()
            return loss

        optimizer.step(closure)
        last = here
    if getattr(optimizer, "perturbed_at_rest", False):
        optimizer.eval()
    return [p.detach() for p in model.parameters()]


@cache
def difference(row: Row) -> float:
    """The largest of a weight after the steps, as a part of the largest weight."""
    a, b = ours(row), row.theirs()
    largest = max(float(x.abs().max()) for x in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / largest


def line(row: Row) -> str:
    found = difference(row)
    text = "0" if found <= ROUNDING else f"{found:.1e}"
    return f"| {row.method} | {row.source}, {row.year} | {row.setting or 'defaults'} | {text} | {row.reason} |"


def table() -> list[str]:
    return [line(row) for row in ROWS if there(row)]


BEGIN, END = "<!-- parity -->\n", "<!-- end of parity -->"
HEAD = ["| method | source | setting here | difference | reason |", "|---|---|---|---:|---|"]


def filled(text: str) -> str:
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n" + "\n".join([*HEAD, *table()]) + f"\n\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
