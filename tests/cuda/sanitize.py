"""Every kernel on small tensors, for compute-sanitizer: ``compute-sanitizer python -m tests.cuda.sanitize``; with ``1/4``
behind it the second of four shares."""

from __future__ import annotations

import sys
from itertools import product

import torch

import looksam_kernels as lk
from tests.kernels import cases
from tests.kernels.cases import BASE_CASES, CASES, COMBINATIONS, RULE_GROUPS, Row

SKIPPED = ("not dense",)
"""The kernels see a copy: nothing new."""


def main(device: str = "cuda", share: str = "0/1") -> None:
    mine, shares = map(int, share.split("/"))
    every = [(name, base) for name, base in product(CASES, BASE_CASES) if name not in SKIPPED and CASES[name]]
    for name, base in every[mine::shares]:
        run(CASES[name], base, device)
        print(f"{name}: {base}", flush=True)


def run(rows: list[Row], of_base: str, device: str) -> None:
    base, groups = BASE_CASES[of_base]
    columns = cases.columns(rows, device)
    table = cases.table(rows, columns, "native")
    lars = base == "lars"
    known, up = lk.measure(table, "sam", RULE_GROUPS, trust_ratio=lars)
    lk.perturb(table, up)
    lk.restore(table)
    lk.perturb(table, up, cases.eta(rows))
    lk.measure(table, "looksam_refresh", RULE_GROUPS, known=known, max_grad_norm=1.0, trust_ratio=lars)
    for combination in ("s, q = s - c g", "g, then w += c (g - s)"):
        c = cases.for_base(COMBINATIONS[combination].coefficients(rows, device), base)
        if c.q is None or all(q is not None for q in columns["q"]):
            lk.step(table, base, c, groups)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main("cuda", *sys.argv[1:])
