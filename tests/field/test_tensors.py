"""Tensors without memory, devices without float64, numbers whose squares are too large for float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import looksam
from looksam_kernels import numbers
from tests.contract.support import (
    BASES,
    VARIANTS,
    WRAPPED,
    Closure,
    build,
    network,
    on_backends,
    on_products,
    states,
    train,
    weights,
    works,
)

AUTOMATIC = sorted(set(VARIANTS) - {"aesam", "aelooksam"})
"""AE-SAM reads a number to choose."""


def fresh() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize(
    ("variant", "base"), [(v, b) for v in AUTOMATIC for b in BASES if b not in WRAPPED and works(v, b)]
)
def test_field_12_a_fake_optimizer_steps(variant: str, base: str) -> None:
    """For estimates of memory: the state is there, and as large as the real one."""
    real = network()
    optimizer = build(real.parameters(), variant, base, backend="reference")
    train(real, optimizer, 3)
    with FakeTensorMode():
        model = fresh()
        fake = build(model.parameters(), variant, base)
        x, y = torch.randn(16, 5), torch.randint(3, (16,))

        def closure(kept: Tensor | None = None) -> Tensor:
            fake.zero_grad()
            if fake.per_sample:
                return F.cross_entropy(model(x), y, reduction="none")
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            if variant == "esam":
                fake.param_groups[0]["gamma"] = 1.0
            loss = fake.step(closure)
    assert isinstance(loss, FakeTensor)
    assert fake.backend == "reference"
    for a, b in zip(states(optimizer), [fake.state[p] for p in model.parameters()], strict=True):
        assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}


def test_field_12_a_compiled_backend_that_is_asked_for_is_an_error() -> None:
    with FakeTensorMode():
        model = fresh()
        optimizer = build(model.parameters(), backend="native")
        model(torch.randn(2, 5)).sum().backward()
        with pytest.raises(RuntimeError, match=r"'native' cannot run on parameters without memory.*'reference' can"):
            optimizer.first_step()


def sam_step(w: Tensor, g: Tensor) -> Tensor:
    optimizer = looksam.SAM([w], "sgd", lr=0.1, rho=0.5)
    w.grad = g
    optimizer.first_step(zero_grad=True)
    w.grad = 2 * g
    optimizer.second_step(zero_grad=True)
    return w


def by_torch(w: Tensor, g: Tensor) -> Tensor:
    optimizer = torch.optim.SGD([w], lr=0.1)
    w.grad = 2 * g
    optimizer.step()
    return w


@pytest.mark.parametrize("transform", ["functionalize", "make_fx", "grad"])
def test_field_12_transforms_of_functorch(transform: str) -> None:
    """The step is recorded or transformed as torch's is: held against SGD, which SAM's last gradient goes to."""

    def through(step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        def f(w: Tensor, g: Tensor) -> Tensor:
            return step(w.clone(), g)

        w, g = torch.arange(1.0, 4.0), torch.tensor([0.5, -1.0, 2.0])
        if transform == "functionalize":
            return torch.func.functionalize(f)(w, g)
        if transform == "make_fx":
            recorded = make_fx(f)(torch.ones(3), torch.ones(3))
            return recorded(w, g)
        return torch.func.grad(lambda w, g: f(w.detach() * 1, g).sum() + w.square().sum())(w, g)

    torch.testing.assert_close(through(sam_step), through(by_torch))


def test_field_12_a_tensor_around_others() -> None:
    a = torch.arange(1.0, 4.0)
    p, plain = nn.Parameter(TwoTensor(a, a.clone())), nn.Parameter(a.clone())
    for parameter in (p, plain):
        optimizer = looksam.LookSAM(
            [parameter], "adamw", lr=0.1, k=2, backend="reference" if parameter is plain else None
        )
        for _ in range(4):

            def closure(parameter: Tensor = parameter, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = parameter.pow(2).sum()
                loss.backward()
                return loss

            optimizer.step(closure)
    assert torch.equal(p.a, plain)
    assert torch.equal(p.b, plain)


class Named(torch.Tensor):
    """A subclass with memory of its own."""


@on_backends
def test_field_12_a_subclass_with_memory_is_an_ordinary_tensor(backend: str) -> None:
    p, plain = nn.Parameter(torch.ones(3).as_subclass(Named)), nn.Parameter(torch.ones(3))
    for parameter in (p, plain):
        sam_step(parameter.data, torch.arange(3.0))
    assert type(p.data) is Named
    assert torch.equal(p.data.as_subclass(Tensor), plain.data)


@on_backends
def test_field_12_inference_mode_and_flop_counters(backend: str) -> None:
    model, plain = network(), network()
    optimizer, other = (build(m.parameters(), backend=backend) for m in (model, plain))
    with FlopCounterMode(display=False) as counter:
        train(model, optimizer, 2)
    assert counter.get_total_flops() > 0
    train(plain, other, 2)
    assert all(torch.equal(x, y) for x, y in zip(weights(plain), weights(model), strict=True))
    Closure(model, optimizer)()
    with torch.inference_mode():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.first_step(zero_grad=True)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.second_step(zero_grad=True)
    train(model, optimizer, 2)


# Precision ----------------------------------------------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """As MPS: an operation that would make a float64 tensor raises."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {function}")
        return result


@on_products
def test_field_16_the_reference_needs_no_float64(variant: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, exact = network(), network()
    train(exact, build(exact.parameters(), variant, base, backend="reference", max_grad_norm=1.0), 4)
    monkeypatch.setattr(numbers, "WITHOUT_FLOAT64", ("cpu",))
    optimizer = build(model.parameters(), variant, base, backend="reference", max_grad_norm=1.0)
    with NoFloat64():
        train(model, optimizer, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 2)
    for a, b in zip(weights(exact), weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_field_16_the_stub_refuses() -> None:
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()


def test_field_16_a_state_of_another_device_is_loaded_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """q's norm is float64 where that exists."""
    model = network()
    optimizer = build(model.parameters(), backend="reference")
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    monkeypatch.setattr(numbers, "WITHOUT_FLOAT64", ("cpu",))
    second = build(model.parameters(), backend="reference")
    with NoFloat64():
        second.load_state_dict(saved)
        train(model, second, 2)
    assert second.state[model[0].weight]["q_norm_sq"].dtype == torch.float32


@on_backends
@pytest.mark.parametrize("size", [1e20, 3e30])
@pytest.mark.parametrize("variant", ["sam", "looksam", "asam", "layersam", "gsam", "vasso"])
def test_field_16_squares_beyond_float32(backend: str, size: float, variant: str) -> None:
    """Against the same gradients with a factor that only moves exponents, and a learning rate that takes it out."""
    factor = 2.0 ** round(torch.tensor(size).log2().item())
    results = []
    for scale in (1.0, factor):
        p = nn.Parameter(torch.arange(1.0, 7.0).reshape(2, 3))
        kwargs = {"k": 2} if variant == "looksam" else {}
        optimizer = VARIANTS[variant]([p], "sgd", lr=0.125 / scale, rho=0.5, backend=backend, **kwargs)
        for _ in range(3):

            def closure(p: Tensor = p, scale: float = scale, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                p.grad = scale * torch.tanh(p.detach() - 2)
                return p.detach().sum()

            optimizer.step(closure)
        assert optimizer.skipped_steps == 0
        results.append(p.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)
