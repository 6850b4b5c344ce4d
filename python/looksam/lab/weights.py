"""Weights that were trained elsewhere: a state_dict in a file, and its place in a model of the laboratory."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .models import Bottleneck, Residual

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts keep the state_dict beside other things."""
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, torch.compile and Lightning put before every name."""
SHOWN = 4


def read_weights(path: str) -> dict[str, Tensor]:
    """The state_dict in a file of ``torch.save`` or safetensors, without what wraps it and without prefixes.

    Nothing but tensors and plain values is unpickled. Raises ValueError.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; give one that holds a state_dict (.pt, .pth, .safetensors)")
    found = _safetensors(path) if path.endswith(".safetensors") else _pickled(path)
    while isinstance(found, Mapping) and (inner := [key for key in WRAPPERS if isinstance(found.get(key), Mapping)]):
        found = found[inner[0]]
    if not isinstance(found, Mapping) or not found:
        what = "an empty dict" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise ValueError(f"{path} holds {what}, not a state_dict; save model.state_dict() with torch.save")
    if others := [str(key) for key, value in found.items() if not (isinstance(key, str) and isinstance(value, Tensor))]:
        raise ValueError(
            f"{path} is not a state_dict: {_some(others)} hold(s) no tensor, and none of the keys {', '.join(WRAPPERS)} "
            "holds one; save model.state_dict() with torch.save"
        )
    weights = dict(found)
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), ""):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _pickled(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise ValueError(f"{path} is damaged, or not a file of torch.save") from error
        raise ValueError(
            f"{path} holds Python objects that are not tensors, such as a whole model. They are not loaded, for loading "
            "them can run any code: save model.state_dict() alone with torch.save"
        ) from error
    except Exception as error:  # of a damaged file torch raises what its parts raise
        raise ValueError(f"{path} is damaged, or not a file of torch.save ({type(error).__name__})") from error


def _safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs the package safetensors; pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file ({error})") from error


def load_weights(model: nn.Module, path: str) -> None:
    """Load the weights in ``path`` into ``model``, which may be on the device "meta": then they are only compared.

    Names are the model's own; ResNets also take the usual ones (``conv1``, ``layer1.0.bn1``, ``fc`` or ``linear``). Raises
    ValueError, with the names, if a weight is missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    weights = read_weights(path)
    if not weights.keys() & expected.keys():
        weights = _from_usual_names(model, weights)
    for name in expected.keys() - weights.keys():
        if name.endswith("num_batches_tracked"):  # not in old files, and read by no evaluation
            weights[name] = expected[name]
    missing, unexpected = ([n for n in a if n not in b] for a, b in ((expected, weights), (weights, expected)))
    reasons = [
        f"{len(names)} {what}: {_some(names)}"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"))
        if names
    ]
    shapes = [
        f"{name} {list(weights[name].shape)} in place of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if shapes:
        reasons.append(f"{len(shapes)} of another shape: {_some(shapes)}")
    if reasons:
        raise ValueError(f"{path} does not fit the model: {'; '.join(reasons)}")
    if not next(model.parameters()).is_meta:
        model.load_state_dict(weights)


def _from_usual_names(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's weights under the names that they have here; what is not of a ResNet keeps its name."""
    ours = [name for name, block in model.named_children() if isinstance(block, (Residual, Bottleneck))]
    pattern = re.compile(r"layer(\d+)\.(\d+)\.(?:(conv|bn)(\d)|(?:shortcut|downsample)\.([01]))\.(\w+)")
    matches = {name: match for name in weights if (match := pattern.fullmatch(name))}
    theirs = sorted({(int(match[1]), int(match[2])) for match in matches.values()})
    blocks = dict(zip(theirs, ours, strict=False))
    last = next((name for name, part in reversed(list(model.named_children())) if isinstance(part, nn.Linear)), "")
    ends = {"conv1": "0.0", "bn1": "0.1", "fc": last, "linear": last}

    def renamed(name: str) -> str:
        if match := matches.get(name):
            block = blocks.get((int(match[1]), int(match[2])))
            part = (
                f"shortcut.{match[5]}" if match[5] else f"body.{2 * int(match[4]) - 2}.{('conv', 'bn').index(match[3])}"
            )
            return name if block is None else f"{block}.{part}.{match[6]}"
        module, _, tensor = name.rpartition(".")
        return f"{ends[module]}.{tensor}" if module in ends else name

    return {renamed(name): tensor for name, tensor in weights.items()} if ours else weights


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
