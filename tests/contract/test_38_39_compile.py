"""Sentences 38 and 39: compiled models, graphs, registered ops."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.contract.support import (
    BACKENDS,
    assert_same,
    build,
    data,
    network,
    on_host_free_pairs,
    weights,
)

needs_compiler = pytest.mark.skipif(
    not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not run on this Python"
)


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("statistics", ["as they are", "frozen"])
def test_contract_38_no_recompilation(backend: str, statistics: str) -> None:
    """One graph, also where the second pass leaves running statistics alone. No later step compiles anything."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)] if statistics == "frozen" else [nn.Linear(5, 3)]
    model = nn.Sequential(*layers)
    compiled = torch.compile(model, backend="aot_eager")
    own = {"model": model} if statistics == "frozen" else {}
    optimizer = build(model.parameters(), "looksam", backend=backend, **own)
    x, y = data()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(x), y)
        loss.backward()
        return loss

    torch._dynamo.utils.counters.clear()
    first = optimizer.step(closure).item()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1
    for _ in range(5):
        last = optimizer.step(closure).item()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert last < first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@on_host_free_pairs
def test_contract_38_two_graphs_replay_the_steps(variant: str, base: str) -> None:
    """A sharp and a reuse or plain step, captured once and replayed, equal eager steps bit for bit."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 5, device="cuda"), torch.randn(16, 3, device="cuda")
    results = []
    for graphed in (False, True):
        model = network().cuda()
        optimizer = build(model.parameters(), variant, base)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):  # warm-up: state, tables, autotuning
                optimizer.step(closure)
        torch.cuda.current_stream().wait_stream(stream)
        graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
        if graphed:
            for graph in graphs:
                with torch.cuda.graph(graph):
                    optimizer.step(closure)
        for step in range(6):
            if graphed:
                graphs[step % 2].replay()
            else:
                optimizer.step(closure)
        torch.cuda.synchronize()
        results.append(weights(model))
    assert_same(results[0], results[1])
