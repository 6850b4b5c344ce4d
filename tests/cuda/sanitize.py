"""Every kernel on small tensors, for compute-sanitizer: ``compute-sanitizer python -m tests.cuda.sanitize``."""

from __future__ import annotations

import torch

import looksam_kernels as lk
from tests.kernels import cases
from tests.kernels.cases import BASE_CASES, CASES, COMBINATIONS, RULE_GROUPS

SKIPPED = ("not dense",)
"""The kernels see a copy: nothing new."""


def main(device: str = "cuda") -> None:
    for name, rows in CASES.items():
        if name in SKIPPED or not rows:
            continue
        for base, groups in BASE_CASES.values():
            columns = cases.columns(rows, device)
            table = cases.table(rows, columns, "native")
            lars = base == "lars"
            known, up = lk.measure(table, "sam", RULE_GROUPS, lars=lars)
            lk.perturb(table, up)
            lk.restore(table)
            lk.perturb(table, up, cases.eta(rows))
            lk.measure(table, "looksam_refresh", RULE_GROUPS, known=known, max_grad_norm=1.0, lars=lars)
            for combination in ("s, q = s - c g", "g, then w += c (g - s)"):
                c = cases.for_base(COMBINATIONS[combination].coefficients(rows, device), base)
                if c.q is None or all(q is not None for q in columns["q"]):
                    lk.step(table, base, c, groups)
        if device == "cuda":
            torch.cuda.synchronize()
        print(name, flush=True)


if __name__ == "__main__":
    main()
