"""No tensor that Python can make sends C++ to memory that is not there: it is an error, or the value is right.

Each of these followed a null or foreign address before; a GPU's addresses are stood for by the meta device, which has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from looksam_kernels import TensorTable, backend_info, ops
from looksam_kernels.formulas import Coefficients, Sums

pytestmark = pytest.mark.skipif(
    not backend_info("cpu")["native"].available, reason=f"no native backend: {backend_info('cpu')['native'].reason}"
)

GROUP = {"rho": 0.05, "perturb_eps": 1e-12, "alpha": 0.7, "norm_scope": "global"}
ADAM = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64, **kwargs)


def make(**columns: Any) -> TensorTable:
    usual = {name: [torch.ones(5)] for name in ("w", "b", "g", "s", "exp_avg", "exp_avg_sq", "q")}
    usual |= {"step": [torch.zeros(())], "q_norm_sq": [torch.tensor(5.0, dtype=torch.float64)]}
    return TensorTable(backend="native", **(usual | columns))


def direction(found_inf: Tensor | None = None, **changes: Any) -> Coefficients:
    inf = torch.zeros(()) if found_inf is None else found_inf
    return Coefficients(("s", "g"), zeros(2, 1), zeros(2, 1), inf)._replace(**changes)


def fake(x: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(x)


def freed(x: Tensor) -> Tensor:
    """As FSDP leaves parameters that it has gathered."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


class Wrapper(Tensor):
    """A subclass that has no memory, only a device."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(function)


WITHOUT_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {"fake": fake, "freed": freed, "wrapper": Wrapper}
without_memory = pytest.mark.parametrize("made", WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)


@without_memory
@pytest.mark.parametrize("column", ["w", "b", "g", "s", "exp_avg", "q", "step", "q_norm_sq"])
def test_a_column_without_memory_is_an_error_that_names_it(column: str, made: Callable[[Tensor], Tensor]) -> None:
    table = make()
    table[column] = [made(table[column][0])]
    table.perturbed = [True]
    with pytest.raises(TypeError, match=f"'{column}', row 0.*no memory on cpu.*reference"):
        ops.step(table, "adam", direction(), [ADAM])


@without_memory
def test_sums_and_perturb_of_a_gradient_without_memory_are_errors(made: Callable[[Tensor], Tensor]) -> None:
    table = make(g=[made(torch.ones(5))])
    with pytest.raises(TypeError, match=r"'g', row 0.*no memory"):
        ops.sums(table, [("g", "g")])
    with pytest.raises(TypeError, match=r"'g', row 0.*no memory"):
        ops.perturb(table, Coefficients(("g",), zeros(1, 1), None, torch.zeros(())))


@without_memory
@pytest.mark.parametrize("name", ["d", "q", "post", "found_inf"])
def test_coefficients_without_memory_are_errors(name: str, made: Callable[[Tensor], Tensor]) -> None:
    x = made(torch.zeros(()) if name == "found_inf" else zeros(2, 1))
    with pytest.raises(TypeError, match=f"{name}.*no memory"):
        ops.step(make(), "adam", direction(**{name: x}), [ADAM])


@pytest.mark.parametrize("name", ["d", "q", "post", "found_inf"])
def test_coefficients_on_a_device_are_errors_for_a_table_on_the_cpu(name: str) -> None:
    x = torch.zeros((), device="meta") if name == "found_inf" else zeros(2, 1, device="meta")
    with pytest.raises(TypeError, match=f"{name} is on meta, but the table is on the CPU"):
        ops.step(make(), "adam", direction(**{name: x}), [ADAM])


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
def test_what_a_scaler_hands_over_on_a_device_is_an_error_for_a_table_on_the_cpu(name: str, rows: int) -> None:
    """Without rows it was a segmentation fault: such a table used to be on the CPU wherever its optimizer was."""
    table = make() if rows else TensorTable([], backend="native")
    found = Sums((("g", "g"),), zeros(1, rows))
    with pytest.raises(TypeError, match=f"{name} is on meta, but the table is on the CPU"):
        ops.coefficients(table, "sam", found, [GROUP], **{name: torch.ones((), device="meta")})


def test_sums_of_another_table_are_an_error() -> None:
    two = TensorTable([torch.ones(2), torch.ones(2)], backend="native")
    with pytest.raises(ValueError, match=r"sums\.values has 1 numbers, not the 2"):
        ops.coefficients(two, "sam", Sums((("g", "g"),), zeros(1, 1)), [GROUP])
    with pytest.raises(ValueError, match=r"known\.values has 3 numbers"):
        ops.measure(make(), "looksam_refresh", [GROUP], known=Sums((("g", "g"),), zeros(1, 3)))


def test_a_row_in_a_group_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 0 is in group 1, but there are only 1"):
        ops.step(make(group=[1]), "adam", direction(), [ADAM])
    with pytest.raises(ValueError, match="row 0 is in group 1"):
        ops.measure(make(group=[1]), "sam", [GROUP])
    with pytest.raises(ValueError, match="row 0 is in group -1"):
        ops.measure(make(group=[-1]), "sam", [GROUP])


def test_a_hyper_parameter_on_a_device_is_an_error_that_names_it() -> None:
    for name in ("lr", "eps"):
        with pytest.raises(TypeError, match=f"{name} is a tensor on meta"):
            ops.step(make(), "adam", direction(), [{**ADAM, name: torch.ones((), device="meta")}])


def test_nothing_is_read_while_fake_tensors_are_made() -> None:
    table = make()
    with FakeTensorMode(), pytest.raises((TypeError, AssertionError)):
        ops.measure(table, "sam", [GROUP])


def test_tensors_of_a_functorch_transform_are_errors() -> None:
    def squares(x: Tensor) -> Tensor:
        return ops.sums(make(g=[x]), [("g", "g")]).values

    with pytest.raises(TypeError, match=r"'g', row 0.*no memory"):
        torch.func.vmap(squares)(torch.ones(3, 5))


def test_a_minus_sign_that_has_still_to_be_applied_counts() -> None:
    """The imaginary part of a conjugate is a view of memory that holds the other sign."""
    g = torch.complex(torch.ones(5), torch.arange(5.0)).conj().imag
    assert g.is_neg()
    table = make(g=[g])
    assert ops.sums(table, [("g", "w")]).values.item() == -10
    ops.step(table, "grad", Coefficients(("g",), zeros(1, 1) + 2, None, torch.zeros(())), [{}])
    assert torch.equal(g, torch.arange(5.0) * -2)


def test_zeros_that_are_nowhere_are_zeros() -> None:
    table = make(g=[torch._efficientzerotensor((5,))])
    assert ops.sums(table, [("g", "w")]).values.item() == 0


def test_a_tensor_that_shares_its_elements_until_it_is_written_gets_its_own() -> None:
    w = torch.arange(5.0)
    clone = torch._lazy_clone(w)
    ops.step(make(w=[clone]), "adam", direction(d=zeros(2, 1) + 1), [ADAM])
    assert torch.equal(w, torch.arange(5.0))
    assert not torch.equal(clone, w)
