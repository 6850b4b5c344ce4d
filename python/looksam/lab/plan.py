"""What an experiment is to do, decided before any work: configurations, folder, checkpoints to go on from."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from looksam_kernels import backend_info

from .checkpoint import Checkpoints
from .config import TrainConfig
from .data import Dataset, load_dataset
from .defaults import defaults_of, resolve_batch_size, resolve_device
from .environment import cpu_count, environment
from .methods import build_optimizer, parse_method, values_used
from .models import CONVOLUTIONAL, build_model
from .options import build_configs, check_processes, common_config
from .processes import World
from .records import RESULTS, DamagedResults, read_header
from .weights import load_weights


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


PATIENCE = 3.0
"""Seconds."""


@contextlib.contextmanager
def announced(what: str, world: World) -> Iterator[None]:
    """Says what is going on, should it take long: a folder may hold millions of files."""
    timer = threading.Timer(PATIENCE, click.echo, [f"{what} ..."], {"err": True})
    if world.rank == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def make_plan(ctx: click.Context, methods: Sequence[str], seeds: int, values: dict[str, Any], world: World) -> Plan:
    """Check the options, decode the data, clear the way for new results. Raises click.UsageError or DataError."""
    configs = build_configs(methods, seeds, values)
    check_processes(values, methods, world)
    folder = output_folder(values["out"], str(ctx.info_name), values["overwrite"], values["resume"])
    checkpoints = Checkpoints(folder, values["checkpoint_every"], values["resume"])
    try:
        cuda = resolve_device(values["device"]).type == "cuda"
        check_backend(values["backend"])
        different = [config for config in configs if config.seed == configs[0].seed]
        optimizers = {config.method: try_optimizer(config) for config in different}
        with announced(f"reading {configs[0].data.source}", world):
            data = load_dataset(configs[0].data, configs[0].seed)  # decodes and caches here, and fails here if it must
        check_weights(different, data)
        batches = {config.batch_size: config for config in different}
        used = {size: try_model(config, data, world) for size, config in batches.items()}[configs[0].batch_size]
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
    new = header(ctx, common_config(values), configs) | {"used": {"run": used, "methods": optimizers}}
    new |= values.get("about", {})
    new |= {"parallel": {"jobs": jobs, "processes": world.size, "threads": threads}}
    if checkpoints.resume:
        try:
            old = read_header(folder)
        except DamagedResults as error:
            raise click.UsageError(f"--resume: {error}") from error
        check_same(old, new, checkpoints)
        # The same number of threads, whatever the machine does now: it decides the last bits.
        threads = values["threads"] or old["parallel"]["threads"]
        new = old | {"parallel": new["parallel"] | {"threads": threads}}
        for config in configs:
            checkpoints.load(config)  # fails here if it must, while the results are as they were
    make_writable(folder)
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
                f"give the same options again: {resume_command(old)}"
            )


def resume_command(header: dict[str, Any]) -> str:
    """The command line that goes on with an experiment: as it was started, but for what would begin anew."""
    words = [word for word in shlex.split(header["command_line"]) if word not in ("--overwrite", "--resume")]
    return shlex.join([*words, "--resume"])


def check_backend(name: str | None) -> None:
    """Raise ValueError if the backend, or else that of LOOKSAM_BACKEND, is unknown or cannot be used here."""
    backends = backend_info()
    given = f"--backend {name}"
    if name is None and (name := os.environ.get("LOOKSAM_BACKEND") or None):
        given = f"LOOKSAM_BACKEND={name}"
    if name is not None and name not in backends:
        raise ValueError(f"{given}: unknown; choose one of {', '.join(backends)}")
    if name is not None and not backends[name].available:
        raise ValueError(f"{given}: not available here, {backends[name].reason}; see looksam info")


def try_optimizer(config: TrainConfig) -> dict[str, Any]:
    """The values that the optimizer of ``config`` steps with, from one that is made for nothing else.

    Raises ValueError if it cannot be made with these options.
    """
    try:
        alone = replace(config, m_sharpness=False)  # which asks for a model that several processes share
        used = values_used(build_optimizer(alone, torch.nn.Linear(2, 2), 100))
        return (used if config.train else {}) | parse_method(config.method).of_the_run
    except Exception as error:  # of wrong values torch's classes raise whatever their arithmetic raises
        given = ", ".join(f"{name}={value}" for name, value in config.options) or "its defaults"
        raise ValueError(f"{config.method} with {given}: {error}") from error


def check_weights(configs: Sequence[TrainConfig], data: Dataset) -> None:
    """Raise ValueError if the files of weights that runs begin with do not fit the model."""
    channels, size = data.train_x.shape[1:3]
    for config in configs:
        if config.weights is not None:
            name = config.model or defaults_of(config).model
            with torch.device("meta"):
                net = build_model(name, channels, size, len(data.classes), config.width, config.patch)
            try:
                load_weights(net, config.weights)
            except ValueError as error:
                raise ValueError(f"--model {name}, {error}") from error
        if config.pixels is not None and any(len(values) not in (1, channels) for values in config.pixels):
            raise ValueError(f"--pixel-mean, --pixel-std: give one number, or one for each of {channels} channel(s)")


def try_model(config: TrainConfig, data: Dataset, world: World) -> dict[str, Any]:
    """What is used for the options that were left out, after the model has run once without memory.

    Raises ValueError if the batch cannot be shared out or the model cannot take the images.
    """
    defaults = defaults_of(config)
    batch_size = resolve_batch_size(config, len(data.train_y), world)
    model = config.model or defaults.model
    channels, size = data.train_x.shape[1:3]
    if config.patch is not None and model in CONVOLUTIONAL:
        raise ValueError(f"--patch {config.patch}: {model} has no patches; leave it out or give --model vit-tiny")
    try:
        with torch.device("meta"):
            net = build_model(model, channels, size, len(data.classes), config.width, config.patch)
            net(torch.empty(batch_size // (world.size * config.accumulate), channels, size, size))
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        width = "" if config.width == 1 else f" --width {config.width:g}"
        raise ValueError(
            f"--model {model}{width} cannot take {batch_size} images of {size}x{size} pixels: {reason}"
        ) from error
    device = resolve_device(config.device)
    return {
        "model": model, "batch_size": batch_size, "augment": config.augment or defaults.augment,
        "device": str(device), "image_size": size, "train_images": len(data.train_y),
        "steps": config.epochs * (len(data.train_y) // batch_size),
    }  # fmt: skip


def make_writable(folder: Path) -> None:
    """Make the folder and try to write there. Raises click.UsageError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise click.UsageError(
            f"--out {folder}: cannot write there ({error.strerror}); choose another folder"
        ) from error


def output_folder(out: str | None, command: str, overwrite: bool, resume: bool) -> Path:
    if out == "":
        raise click.UsageError("--out: the folder's name is empty")
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


def header(ctx: click.Context, common: TrainConfig, configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """The first line of results.jsonl: everything about the experiment that is known before it starts."""
    config = common.to_json()
    for name in ("method", "seed", "options", "threads"):
        del config[name]
    return {
        "command": ctx.info_name,
        "command_line": shlex.join(["looksam", str(ctx.info_name), *ctx.meta["looksam.arguments"]]),
        "methods": {config.method: dict(config.options) for config in configs},
        "seeds": sorted({config.seed for config in configs}),
        "config": config,
        "environment": environment(),
    }
