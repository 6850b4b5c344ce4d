"""The base updates on the elements of one program.

``update(w, d, states, h, factors)`` returns the new w and the new states. h are the group's hyper-parameters in float64, lr and
then Base.hyper of :mod:`looksam_kernels.updates`; factors what its ``factors(t, h)`` makes of the update count. A state that the
bucket lacks is 0, and what is returned for it goes nowhere; one that only this group lacks is returned as it was.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
# ruff: noqa: RUF059 - a base names all of its hyper-parameters, in their order, where it takes them apart

from typing import Any, NamedTuple

import triton
import triton.language as tl

from looksam_kernels.backends.triton.elements import divide, power, root


class Update(NamedTuple):
    """A base update, and what makes those factors of it that depend on the update count t, float64, and how many."""

    update: Any
    make_factors: Any = None
    factors: int = 0


@triton.jit
def sgd_factors(t, h):
    """The weight of d in the momentum: 1 - dampening, the first time 1."""
    lr, weight_decay, momentum, dampening, nesterov = h
    return (tl.where(t == 1, 1.0, 1 - dampening),)


@triton.jit
def sgd(w, d, states, h, factors):
    """buf = momentum buf + (1 - dampening) d."""
    lr, weight_decay, momentum, dampening, nesterov = h
    acc: tl.constexpr = w.dtype
    d += weight_decay.to(acc) * w
    buf = momentum.to(acc) * states[0] + factors[0].to(acc) * d
    ahead = tl.where(momentum == 0, d, tl.where(nesterov != 0, d + momentum.to(acc) * buf, buf))
    return w - lr.to(acc) * ahead, (tl.where(momentum == 0, states[0], buf),)


@triton.jit
def adam_factors(t, h):
    """1 - beta1^t and sqrt(1 - beta2^t)."""
    beta1, beta2 = h[2], h[3]
    return 1 - power(beta1, t.to(tl.int32)), tl.sqrt(1 - power(beta2, t.to(tl.int32)))


@triton.jit
def moments(d, m, v, beta1, beta2):
    """m = beta1 m + (1 - beta1) d, v = beta2 v + (1 - beta2) d^2."""
    return m + (1 - beta1).to(d.dtype) * (d - m), mean_square(d, v, beta2)


@triton.jit
def mean_square(d, v, beta):
    """v = beta v + (1 - beta) d^2"""
    return beta.to(d.dtype) * v + (1 - beta).to(d.dtype) * d * d


@triton.jit
def adam_direction(m, v, factors, eps):
    """(m / bc1) / (sqrt(v / bc2) + eps)."""
    acc: tl.constexpr = m.dtype
    return divide(divide(m, factors[0].to(acc)), divide(root(v), factors[1].to(acc)) + eps.to(acc))


@triton.jit
def adam(w, d, states, h, factors):
    lr, weight_decay, beta1, beta2, eps = h
    m, v = moments(d + weight_decay.to(w.dtype) * w, states[0], states[1], beta1, beta2)
    return w - lr.to(w.dtype) * adam_direction(m, v, factors, eps), (m, v)


@triton.jit
def adamw(w, d, states, h, factors):
    lr, weight_decay, beta1, beta2, eps = h
    m, v = moments(d, states[0], states[1], beta1, beta2)
    w = w * (1 - lr * weight_decay).to(w.dtype)
    return w - lr.to(w.dtype) * adam_direction(m, v, factors, eps), (m, v)


@triton.jit
def lamb_direction(w, m, v, h, factors):
    """u = (m / bc1) / (sqrt(v / bc2) + eps) + weight_decay w."""
    return adam_direction(m, v, factors, h[4]) + h[1].to(w.dtype) * w


@triton.jit
def lamb_factors(t, h):
    """As adam_factors; 1 and 1 without bias_correction."""
    bc1, root_bc2 = adam_factors(t, h)
    return tl.where(h[7] != 0, bc1, 1.0), tl.where(h[7] != 0, root_bc2, 1.0)


@triton.jit
def lamb(w, d, states, h, factors):
    """u in place of the new w, which waits for the trust ratio."""
    m, v = moments(d, states[0], states[1], h[2], h[3])
    return lamb_direction(w, m, v, h, factors), (m, v)


@triton.jit
def lion(w, d, states, h, factors):
    """w -= lr sign(beta1 m + (1 - beta1) d), m = beta2 m + (1 - beta2) d."""
    lr, weight_decay, beta1, beta2 = h
    acc: tl.constexpr = w.dtype
    m = states[0]
    ahead = beta1.to(acc) * m + (1 - beta1).to(acc) * d
    u = tl.where(ahead > 0, 1.0, tl.where(ahead < 0, -1.0, 0.0))
    new_m = beta2.to(acc) * m + (1 - beta2).to(acc) * d
    return w * (1 - lr * weight_decay).to(acc) - lr.to(acc) * u, (new_m,)


@triton.jit
def adagrad_factors(t, h):
    """lr / (1 + (t - 1) lr_decay)"""
    lr, weight_decay, lr_decay, eps = h
    return (lr / (1 + (t.to(tl.float64) - 1) * lr_decay),)


@triton.jit
def adagrad(w, d, states, h, factors):
    """sum += d^2; w -= lr d / (sqrt(sum) + eps)."""
    lr, weight_decay, lr_decay, eps = h
    acc: tl.constexpr = w.dtype
    d += weight_decay.to(acc) * w
    total = states[0] + d * d
    return w - factors[0].to(acc) * divide(d, root(total) + eps.to(acc)), (total,)


@triton.jit
def rmsprop(w, d, states, h, factors):
    """u = d / (sqrt(v) + eps), centered: v - mean^2, 0 where rounding leaves less; w -= lr u, or lr buf with momentum."""
    lr, weight_decay, alpha, eps, momentum, centered = h
    acc: tl.constexpr = w.dtype
    d += weight_decay.to(acc) * w
    v = mean_square(d, states[0], alpha)
    mean = states[1] + (1 - alpha).to(acc) * (d - states[1])
    variance = v - mean * mean
    variance = tl.where(centered != 0, tl.where(variance < 0, 0.0, variance), v)
    u = divide(d, root(variance) + eps.to(acc))
    buf = u + momentum.to(acc) * states[2]
    moved = tl.where(momentum != 0, buf, u)
    kept = tl.where(centered != 0, mean, states[1]), tl.where(momentum != 0, buf, states[2])
    return w - lr.to(acc) * moved, (v, kept[0], kept[1])


@triton.jit
def adadelta(w, d, states, h, factors):
    """u = sqrt(acc + eps) / sqrt(v + eps) d; acc = rho acc + (1 - rho) u^2; w -= lr u."""
    lr, weight_decay, rho, eps = h
    acc: tl.constexpr = w.dtype
    d += weight_decay.to(acc) * w
    v = mean_square(d, states[0], rho)
    u = divide(root(states[1] + eps.to(acc)), root(v + eps.to(acc))) * d
    return w - lr.to(acc) * u, (v, mean_square(u, states[1], rho))


@triton.jit
def adan_factors(t, h):
    """bc1, bc2, sqrt(bc3), bc = 1 - beta^t; and 1 in the first step."""
    lr, weight_decay, beta1, beta2, beta3, eps, no_prox = h
    n = t.to(tl.int32)
    return 1 - power(beta1, n), 1 - power(beta2, n), tl.sqrt(1 - power(beta3, n)), tl.where(t == 1, 1.0, 0.0)


@triton.jit
def adan(w, d, states, h, factors):
    """u = (m / bc1 + beta2 a / bc2) / (sqrt(v / bc3) + eps); w = (w - lr u) / (1 + lr weight_decay)."""
    lr, weight_decay, beta1, beta2, beta3, eps, no_prox = h
    acc: tl.constexpr = w.dtype
    m, a, v, neg_before = states
    difference = tl.where(factors[3] != 0, 0.0, d + neg_before)
    m = m + (1 - beta1).to(acc) * (d - m)
    a = a + (1 - beta2).to(acc) * (difference - a)
    v = mean_square(d + beta2.to(acc) * difference, v, beta3)
    mean = divide(m, factors[0].to(acc)) + beta2.to(acc) * divide(a, factors[1].to(acc))
    moved = lr.to(acc) * divide(mean, divide(root(v), factors[2].to(acc)) + eps.to(acc))
    decay = lr * weight_decay
    before = tl.where(no_prox != 0, 1 - decay, 1.0).to(acc)
    after = tl.where(no_prox != 0, 1.0, 1 / (1 + decay)).to(acc)
    return (w * before - moved) * after, (m, a, v, -d)


UPDATES = {
    "sgd": Update(sgd, sgd_factors, 1),
    "adam": Update(adam, adam_factors, 2),
    "adamw": Update(adamw, adam_factors, 2),
    "lamb": Update(lamb, lamb_factors, 2),
    "lars": Update(sgd, sgd_factors, 1),
    "lion": Update(lion),
    "adagrad": Update(adagrad, adagrad_factors, 1),
    "rmsprop": Update(rmsprop),
    "adadelta": Update(adadelta),
    "adan": Update(adan, adan_factors, 4),
    "grad": Update(None),
}
