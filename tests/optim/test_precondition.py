"""``precondition=True``: the perturbation is scaled as the base's update is. The formulas: test_against_formulas.py."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looksam
from looksam_kernels import Mask
from looksam_kernels.preconditioning import with_second_moment
from tests.contract.support import (
    VARIANTS,
    Closure,
    assert_goes_on_from_a_checkpoint,
    assert_same,
    build,
    network,
    train,
    weights,
)
from tests.field.test_scaler import scaled_steps
from tests.optim.cases import BACKENDS, QUICK

pytestmark = pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")
on_backends = pytest.mark.parametrize("backend", QUICK)
TAKING = ["sam", "looksam", "ssam", "gsam", "wsam", "friendlysam", "esam"]
RHO = 0.1
ON: dict[str, Any] = {"precondition": True, "rho": RHO}


def perturbation(model: nn.Module, optimizer: Any) -> Tensor:
    """e of the step that comes, which is then abandoned."""
    Closure(model, optimizer)()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert optimizer.first_step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer.abandon()
    return after - before


@pytest.mark.parametrize(
    ("backend", "base"),
    [(x, base) for x in BACKENDS for base in with_second_moment() if x in QUICK or base in ("lamb", "adagrad")],
)
def test_the_perturbation_is_rho_long_and_along_the_preconditioned_gradient(backend: str, base: str) -> None:
    """Against the base itself: with one group, without decay and momentum, its step along d = g is along T g."""
    options: dict[str, Any] = {"k": 1, "lr": 1e-3, "weight_decay": 0.0}
    if base in ("adam", "adamw", "lamb"):
        options |= {"betas": (0.0, 0.99)}
    if base == "lamb":
        options |= {"max_grad_norm": None, "trust_clip": False, "always_adapt": False}
    model = network(dtype=torch.float64)
    optimizer = build(model.parameters(), "sam", base, backend=backend, **ON, **options)
    train(model, optimizer, 2)
    e = perturbation(model, optimizer)
    assert e.norm().item() == pytest.approx(RHO, rel=1e-6)
    if base in ("adam", "adamw", "lamb"):
        alone = copy.deepcopy(model)
        plain = build(alone.parameters(), "sam", base, backend=backend, **{**options, "rho": 0.0})
        state = optimizer.state_dict()["state"]
        plain.load_state_dict({**plain.state_dict(), "state": state})
        before = torch.cat([p.detach().flatten() for p in alone.parameters()])
        train(alone, plain, 1)
        step = before - torch.cat([p.detach().flatten() for p in alone.parameters()])
        torch.testing.assert_close(e / e.norm(), step / step.norm(), rtol=0, atol=1e-6)


@on_backends
def test_the_first_perturbation_is_along_the_signs_of_the_gradient(backend: str) -> None:
    """v = g^2 where no step has been made, so T g = g / (|g| + eps)."""
    model = network(dtype=torch.float64)
    optimizer = build(model.parameters(), "sam", "adamw", backend=backend, **ON)
    e = perturbation(model, optimizer)
    Closure(model, optimizer)()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(e, RHO * g.sign() / len(g) ** 0.5, rtol=1e-3, atol=0)


@on_backends
@pytest.mark.parametrize("variant", TAKING)
def test_it_changes_what_the_variant_does_and_the_run_learns(backend: str, variant: str) -> None:
    ends, losses = [], []
    for precondition in (True, False):
        model = network()
        optimizer = build(model.parameters(), variant, "adamw", backend=backend, rho=RHO, precondition=precondition)
        losses = train(model, optimizer, 6)
        assert losses[-1] < losses[0]
        ends.append(torch.cat([p.flatten() for p in weights(model)]))
    assert not torch.equal(*ends)


def test_which_variants_take_it() -> None:
    for variant in VARIANTS:
        if variant in TAKING:
            build(network().parameters(), variant, "adamw", **ON)
        elif variant == "asam":
            with pytest.raises(
                ValueError, match="precondition must be True or False, and False where adaptive is True"
            ):
                build(network().parameters(), variant, "adamw", **ON)
        else:
            with pytest.raises(TypeError, match="no argument 'precondition'"):
                build(network().parameters(), variant, "adamw", **ON)


class OwnAdam(torch.optim.Adam):
    """Wrapped."""


def test_what_cannot_be_is_refused() -> None:
    params = [nn.Parameter(torch.ones(2))]
    remedy = "give base_optimizer one of 'adam', 'adamw', .*, or leave precondition out"
    for base in ("sgd", "lars", "lion"):
        with pytest.raises(
            ValueError, match=f"SAM: precondition=True needs the base's .* and {base} has none; {remedy}"
        ):
            looksam.SAM(params, base, lr=0.1, precondition=True)
    for base, options in ((OwnAdam, {}), (torch.optim.Adam, {"amsgrad": True})):
        with pytest.raises(ValueError, match=f"none of {base.__name__}, which is wrapped, is known; {remedy}"):
            looksam.LookSAM(params, base, precondition=True, **options)
    with pytest.raises(TypeError, match="precondition must be a flag"):
        looksam.SAM(params, "adam", precondition=1)
    with pytest.raises(ValueError, match="and False where adaptive is True, not True"):
        looksam.SAM(params, "adam", precondition=True, adaptive=True)
    with pytest.raises(ValueError, match="precondition must be the same in all groups"):
        looksam.SAM([{"params": params}, {"params": [], "precondition": True}], "adam")


@on_backends
def test_it_can_be_switched_on_and_off_in_the_groups(backend: str) -> None:
    model, other = network(), network()
    optimizer = build(model.parameters(), "sam", "adam", k=1, backend=backend, rho=RHO)
    throughout = build(other.parameters(), "sam", "adam", k=1, backend=backend, **ON)
    before = perturbation(model, optimizer)
    optimizer.param_groups[0]["precondition"] = True
    assert not torch.equal(before, perturbation(model, optimizer))
    train(model, optimizer, 3)
    train(other, throughout, 3)
    assert_same(weights(model), weights(other))
    over_sgd = build(model.parameters(), "sam", backend=backend)
    over_sgd.param_groups[0]["precondition"] = True
    for _ in range(2):
        with pytest.raises(ValueError, match="sgd has none"):
            train(model, over_sgd, 1)


@on_backends
@pytest.mark.parametrize("variant", ["looksam", "friendlysam"])
def test_a_run_continues_from_a_checkpoint_bit_for_bit(backend: str, variant: str) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, "adamw", backend=backend, **ON)
    train(model, optimizer, 3)
    other = network(1)
    second = build(other.parameters(), variant, "adamw", backend=backend)
    assert_goes_on_from_a_checkpoint((model, optimizer), (other, second), train, 3)
    assert second.param_groups[0]["precondition"] is True


def test_older_checkpoints_lack_it_and_those_of_other_variants_do_not_bring_it() -> None:
    model = network()
    saved: dict[str, Any] = build(model.parameters(), "sam", "adam", **ON).state_dict()
    layerwise = build(model.parameters(), "layersam", "adam")
    with pytest.warns(UserWarning, match="of another variant than LayerSAM"):
        layerwise.load_state_dict(copy.deepcopy(saved))
    assert "precondition" not in layerwise.param_groups[0]
    for group in saved["param_groups"]:
        del group["precondition"]
    second = build(model.parameters(), "sam", "adam", **ON)
    second.load_state_dict(saved)
    assert second.param_groups[0]["precondition"] is True


@on_backends
@pytest.mark.parametrize("base", ["adamw", "adagrad"])
def test_a_loss_scale_makes_no_difference(backend: str, base: str) -> None:
    """Powers of two only move exponents."""
    plain, model = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scaled_steps(model, build(model.parameters(), "sam", base, k=1, backend=backend, **ON), scaler, 5)
    unscaled = build(plain.parameters(), "sam", base, k=1, backend=backend, **ON)
    scaled_steps(plain, unscaled, torch.amp.GradScaler("cpu", enabled=False), 5)
    for a, b in zip(weights(plain), weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@on_backends
def test_bfloat16_weights_with_masters(backend: str) -> None:
    """The factor is made of the float32 state and the gradient as it is; the move is rounded once."""
    model = network(dtype=torch.bfloat16)
    optimizer = build(model.parameters(), "sam", "adamw", k=1, backend=backend, **{**ON, "rho": 1.0})
    losses = train(model, optimizer, 4)
    assert losses[-1] < losses[0]
    masters = torch.cat([optimizer.state[p]["master_param"].flatten() for p in model.parameters()])
    Closure(model, optimizer)()
    assert optimizer.first_step()
    moved = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    assert (moved - masters).norm().item() == pytest.approx(1.0, rel=2.0**-7)


@on_backends
def test_bfloat16_weights_without_masters(backend: str) -> None:
    """Rounded at random: most elements have the bits of the reference after a step."""
    ends = []
    for name in (backend, "reference"):
        model = network(dtype=torch.bfloat16)
        optimizer = build(
            model.parameters(), "sam", "adamw", k=1, backend=name, rounding="stochastic", **{**ON, "rho": 1.0}
        )
        train(model, optimizer, 2)
        e = perturbation(model, optimizer)
        assert e.float().norm().item() == pytest.approx(1.0, rel=2.0**-4)
        ends.append(torch.cat([w.flatten() for w in weights(model)]))
    assert (ends[0] != ends[1]).double().mean() < 0.03


@on_backends
def test_a_perturb_filter_leaves_the_others_where_they_are(backend: str) -> None:
    model = network()
    optimizer = build(model.parameters(), "sam", "adam", backend=backend, perturb_filter=lambda p: p.ndim == 2, **ON)
    train(model, optimizer, 2)
    before = weights(model)
    perturbed = perturbation(model, optimizer)
    moved = torch.split(perturbed, [w.numel() for w in before])
    assert [bool(x.any()) for x in moved] == [w.ndim == 2 for w in before]
    assert perturbed.norm().item() == pytest.approx(RHO, rel=1e-5)


@on_backends
def test_esam_masks_the_preconditioned_perturbation(backend: str) -> None:
    """e = (rho / beta) m T g / ||T g||: what the mask keeps is SAM's, divided by beta."""
    ends = []
    for variant, options in (("sam", {}), ("esam", {"beta": 0.7, "seed": 4})):
        model = network()
        optimizer = build(model.parameters(), variant, "adamw", k=1, backend=backend, **ON, **options)
        before, seen = weights(model), []
        closure = Closure(model, optimizer, before=lambda call, m=model, s=seen: s.append(weights(m)))
        optimizer.step(closure)
        ends.append([a - b for a, b in zip(seen[1], before, strict=True)])
    mask = Mask(0.7, 4, 0)
    for row, (e, masked) in enumerate(zip(*ends, strict=True)):
        expected = torch.where(mask.row(row, e), e / 0.7, 0.0)
        torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-6)


def test_a_row_that_joins_late_has_its_own_count() -> None:
    """Its v is corrected for one update, not for all that others had: T g has the size 1 there as everywhere."""
    old, new = (nn.Parameter(torch.full((50,), 3.0)) for _ in range(2))
    optimizer = looksam.SAM([old, new], "adam", rho=RHO, lr=1e-4, precondition=True)

    def closure(params: list[nn.Parameter]) -> Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(lambda: closure([old]))
    optimizer.zero_grad()
    closure([old, new])
    before = old.detach().clone(), new.detach().clone()
    optimizer.first_step()
    lengths = [(p.detach() - b).norm().item() for p, b in zip((old, new), before, strict=True)]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-2)
