"""Several processes: data-parallel training with LookSAM over AdamW.

    $ torchrun --nproc-per-node 2 examples/ddp.py
    $ torchrun --nproc-per-node 2 examples/ddp.py --m-sharpness

One process per GPU with NCCL, or on CPUs with gloo. The images are the handwritten
digits of scikit-learn. With --m-sharpness every process perturbs its weights with
its own gradient, and only the second pass of a sharp step communicates.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from looksam import LookSAM


def digits() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).div(16)
    return TensorDataset(x, torch.tensor(labels))


def replicas_are_equal(model: nn.Module) -> bool:
    """Are the weights of all processes equal to the first one's, bit for bit?"""
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, src=0)
    equal = (mine == first).all().int()
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    return bool(equal.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--m-sharpness", action="store_true")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    data = digits()
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(
        device
    )
    ddp = DistributedDataParallel(net)
    loss_fn = nn.CrossEntropyLoss()
    # model=: with m-sharpness the first pass runs inside ddp.no_sync().
    opt = LookSAM(
        ddp.parameters(),
        "adamw",
        rho=args.rho,
        k=5,
        lr=2e-3,
        model=ddp,
        m_sharpness=args.m_sharpness,
    )

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            x, y = x.to(device), y.to(device)

            def closure(x=x, y=y):
                opt.zero_grad()
                loss = loss_fn(ddp(x), y)
                loss.backward()
                return loss

            loss = opt.step(closure)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: last loss {loss:.3f}", flush=True)

    equal = replicas_are_equal(net)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, equal weights: {equal}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
