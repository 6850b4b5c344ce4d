"""Loss surfaces, balls and eigenvalues of a network small enough for its whole Hessian."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from looksam.lab import sharpness
from looksam.lab.models import build_model


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(40, 1, 2, 3, dtype=torch.float64), torch.randint(3, (40,))


def generator():
    return torch.Generator().manual_seed(0)


def whole_hessian(loss, weights):
    shapes = [w.shape for w in weights]
    flat = torch.cat([w.flatten() for w in weights])

    def of_flat(vector):
        parts = vector.split([s.numel() for s in shapes])
        return loss([part.view(s) for part, s in zip(parts, shapes, strict=True)])

    return torch.autograd.functional.hessian(of_flat, flat)


def test_the_largest_eigenvalues_are_those_of_the_whole_hessian():
    model, x, y = small()
    with sharpness.loss_of(model, x, y) as (loss, weights):
        exact = torch.linalg.eigvalsh(whole_hessian(loss, weights)).flip(0)
        product = sharpness.hessian_product(loss, weights)
        found = sharpness.top_eigenvalues(product, weights, 5, 60, generator())
    assert found == pytest.approx(exact[:5].tolist(), rel=1e-4)


def test_the_loss_at_no_distance_is_that_of_the_model():
    model, x, y = small()
    expected = float(F.cross_entropy(model(x), y).detach())
    with sharpness.loss_of(model, x, y, batch_size=7) as (loss, weights):
        directions = tuple(sharpness.filter_normalised(weights, generator()) for _ in range(2))
        assert sharpness.line(loss, weights, directions[0], [0.0])[0] == pytest.approx(expected, rel=1e-6)
        rows = sharpness.plane(loss, weights, directions, [-1.0, 0.0, 1.0])
        assert rows[1] == pytest.approx(sharpness.line(loss, weights, directions[0], [-1.0, 0.0, 1.0]), rel=1e-6)
        assert rows[1][1] == pytest.approx(expected, rel=1e-6)
        other = [w + d for w, d in zip(weights, directions[1], strict=True)]
        assert rows[2][1] == pytest.approx(float(loss(other)), rel=1e-6)


def test_filters_of_a_direction_are_as_long_as_those_of_the_weights():
    model = build_model("cnn", 3, 8, 10, width=0.25)
    weights = [p.detach() for p in model.parameters()]
    for w, d in zip(weights, sharpness.filter_normalised(weights, generator()), strict=True):
        if w.dim() < 2:
            assert not d.any()
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))
            assert not torch.allclose(d, w)


def test_the_worst_loss_in_a_ball_of_a_parabola():
    """Of (a^2 + 9 b^2) / 2 around (1.3, 0.3), beside the largest value on the boundary."""
    centre, scale = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 9.0], dtype=torch.float64)

    def loss(weights):
        return 0.5 * (scale * weights[0] ** 2).sum()

    start = [centre + 0.3]  # b = 0 is a saddle of the ascent
    angles = torch.linspace(0, 2 * torch.pi, 100001, dtype=torch.float64)
    circle = start[0] + 0.5 * torch.stack([angles.cos(), angles.sin()], dim=1)
    exact = float((0.5 * (scale * circle**2).sum(1)).max())
    assert sharpness.worst_in_ball(loss, start, 0.5, steps=200) == pytest.approx(exact, rel=1e-3)
    # One step is SAM's: along the gradient, of length rho.
    g = scale * start[0]
    assert sharpness.worst_in_ball(loss, start, 0.5, steps=1) == pytest.approx(
        float(loss([start[0] + 0.5 * g / g.norm()]))
    )
    spread = [sharpness.mean_on_sphere(loss, start, 0.5, generator(), samples=4000)]
    assert spread == pytest.approx([float((0.5 * (scale * circle**2).sum(1)).mean())], rel=0.02)


def test_attention_and_batch_normalisation_have_second_derivatives_and_keep_their_state():
    for name in ("vit-tiny", "cnn"):
        torch.manual_seed(0)
        model = build_model(name, 1, 8, 10, width=0.25).double()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(10, (8,))
        with sharpness.loss_of(model, x, y) as (loss, weights):
            product = sharpness.hessian_product(loss, weights)
            v = sharpness.filter_normalised(weights, generator())
            step = 1e-6  # so small that no ReLU changes its side
            ahead, behind = (
                sharpness.gradient_at(loss, sharpness.moved(weights, (sign * step, v))) for sign in (1, -1)
            )
            numeric = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
            error = sharpness.norm(sharpness.moved(product(v), (-1.0, numeric))) / sharpness.norm(numeric)
        assert float(error) < 1e-4, name
        assert model.training
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_eigenvalues_agree_with_curvlinops():
    curvlinops = pytest.importorskip(
        "curvlinops", reason="curvlinops is not installed; the whole Hessian is compared above"
    )
    from scipy.sparse.linalg import eigsh

    model, x, y = small()
    model, x = model.float(), x.float()
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(x, y)])
    reference = eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    with sharpness.loss_of(model, x, y) as (loss, weights):
        product = sharpness.hessian_product(loss, weights)
        found = sharpness.top_eigenvalues(product, weights, 3, 60, generator())
    assert found == pytest.approx(sorted(reference.tolist(), reverse=True), rel=1e-3)
