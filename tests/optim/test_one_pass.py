"""MSAM and S2-SAM: the weights rest perturbed. (What a step does is checked in test_against_formulas.py.)"""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import looksam
from tests.contract.support import AT_REST, Closure, assert_same, build, network, states, train, weights
from tests.optim.cases import QUICK

on_backends = pytest.mark.parametrize("backend", QUICK)
on_variants = pytest.mark.parametrize("variant", AT_REST)
on_bases = pytest.mark.parametrize("base", ["sgd", "adamw"])


def trained(variant: str, backend: str, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = network(dtype=dtype)
    options = {"base": "adamw", **options}
    optimizer = build(model.parameters(), variant, backend=backend, **options)
    train(model, optimizer, steps)
    return model, optimizer


def distance(a: list, b: list) -> float:
    return float(sum((x.double() - y.double()).square().sum() for x, y in zip(a, b, strict=True)).sqrt())


@on_backends
@on_variants
def test_the_weights_rest_at_the_radius(backend, variant):
    model, optimizer = trained(variant, backend, rho=0.25, dtype=torch.float64)
    rest = weights(model)
    optimizer.eval()
    assert distance(rest, weights(model)) == pytest.approx(0.25, rel=1e-9)


@on_backends
@on_variants
@on_bases
def test_looking_at_the_plain_weights_changes_nothing_in_the_training(backend, variant, base):
    model, optimizer = trained(variant, backend, 6, base=base)
    other = network()
    second = build(other.parameters(), variant, base, backend=backend)
    for _ in range(6):
        train(other, second, 1)
        with second.plain_weights() as inside:
            assert inside is second
            plain = weights(other)
            second.eval()  # again: nothing happens
            with second.plain_weights():
                assert_same(plain, weights(other))
            assert not second.param_groups[0]["train_mode"], "the inner context leaves the mode of the outer one"
        second.train()
    assert_same(weights(model), weights(other))
    assert_same(states(optimizer), states(second))
    assert distance(plain, weights(other)) > 0.05


@on_backends
@on_variants
def test_a_step_in_eval_mode_is_an_error_before_the_closure_is_called(backend, variant):
    model, optimizer = trained(variant, backend)
    optimizer.eval()
    before, state = weights(model), states(optimizer)
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        optimizer.step(lambda: pytest.fail("called"))
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        optimizer.step()
    assert_same(before, weights(model))
    assert_same(state, states(optimizer))
    optimizer.train(False)
    optimizer.train()
    train(model, optimizer, 1)


@on_backends
@on_variants
@on_bases
@pytest.mark.parametrize("saved_in_eval_mode", [False, True])
def test_a_run_continues_from_a_checkpoint_of_either_mode(backend, variant, base, saved_in_eval_mode):
    """Bit for bit from one of train mode; from plain weights up to the rounding of the perturbation."""
    model, optimizer = trained(variant, backend, base=base)
    if saved_in_eval_mode:
        optimizer.eval()
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    saved_model, saved = torch.load(buffer, weights_only=True)
    other = network(1)
    other.load_state_dict(saved_model)
    second = build(other.parameters(), variant, base, backend=backend)
    second.load_state_dict(saved)
    assert second.param_groups[0]["train_mode"] != saved_in_eval_mode
    for x in (optimizer, second):
        x.train()
    ulp = 2.0**-22 if saved_in_eval_mode else 0.0
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=ulp, atol=ulp)
    if not saved_in_eval_mode:
        train(model, optimizer, 3)
        train(other, second, 3)
        assert_same(weights(model), weights(other))


@on_backends
@on_variants
def test_weights_that_are_written_in_eval_mode_are_perturbed_from_where_they_are(backend, variant):
    model, optimizer = trained(variant, backend, dtype=torch.float64)
    rest = weights(model)
    optimizer.eval()
    plain = weights(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    optimizer.train()
    now = weights(model)
    torch.testing.assert_close(now[0] - (plain[0] + 1.0), rest[0] - plain[0], rtol=1e-12, atol=1e-14)
    assert_same(rest[1:], now[1:])


@on_backends
@on_variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_move_with_their_weights(backend, variant, dtype):
    model, optimizer = trained(variant, backend, dtype=dtype, rho=0.2)
    rest = weights(model), states(optimizer)
    masters = [state["master_param"].clone() for state in rest[1]]
    with optimizer.plain_weights():
        now = [state["master_param"] for state in states(optimizer)]
        assert distance(masters, now) == pytest.approx(0.2, rel=1e-4)
        assert_same([x.to(dtype) for x in now], weights(model))
    assert_same(rest, (weights(model), states(optimizer)))


@on_backends
@on_variants
def test_a_parameter_without_a_gradient_stays_where_it_rests(backend, variant):
    """And in no norm: the others are at the radius."""
    used, unused = (nn.Parameter(torch.linspace(1, 2, 4, dtype=torch.float64)) for _ in range(2))
    optimizer = build([used, unused], variant, "adamw", rho=0.1, weight_decay=0.0, backend=backend)

    def closure(with_both: bool) -> Any:
        def run() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (used**2).sum() + ((unused**3).sum() if with_both else 0.0)
            loss.backward()
            return loss

        return run

    optimizer.step(closure(True))
    before = unused.detach().clone()
    with optimizer.plain_weights():
        plain = unused.detach().clone()
    for _ in range(3):
        optimizer.step(closure(False))
        assert torch.equal(before, unused)
    rest = used.detach().clone()
    optimizer.eval()
    assert torch.equal(plain, unused)
    assert distance([rest], [used.detach()]) == pytest.approx(0.1, rel=1e-9)


@on_backends
@on_variants
def test_taking_the_perturbation_out_and_in_does_not_drift(backend, variant):
    """Each step rounds the weight once more than the base does: 200 of them walk a few units in the last place."""
    model, _ = trained(variant, backend, 0)
    start = weights(model)
    optimizer = build(model.parameters(), variant, "adamw", lr=0.0, weight_decay=0.0, rho=0.05, backend=backend)
    train(model, optimizer, 200)
    optimizer.eval()
    for a, b in zip(start, weights(model), strict=True):
        assert (a - b).abs().max() < 30 * 2.0**-24


@on_backends
@on_variants
def test_a_perturb_filter_may_change_while_the_weights_rest(backend, variant):
    model, optimizer = trained(variant, backend, dtype=torch.float64, perturb_filter=lambda p: True, rho=0.3)
    optimizer.param_groups[0]["perturb_filter"] = [False, True, True, True]
    train(model, optimizer, 1)
    rest = weights(model)
    optimizer.eval()
    assert torch.equal(rest[0], weights(model)[0])
    assert distance(rest[1:], weights(model)[1:]) == pytest.approx(0.3, rel=1e-9)


@pytest.mark.parametrize(
    ("cls", "base", "options", "message"),
    [
        (looksam.MSAM, "lamb", {}, "MSAM works over 'sgd', 'adam', 'adamw', not over 'lamb'"),
        (looksam.MSAM, torch.optim.RMSprop, {}, "not over RMSprop"),
        (looksam.S2SAM, "lars", {}, "S2SAM works over 'sgd'.*'lion', not over 'lars'"),
        (looksam.S2SAM, torch.optim.Adamax, {}, "not over Adamax"),
        (looksam.MSAM, "sgd", {}, "give momentum=0.9"),
        (looksam.MSAM, "sgd", {"momentum": 0.9, "dampening": 0.1}, "no dampening"),
        (looksam.MSAM, "adam", {"m_sharpness": True}, "two passes; MSAM has one"),
        (looksam.S2SAM, "adam", {"same_rng": True}, "two passes; S2SAM has one"),
        (looksam.S2SAM, "adam", {"layer_scale": "units"}, "layer_scale must be one of .*, or None"),
    ],
)
def test_what_cannot_be_is_refused(cls, base, options, message):
    with pytest.raises(ValueError, match=message):
        cls(network().parameters(), base, lr=0.1, **options)


def test_momentum_that_is_taken_away_later_is_refused():
    model = network()
    optimizer = looksam.MSAM(model.parameters(), "sgd", lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match=r"give momentum=0\.9"):
        train(model, optimizer, 1)
    with pytest.raises(ValueError, match=r"give momentum=0\.9"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "momentum": 0.0})
    assert len(optimizer.param_groups) == 1


def test_torchs_classes_are_the_bases_of_their_names():
    model, other = network(), network()
    by_class = looksam.MSAM(model.parameters(), torch.optim.Adam, lr=0.1, decoupled_weight_decay=True, weight_decay=0.1)
    by_name = looksam.MSAM(other.parameters(), "adamw", lr=0.1, weight_decay=0.1)
    train(model, by_class, 3)
    train(other, by_name, 3)
    assert_same(weights(model), weights(other))


@pytest.mark.parametrize(("saved", "loads"), [AT_REST, AT_REST[::-1], (AT_REST[0], "sam"), ("sam", AT_REST[0])])
def test_a_checkpoint_of_another_variant_is_said(saved, loads):
    _, optimizer = trained(saved, "reference")
    model = network()
    second = build(model.parameters(), loads, "adamw", backend="reference")
    with pytest.warns(UserWarning, match="another variant"):
        second.load_state_dict(optimizer.state_dict())
    assert not {"y", *(f"{x}_scale" for x in ("y", "exp_avg"))} & {x for s in second.state.values() for x in s}
    train(model, second, 2)


@on_variants
def test_evaluating_at_perturbed_weights_is_said_once(variant):
    model = network()
    optimizer = build(model.parameters(), variant, "adamw", model=model)
    x = torch.ones(2, 5)

    def used() -> None:
        model.eval()
        model(x)
        model.train()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used()  # nothing is perturbed yet
        train(model, optimizer, 2)
        with optimizer.plain_weights():
            used()
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        copied.eval()
        copied(x)
    with pytest.warns(UserWarning, match=r"call optimizer\.eval\(\)"):
        used()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used()


@on_variants
def test_a_compiled_model_may_be_watched(variant):
    model = network()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = build(model.parameters(), variant, "adamw", model=model)
    x, y = torch.ones(4, 5), torch.zeros(4, dtype=torch.long)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(x), y)
        loss.backward()
        return loss

    before = weights(model)
    for _ in range(2):
        optimizer.step(closure)
    assert distance(before, weights(model)) > 0


@on_backends
@on_variants
def test_copies_are_in_the_mode_of_the_original(backend, variant):
    model, optimizer = trained(variant, backend)
    optimizer.eval()
    pair = copy.deepcopy({"model": model, "optimizer": optimizer})
    optimizer.train()
    pair["optimizer"].train()
    for a, b in zip(weights(model), weights(pair["model"]), strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-22, atol=2.0**-22)
    pair["optimizer"].step(Closure(pair["model"], pair["optimizer"]))
