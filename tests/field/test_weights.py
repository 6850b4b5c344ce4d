"""Items 2, 10 and 11: weights that move, gradients that live elsewhere, parameters that do not train."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import looksam
from tests.field.reference import Reference
from tests.field.support import HYPER, MAIN, Pair, Side, data, network, on_backends, on_styles

FEW = (("looksam", "sgd"), ("looksam", "wrapped adamw"), ("sam", "adamw"), ("looklayersam", "lamb"), ("vasso", "sgd"))
on_few_pairs = pytest.mark.parametrize(("variant", "base"), FEW)

# Weights that get another storage -------------------------------------------------------------------------------------


class MaxNorm(nn.Linear):
    """Keeps the rows of its weight short, as people write it."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


class Clipped(nn.Linear):
    """Weight clipping."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clamp(-0.3, 0.3)
        return super().forward(x)


class ClippedInPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.3, 0.3)
        return super().forward(x)


class Moving(nn.Linear):
    """The same values at another place in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clone()
        self.bias.data = self.bias.data.clone()
        return super().forward(x)


class Transposing(nn.Linear):
    """The same values in another memory order in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.data
        self.weight.data = w.contiguous() if not w.is_contiguous() else w.mT.contiguous().mT
        return super().forward(x)


def layers(kind: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(5, 7), nn.Tanh(), kind(7, 3)).double()


def around(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: layers(lambda i, o: wrap(nn.Linear(i, o)))


def moving_in_a_backward_hook() -> nn.Module:
    model = layers(nn.Linear)
    for p in model.parameters():

        def move(_: Tensor, p: Tensor = p) -> None:
            p.data = p.data.clone()

        p.register_hook(move)
    return model


def moving_after_accumulation() -> nn.Module:
    model = layers(nn.Linear)
    for p in model.parameters():

        def move(p: Tensor) -> None:
            p.data = p.data.clone()

        p.register_post_accumulate_grad_hook(move)
    return model


def lazy() -> nn.Module:
    """Parameters that have no shape yet when the optimizer is made."""
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(7), nn.Tanh(), nn.LazyLinear(3)).double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "max norm": lambda: layers(MaxNorm),
    "clipped": lambda: layers(Clipped),
    "clipped in place": lambda: layers(ClippedInPlace),
    "moving": lambda: layers(Moving),
    "transposing": lambda: layers(Transposing),
    "backward hook": moving_in_a_backward_hook,
    "accumulation hook": moving_after_accumulation,
    "spectral norm": around(nn.utils.parametrizations.spectral_norm),
    "spectral norm, by hooks": around(nn.utils.spectral_norm),
    "weight norm": around(nn.utils.parametrizations.weight_norm),
    "orthogonal": around(nn.utils.parametrizations.orthogonal),
}


@on_backends
@on_styles
@on_few_pairs
def test_item_02_weights_moved_in_a_pass(backend: str, style: str, variant: str, base: str) -> None:
    for name, model in MODELS.items():
        torch.manual_seed(0)
        pair = Pair(variant, base, backend, style, model=model)
        torch.manual_seed(1)
        for side in pair:
            torch.manual_seed(1)
            for _ in range(4):
                side.step(style)
        try:
            pair.assert_equal()
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def clones(side: Side) -> None:
    for p in side.params:
        p.data = p.data.clone()


def one_clone(side: Side) -> None:
    side.params[2].data = side.params[2].data.clone()


def other_values(side: Side) -> None:
    """As swapping averaged weights in and out."""
    for p in side.params:
        p.data = 0.5 * p.data


def spoilt(side: Side) -> None:
    """The old storage is used for something else."""
    for p in side.params:
        old = p.data
        p.data = old.clone()
        old.fill_(100.0)


def into_one_flat_buffer(side: Side) -> None:
    flat = torch.zeros(1 + sum(p.numel() for p in side.params), dtype=torch.float64)
    at = 1
    for p in side.params:
        view = flat[at : at + p.numel()].view(p.shape)
        view.copy_(p.data)
        p.data, at = view, at + p.numel()


def set_in_place(side: Side) -> None:
    with torch.no_grad():
        for p in side.params:
            p.set_(p.detach().clone())  # type: ignore[call-overload]


def shared_memory(side: Side) -> None:
    side.model.share_memory()


def there_and_back(side: Side) -> None:
    side.model.float().double()


def in_another_memory_order(side: Side) -> None:
    for p in side.params:
        if p.ndim == 2:
            p.data = p.data.mT.contiguous().mT


MOVES: dict[str, Callable[[Side], None]] = {
    "clones": clones,
    "one clone": one_clone,
    "other values": other_values,
    "spoilt": spoilt,
    "flat": into_one_flat_buffer,
    "set_": set_in_place,
    "shared memory": shared_memory,
    "there and back": there_and_back,
    "memory order": in_another_memory_order,
}


@on_backends
@on_styles
@on_few_pairs
def test_item_02_weights_moved_around_a_pass(backend: str, style: str, variant: str, base: str) -> None:
    """Between steps, and between the passes of one, where the weights are the perturbed ones."""
    for name, move in MOVES.items():
        for at in (0, 1):
            if (at, name) in ((1, "other values"), (1, "there and back")):
                continue  # what is written there is gone when w is restored
            pair = Pair(variant, base, backend, style)
            pair.steps(2)
            pair.steps(1, {at: move})
            pair.steps(2)
            try:
                pair.assert_equal()
            except AssertionError as error:
                raise AssertionError(f"{name}, before pass {at}: {error}") from None


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
def test_item_02_weights_that_moved_come_back_from_a_pass_that_failed(backend: str, style: str, base: str) -> None:
    """To the bit, wherever they are now."""
    for name, move in MOVES.items():
        if name == "there and back":
            continue  # rounds what it moves
        pair = Pair("looksam", base, backend, style)
        pair.steps(2)
        before = [p.detach().clone() for p in pair.mine.params]

        def fail(side: Side, move: Callable[[Side], None] = move) -> None:
            move(side)
            raise OSError

        with pytest.raises(OSError):  # noqa: PT011
            pair.mine.step(style, {1: fail})
        if style == "two calls":
            pair.mine.optimizer.abandon()
        for a, b in zip(before, pair.mine.params, strict=True):
            assert torch.equal(a, b), name
        pair.steps(2)
        pair.assert_equal()


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
def test_item_02_lazy_parameters(backend: str, style: str, base: str) -> None:
    """torch's optimizers may be made before the parameters have their shapes."""
    pair = Pair("looksam", base, backend, style, model=lazy)
    for side in pair:
        torch.manual_seed(1)
        for _ in range(4):
            side.step(style)
    pair.assert_equal()


@on_backends
def test_item_02_the_loss_of_a_max_norm_net(backend: str) -> None:
    """SAM, rho .05, lr .1, momentum .9, 30 steps: the loss falls as the reference's does."""
    pair = Pair("sam", ("sgd", {"lr": 0.1, "momentum": 0.9}), backend, model=MODELS["max norm"], hyper={"rho": 0.05})
    pair.steps(30)
    pair.assert_equal()
    losses = [F.cross_entropy(side.model(side.x), side.y).item() for side in pair]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class Replacing(torch.optim.Optimizer):
    """An old-fashioned class: its step gives every parameter a new tensor."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad.data


@on_backends
@on_styles
@pytest.mark.parametrize("variant", ["sam", "looksam", "vasso"])
def test_item_02_a_wrapped_class_that_replaces_the_weights(backend: str, style: str, variant: str) -> None:
    pair = Pair(variant, (Replacing, {"lr": 0.1}), backend, style)
    pair.steps(5)
    pair.assert_equal()


@on_backends
@on_styles
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_item_02_masters_of_weights_that_move(backend: str, style: str, base: str, dtype: torch.dtype) -> None:
    """A low-precision parameter at another place: nothing is lost. With other values: the master follows, as it follows
    what is written in place."""

    def run(change: Callable[[Tensor], None]) -> list[Tensor]:
        model = network(dtype)
        options: dict[str, Any] = {"lr": 1e-3, "k": 2, "rho": 0.1}
        side = Side(model, looksam.LookSAM(model.parameters(), base, backend=backend, **options))
        for step in range(6):
            if step in (3, 4):
                with torch.no_grad():
                    for p in side.params:
                        change(p)
            side.step(style)
        masters = [side.entries(p)["master_param"] for p in side.params]
        for p, master in zip(side.params, masters, strict=True):
            assert torch.equal(p, master.to(dtype))
        return masters

    def move(p: Tensor) -> None:
        p.data = p.data.clone()

    def halve_and_move(p: Tensor) -> None:
        p.data = 0.5 * p.data

    def halve(p: Tensor) -> None:
        p.mul_(0.5)

    for a, b in zip(run(move), run(lambda p: None), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(run(halve_and_move), run(halve), strict=True):
        assert torch.equal(a, b)


# Gradients that live elsewhere ----------------------------------------------------------------------------------------


class Bucketed(Side):
    """After each backward some gradients are views of one buffer, which every backward overwrites."""

    which: tuple[int, ...] = ()

    def backward(self) -> Tensor:
        loss = super().backward()
        params = self.params
        if not hasattr(self, "buffer"):
            self.buffer = torch.zeros(sum(params[i].numel() for i in self.which) + 1, dtype=torch.float64)
        at = 0
        for i in self.which:
            p = params[i]
            assert p.grad is not None
            view = self.buffer[at : at + p.numel()].view(p.shape)
            view.copy_(p.grad)
            p.grad, at = view, at + p.numel()
        return loss


@on_backends
@on_styles
@on_few_pairs
@pytest.mark.parametrize("which", [(0,), (3,), (2,), (1, 2), (0, 1, 2, 3)])
def test_item_10_gradients_that_are_views(
    backend: str, style: str, variant: str, base: str, which: tuple[int, ...]
) -> None:
    pair = Pair(variant, base, backend, style)
    pair.mine.__class__, pair.mine.which = Bucketed, which  # type: ignore[assignment, attr-defined]
    pair.steps(5)
    pair.assert_equal()


class Calls(TorchDispatchMode):
    """Counts the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def test_gradients_that_are_views_are_copied_by_one_call() -> None:
    params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 1, 4)]
    buffer = torch.arange(9.0)
    for p, view in zip(params, buffer[:8].split([3, 1, 4]), strict=True):
        p.grad = view
    optimizer = looksam.SAM(params, "sgd", rho=0.1, lr=0.1, backend="reference")
    with Calls() as calls:
        optimizer.first_step()
    assert calls.count["aten._foreach_copy_"] == 1
    assert calls.count["aten.clone"] == 0
    buffer.zero_()
    moved = torch.cat([(p - 1).detach() for p in params])
    torch.testing.assert_close(moved, 0.1 * torch.arange(8.0) / torch.arange(8.0).norm())


@on_backends
@on_styles
@pytest.mark.parametrize("variant", ["sam", "looksam", "gsam", "vasso"])
@pytest.mark.parametrize("base", ["sgd", "wrapped sgd"])
def test_item_10_gradients_that_share_a_buffer_to_the_byte(backend: str, style: str, variant: str, base: str) -> None:
    """Every pass writes its gradients to the same tensors, which are no larger than they: right, or an error."""

    class Static(Side):
        def backward(self) -> Tensor:
            loss = super().backward()
            if not hasattr(self, "buffers"):
                self.buffers = [torch.zeros_like(p) for p in self.params]
            for p, x in zip(self.params, self.buffers, strict=True):
                x.copy_(p.grad)
                p.grad = x
            return loss

    pair = Pair(variant, base, backend, style)
    pair.mine.__class__ = Static
    if variant != "sam" and style == "closure":  # the first gradient is needed once more, and is gone
        before = [p.detach().clone() for p in pair.mine.params]
        with pytest.raises(RuntimeError, match=r"gradient of parameter 0 .* same memory"):
            pair.mine.step(style)
        for a, b in zip(before, pair.mine.params, strict=True):
            assert torch.equal(a, b)
        return
    pair.steps(4)
    pair.assert_equal()


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
def test_item_10_gradients_that_are_expanded(backend: str, style: str, base: str) -> None:
    """One number for all elements, with strides of 0."""

    class Expanded(Side):
        def backward(self) -> Tensor:
            loss = super().backward()
            for p in self.params[1:4]:
                assert p.grad is not None
                p.grad = p.grad.mean().expand(p.shape)
            return loss

    pair = Pair("looksam", base, backend, style)
    pair.mine.__class__ = pair.theirs.__class__ = Expanded
    pair.steps(4)
    pair.assert_equal()


# Parameters that do not train -----------------------------------------------------------------------------------------


def frozen_parameters() -> dict[str, Tensor]:
    made: dict[str, Callable[[], Tensor]] = {
        "uint8": lambda: torch.arange(12, dtype=torch.uint8).reshape(3, 4),
        "int8": lambda: torch.ones(5, dtype=torch.int8),
        "int32": lambda: torch.ones(5, dtype=torch.int32),
        "bool": lambda: torch.ones(2, 2, dtype=torch.bool),
        "float8_e4m3fn": lambda: torch.ones(4, 4).to(torch.float8_e4m3fn),
        "float8_e5m2": lambda: torch.ones(3).to(torch.float8_e5m2),
        "meta": lambda: torch.empty(3, 4, device="meta"),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
        "complex": lambda: torch.ones(3, dtype=torch.complex64),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8),
        "bfloat16": lambda: torch.ones(3, 3, dtype=torch.bfloat16),
        "float16": lambda: torch.ones(3, dtype=torch.float16),
        "float32": lambda: torch.ones(3, 3),
        "not dense": lambda: torch.ones(1).expand(3, 3),
        "empty": lambda: torch.empty(0, 3),
        "mkldnn": lambda: torch.ones(3, 3).to_mkldnn(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about sparse CSR and quantized tensors
        return {name: make() for name, make in made.items()}


FROZEN = frozen_parameters()


def with_frozen(names: Iterable[str]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = network()
        for i, name in enumerate(names):
            model.register_parameter(f"frozen{i}", nn.Parameter(frozen_parameters()[name], requires_grad=False))
        return model

    return make


@on_backends
@on_styles
@pytest.mark.parametrize(
    ("variant", "base"),
    [
        *(("looksam", base) for base in (*MAIN, "lars", "lion", "rmsprop")),
        *((variant, "sgd") for variant in ("sam", "asam", "layersam", "looklayersam", "vasso")),
    ],
)
def test_item_11_frozen_parameters_of_every_kind(backend: str, style: str, variant: str, base: str) -> None:
    """They stand first, in between and in a group of their own; the others move as if they were not there."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        frozen = [p for p in model.parameters() if not p.requires_grad]
        trained = [p for p in model.parameters() if p.requires_grad]
        return [
            {"params": [*frozen[:4], *trained[:3], *frozen[4:9], *trained[3:]]},
            {"params": frozen[9:], "lr": 0.5},
        ]

    pair = Pair(variant, base, backend, style)
    other = Pair(variant, base, backend, style, model=with_frozen(FROZEN), groups=groups)
    for side in (pair.theirs, other.mine):
        for _ in range(3):
            side.step(style)
    saved = other.mine.optimizer.state_dict()
    other.mine.optimizer.load_state_dict(saved)
    for side in (pair.theirs, other.mine):
        for _ in range(2):
            side.step(style)
    trained = [p for p in other.mine.params if p.requires_grad]
    for a, b in zip(trained, pair.theirs.params, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-9)
    assert all(not other.mine.dicts(p) for p in other.mine.params if not p.requires_grad)


@on_backends
@pytest.mark.parametrize("base", MAIN)
@pytest.mark.parametrize("kind", FROZEN)
def test_item_11_frozen_parameters_come_later(backend: str, base: str, kind: str) -> None:
    """By add_param_group."""
    pair = Pair("looksam", base, backend)
    pair.steps(2)
    pair.mine.optimizer.add_param_group({"params": [nn.Parameter(frozen_parameters()[kind], requires_grad=False)]})
    pair.steps(3)
    pair.assert_equal()


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
@pytest.mark.parametrize("variant", ["sam", "looksam", "layersam"])
def test_item_11_frozen_for_a_while(backend: str, style: str, base: str, variant: str) -> None:
    """Frozen after a few steps and trained again later: its state waits."""
    pair = Pair(variant, base, backend, style)
    pair.steps(2)
    pair.both(lambda side: [p.requires_grad_(False) for p in side.params[1:3]])
    pair.steps(3)
    pair.both(lambda side: [p.requires_grad_(True) for p in side.params[1:3]])
    pair.steps(3)
    pair.assert_equal()


@on_backends
@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_item_11_one_that_trains_is_refused(backend: str, kind: str) -> None:
    """Complex and sparse parameters with a gradient: an error, and not a wrong number."""
    model = network()
    odd = nn.Parameter(frozen_parameters()[kind])
    with pytest.raises((TypeError, RuntimeError, ValueError), match=r"parameter|gradient"):  # noqa: PT012
        optimizer = looksam.SAM([*model.parameters(), odd], "sgd", lr=0.1, backend=backend)

        def closure() -> Tensor:
            optimizer.zero_grad()
            x, y = data()
            loss = F.cross_entropy(model(x), y) + (odd.to_dense() if kind == "sparse" else odd).abs().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def test_item_11_the_reference_takes_them_too() -> None:
    """torch's own optimizers do; what is asked of ours is no more."""
    model = with_frozen(FROZEN)()
    reference = Reference(torch.optim.AdamW([*model.parameters()], lr=1e-2), "looksam", **HYPER["looksam"])
    side = Side(model, reference)
    for _ in range(3):
        side.step("closure")
