"""What ``perturb_filter`` saves of a step of SAM: arithmetic, counted, and the memory of the backup.

``python -m benchmarks.perturb_filter``: ViT-S (12 blocks of width 384) on two images' tokens; perturbed are its norm layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import looksam

TOKENS, WIDTH = 197, 384


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 12, enable_nested_tensor=False), nn.Linear(WIDTH, 1000))


def measure(filtered: bool, leave_out: bool) -> tuple[int, int]:
    """Floating point operations of a step, and bytes of the backup.

    leave_out: the first pass makes no gradients of the parameters outside.
    """
    model = transformer()
    inside = {p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    outside = [p for p in model.parameters() if p not in inside]
    options = {"perturb_filter": inside.__contains__} if filtered else {}
    optimizer = looksam.SAM(model.parameters(), "sgd", lr=1e-6, **options)
    x, calls = torch.randn(2, TOKENS, WIDTH), 0

    def closure() -> Tensor:
        nonlocal calls
        for p in outside:
            p.requires_grad_(not (leave_out and calls == 0))
        calls += 1
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        return loss

    with FlopCounterMode(display=False) as counter:
        optimizer.step(closure)
    backups = optimizer._bound().table["b"]
    return counter.get_total_flops(), sum(b.numel() * b.element_size() for b in backups if b is not None)


if __name__ == "__main__":
    whole, _ = measure(False, False)
    for name, filtered, leave_out in (
        ("SAM", False, False),
        ("norm layers perturbed", True, False),
        ("and the first pass without the other gradients", True, True),
    ):
        operations, saved = measure(filtered, leave_out)
        print(f"{name:48} {operations / 1e9:6.1f} GFLOP {2 * operations / whole:5.2f} passes {saved / 2**20:6.2f} MiB")
