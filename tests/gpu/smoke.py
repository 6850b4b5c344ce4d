"""``python -m tests.gpu.smoke native``: a few tiny steps beside the reference's. With CUDA_LAUNCH_BLOCKING=1 an error in a
kernel is raised where it was launched."""

from __future__ import annotations

import sys
import traceback

import torch
from torch import Tensor

import looksam

OPTIMIZERS = {
    "LookSAM over adamw": lambda p, **o: looksam.LookSAM(p, "adamw", k=2, lr=0.01, weight_decay=0.1, **o),
    "LookLayerSAM over lamb": lambda p, **o: looksam.LookLayerSAM(p, "lamb", k=2, lr=0.01, **o),
    "ESAM over sgd": lambda p, **o: looksam.ESAM(p, "sgd", lr=0.01, momentum=0.9, **o),
    "LARS": lambda p, **o: looksam.LARS(p, lr=0.1, **o),
}
STEPS = 4


def train(name: str, backend: str, dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((33, 170), (170,), ())]
    x = torch.randn(16, 33, generator=random, dtype=torch.float64).to("cuda", dtype)
    params = [torch.nn.Parameter(w.to("cuda", dtype)) for w in start]
    optimizer = OPTIMIZERS[name](params, backend=backend)

    def losses(kept: Tensor | None = None) -> Tensor:
        optimizer.zero_grad()
        matrix, bias, scale = params
        return ((torch.tanh((x if kept is None else x[kept]) @ matrix + bias) * scale) ** 2).mean(1)

    def closure() -> Tensor:
        loss = losses().mean()
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(losses if isinstance(optimizer, looksam.ESAM) else closure)
    torch.cuda.synchronize()
    return [p.detach().double() for p in params]


def error(weights: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(weights, exact, strict=True))


def agrees(name: str, backend: str) -> bool:
    exact = train(name, "reference", torch.float64)
    allowed = 2 * error(train(name, "reference", torch.float32), exact) + 4 * STEPS * torch.finfo(torch.float32).eps
    found = error(train(name, backend, torch.float32), exact)
    print(f"smoke {backend}: {name}, {STEPS} steps, error {found:.1e}, allowed {allowed:.1e}", flush=True)
    return found <= allowed


def main(backend: str) -> int:
    results = []
    for name in OPTIMIZERS:
        try:
            results.append(agrees(name, backend))
        except Exception:  # the next may still run
            traceback.print_exc()
            print(f"smoke {backend}: {name} raised", flush=True)
            results.append(False)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
