"""What an experiment is to do, decided before any work: configurations, folder, checkpoints to go on from."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from .checkpoint import Checkpoints
from .config import TrainConfig
from .data import load_dataset
from .defaults import resolve_batch_size, resolve_device
from .environment import cpu_count, environment
from .options import build_configs, check_processes
from .processes import World
from .records import RESULTS, read_header


@dataclass(frozen=True)
class Plan:
    """What is to be done, once all has been checked that can be checked before any work."""

    configs: Sequence[TrainConfig]
    checkpoints: Checkpoints
    header: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.checkpoints.folder

    @property
    def jobs(self) -> int:
        jobs: int = self.header["parallel"]["jobs"]
        return jobs


def make_plan(ctx: click.Context, methods: Sequence[str], seeds: int, values: dict[str, Any], world: World) -> Plan:
    """Check the options, decode the data, clear the way for new results. Raises click.UsageError or DataError."""
    configs = build_configs(methods, seeds, values)
    check_processes(values, methods, world)
    folder = output_folder(values["out"], str(ctx.info_name), values["overwrite"], values["resume"])
    checkpoints = Checkpoints(folder, values["checkpoint_every"], values["resume"])
    data = load_dataset(configs[0].data, configs[0].seed)  # decodes and caches here, and fails here if it must
    try:
        cuda = resolve_device(values["device"]).type == "cuda"
        resolve_batch_size(configs[0], len(data.train_y), world)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if cuda and world.local_size > torch.cuda.device_count():
        raise click.UsageError(
            f"{world.local_size} processes on {torch.cuda.device_count()} CUDA device(s); start as many as there are "
            "devices, or use --device cpu"
        )
    one_at_a_time = cuda or world.started_by_torchrun
    jobs = min(len(configs), values["jobs"] or (1 if one_at_a_time else cpu_count()))
    threads = values["threads"] or max(1, cpu_count() // (jobs * world.local_size))
    new = header(ctx, configs) | {"parallel": {"jobs": jobs, "processes": world.size, "threads": threads}}
    if checkpoints.resume:
        old = read_header(folder)
        check_same(old, new, checkpoints)
        # The same number of threads, whatever the machine does now: it decides the last bits.
        threads = values["threads"] or old["parallel"]["threads"]
        new = old | {"parallel": new["parallel"] | {"threads": threads}}
    checkpoints.clear()
    return Plan([replace(config, threads=threads) for config in configs], checkpoints, new)


def check_same(old: dict[str, Any], new: dict[str, Any], checkpoints: Checkpoints) -> None:
    """Raise click.UsageError if the experiment in the folder cannot go on as ``new``, its header now, says."""
    if not checkpoints.exist():
        raise click.UsageError(
            f"--resume: {checkpoints.folder} holds no checkpoint; leave --resume out and add --overwrite to begin again"
        )
    for part in ("methods", "seeds", "config"):
        before, now = (json.loads(json.dumps(h[part])) for h in (old, new))  # tuples come back from disk as lists
        if before != now:
            changed = [k for k in now if before.get(k) != now[k]] if part == "config" else [part]
            raise click.UsageError(
                f"--resume: {', '.join(changed)} differ(s) from what {checkpoints.folder} was started with; "
                f"give the same options again: {old['command_line']}"
            )


def output_folder(out: str | None, command: str, overwrite: bool, resume: bool) -> Path:
    folder = Path(out or f"runs/{command}-{time.strftime('%Y%m%d-%H%M%S')}")
    if resume:
        if out is None or overwrite:
            raise click.UsageError("--resume needs --out DIR, the folder of the experiment, and no --overwrite")
        if not (folder / RESULTS).exists():
            raise click.UsageError(f"--resume: {folder} holds no results to go on with; leave --resume out to begin")
    elif (folder / RESULTS).exists() and not overwrite:
        raise click.UsageError(
            f"--out {folder} already holds results; choose another folder, or add --resume or --overwrite"
        )
    return folder


def header(ctx: click.Context, configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """The first line of results.jsonl: everything about the experiment that is known before it starts."""
    common = configs[0].to_json()
    for name in ("method", "seed", "options", "threads"):
        del common[name]
    return {
        "command": ctx.info_name,
        "command_line": shlex.join(["looksam", str(ctx.info_name), *ctx.meta["looksam.arguments"]]),
        "methods": {config.method: dict(config.options) for config in configs},
        "seeds": sorted({config.seed for config in configs}),
        "config": common,
        "environment": environment(),
    }
