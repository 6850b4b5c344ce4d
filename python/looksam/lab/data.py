"""Image data sets, held in memory as uint8 tensors: digits, Fashion-MNIST, or any folder or tar of images."""

from __future__ import annotations

import gzip
import lzma
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from .cache import cached_arrays, tree_fingerprint
from .config import DataConfig, make_generator
from .environment import version
from .streaming import Images, StreamedImages

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LAYOUT = "train/<class>/*.jpg|png and test/<class>/*.jpg|png"
DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
"""What reading a damaged archive raises."""
FASHION_FILES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class DataError(click.ClickException):
    """Data that is missing or unusable; the message names the option and the remedy."""


@dataclass(frozen=True)
class Dataset:
    """``*_x``: uint8 [N, C, H, W] with H = W, in memory or streamed; ``*_y``: int64 [N]. ``flip``: mirrored images keep
    their class."""

    name: str
    train_x: Images
    train_y: Tensor
    test_x: Images
    test_y: Tensor
    classes: tuple[str, ...]
    flip: bool

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training images in 0..1, each float32 [C, 1, 1]; if they are streamed, of a
        thousand of them."""
        images = self.train_x
        if not isinstance(images, Tensor):
            images = images[torch.randperm(len(images), generator=make_generator(0, "statistics"))[:1000]].decoded()
        values = images.double().div(255).transpose(0, 1).flatten(1)
        shape = (-1, 1, 1)
        return values.mean(1).float().view(shape), values.std(1).clamp_min(1e-6).float().view(shape)


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """The data of one run: subset and label noise applied to the training part, the test part left clean."""
    data = _load_source(config)
    if config.train_size is not None:
        if not 0 < config.train_size <= len(data.train_y):
            raise ValueError(f"--train-size {config.train_size}: {data.name} has {len(data.train_y)} training images")
        # The subset does not depend on the run's seed: runs of one experiment share their data.
        kept = torch.randperm(len(data.train_y), generator=make_generator(0, "subset"))[: config.train_size]
        data = replace(data, train_x=data.train_x[kept], train_y=data.train_y[kept])
    if config.test_size is not None:
        if not 0 < config.test_size <= len(data.test_y):
            raise ValueError(f"--test-size {config.test_size}: {data.name} has {len(data.test_y)} test images")
        kept = torch.randperm(len(data.test_y), generator=make_generator(0, "test-subset"))[: config.test_size]
        data = replace(data, test_x=data.test_x[kept], test_y=data.test_y[kept])
    if config.holdout:
        data = _hold_out(data, config.holdout)
    if config.label_noise:
        labels = noisy_labels(data.train_y, config.label_noise, len(data.classes), seed)
        data = replace(data, train_y=labels)
    return data


def _hold_out(data: Dataset, part: float) -> Dataset:
    """A part of the training images, the same in every run, in the place of the test images; the rest is trained on."""
    order = torch.randperm(len(data.train_y), generator=make_generator(0, "holdout"))
    held, kept = order[: round(part * len(order))], order[round(part * len(order)) :]
    if not len(held) or not len(kept):
        raise ValueError(
            f"--validation {part}: nothing is left of {len(order)} training images on one of the two sides"
        )
    return replace(
        data, train_x=data.train_x[kept], train_y=data.train_y[kept],
        test_x=data.train_x[held], test_y=data.train_y[held],
    )  # fmt: skip


def noisy_labels(labels: Tensor, fraction: float, classes: int, seed: int) -> Tensor:
    """Symmetric noise: exactly round(fraction * N) labels become another class, each wrong class equally likely."""
    generator = make_generator(seed, "label-noise")
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy


def _load_source(config: DataConfig) -> Dataset:
    """
    Raises:
        ValueError: options that do not go together. DataError: what is wrong with the data.
    """
    if config.source in ("digits", "fashion-mnist") and config.image_size is not None:
        raise ValueError(
            f"--image-size {config.image_size}: {config.source} come in one size; it is for folders and tar files"
        )
    if config.source in ("digits", "fashion-mnist") and config.stream:
        raise ValueError(f"--stream: {config.source} fits in memory; it is for folders of images")
    if config.source != "fashion-mnist" and config.directory is not None:
        raise ValueError(f"--data-dir {config.directory}: it says where Fashion-MNIST lies; give --data fashion-mnist")
    if config.source == "digits":
        return _digits()
    if config.source == "fashion-mnist":
        return _fashion_mnist(config.directory)
    path = Path(config.source)
    if not path.exists():
        raise DataError(
            f"--data {config.source}: neither digits nor fashion-mnist, nor a folder or tar file that exists. "
            f"A folder or tar file must hold {LAYOUT}."
        )
    if config.stream:
        return _streamed(path, config.image_size)
    key = f"images 2 {tree_fingerprint(path)} {config.image_size}"
    arrays = cached_arrays(key, lambda: decode_images(path, config.image_size))
    return _dataset(path.name, arrays, tuple(str(c) for c in arrays["classes"]), flip=True)


def _dataset(name: str, arrays: dict[str, np.ndarray], classes: tuple[str, ...], flip: bool) -> Dataset:
    tensors = {k: torch.from_numpy(arrays[k]) for k in ("train_x", "train_y", "test_x", "test_y")}
    return Dataset(name, classes=classes, flip=flip, **tensors)


def _streamed(path: Path, image_size: int | None) -> Dataset:
    """The images of a folder, as :func:`decode_images` would decode them all, with three channels."""
    if not path.is_dir():
        raise DataError(f"--stream: {path} is no folder; unpack it, a tar file can only be read from its beginning")
    if image_size is None:
        raise DataError("--stream needs --image-size: nobody looks at all images before they are needed")
    files: dict[str, dict[str, dict[str, Path]]] = {"train": {}, "test": {}}
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if found := _place(f"{name}/" if file.is_dir() else name):
            split, label, image = found
            members = files[split].setdefault(label, {})
            if image:
                members[image] = file
    _check_classes(path, files)
    classes = tuple(sorted(files["train"]))
    parts: dict[str, Any] = {}
    for split, labels in files.items():
        ordered = [
            (classes.index(label), file) for label in sorted(labels) for _, file in sorted(labels[label].items())
        ]
        parts[f"{split}_x"] = StreamedImages([file for _, file in ordered], image_size, decode_file)
        parts[f"{split}_y"] = torch.tensor([label for label, _ in ordered])
    return Dataset(path.name, classes=classes, flip=True, **parts)


def decode_file(file: Path, size: int) -> Tensor:
    """uint8 [3, size, size]."""
    with file.open("rb") as stream:
        pixels = _decode(Entry(file.parts[-3], file.parts[-2], file.name, stream), file.parents[2], size)
    rgb = pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


def _digits() -> Dataset:
    """1,797 grey 8x8 digits that scikit-learn carries; a fixed stratified split into 1,000 and 797."""
    # Cached as the import of scikit-learn takes longer than many a run, in each of its processes.
    arrays = cached_arrays(f"digits 1 scikit-learn {version('scikit-learn')}", _split_digits)
    return _dataset("digits", arrays, tuple("0123456789"), flip=False)


def _split_digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, train_size=1000, stratify=labels, random_state=0
    )
    return {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}


def _fashion_mnist(directory: str | None) -> Dataset:
    folders = [Path("/usr/share/datasets/fashion-mnist")]
    if directory is not None:
        folders = [Path(directory) / "FashionMNIST" / "raw", Path(directory)]
    arrays = {}
    for key, name in FASHION_FILES.items():
        found = [f for folder in folders for f in (folder / f"{name}.gz", folder / name) if f.is_file()]
        if not found:
            raise DataError(
                f"--data fashion-mnist: {name}.gz is not in {' or '.join(map(str, folders))}. Install the Debian "
                "package dataset-fashion-mnist (apt install dataset-fashion-mnist), or put the four IDX files into "
                "DIR/FashionMNIST/raw, where torchvision also puts them, and give --data-dir DIR."
            )
        arrays[key] = read_idx(found[0])
    for split in ("train", "test"):
        arrays[f"{split}_x"] = arrays[f"{split}_x"][:, None]
        arrays[f"{split}_y"] = arrays[f"{split}_y"].astype(np.int64)
    return _dataset("fashion-mnist", arrays, FASHION_CLASSES, flip=True)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped or not, as a uint8 array of the shape that its header states."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except DAMAGED as error:
            raise DataError(f"--data-dir: {path} is damaged or cut short ({error}); fetch it again") from error
    dims = raw[3] if raw[:3] == b"\x00\x00\x08" else 0
    shape = np.frombuffer(raw, ">u4", dims, offset=4)
    if not dims or len(raw) != 4 + 4 * dims + shape.prod():
        raise DataError(f"--data-dir: {path} is not a complete IDX file of bytes; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()


def decode_images(path: Path, image_size: int | None) -> dict[str, np.ndarray]:
    """Decode a folder or tar laid out as LAYOUT, below any number of leading folders.

    Returns ``train_x``, ``test_x`` uint8 [N, C, S, S], ``train_y``, ``test_y`` int64 and ``classes``. Images are
    ordered by class and file name whatever the order on disk; grey ones stay one channel if all are grey. Names that
    begin with a dot are left out.
    """
    images: dict[str, dict[str, dict[str, np.ndarray]]] = {"train": {}, "test": {}}
    # Under torchrun and in pipes nobody looks at a bar.
    entries = track(_entries(path), description=f"decoding {path.name}", disable=not sys.stdout.isatty())
    for entry in entries:
        members = images[entry.split].setdefault(entry.label, {})
        if entry.file is not None:
            members[entry.name] = _decode(entry, path, image_size)
    _check_classes(path, images)
    decoded = [image for labels in images.values() for members in labels.values() for image in members.values()]
    if len({image.shape[:2] for image in decoded}) > 1 or decoded[0].shape[0] != decoded[0].shape[1]:
        raise DataError(f"--data {path}: images must be square and of one size; give --image-size to resize them")
    grey = all(image.ndim == 2 for image in decoded)
    classes = sorted(images["train"])
    arrays: dict[str, np.ndarray] = {"classes": np.array(classes)}
    for split, labels in images.items():
        ordered = [(label, image) for label in sorted(labels) for _, image in sorted(labels[label].items())]
        pixels = [image if grey or image.ndim == 3 else np.stack([image] * 3, axis=-1) for _, image in ordered]
        stacked = np.stack(pixels)
        arrays[f"{split}_x"] = stacked[:, None] if grey else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))
        arrays[f"{split}_y"] = np.array([classes.index(label) for label, _ in ordered], np.int64)
    return arrays


def _check_classes(path: Path, images: dict[str, dict[str, dict[str, Any]]]) -> None:
    for split, labels in images.items():
        if not labels:
            raise DataError(f"--data {path}: no folder {split}/ with images of each class in it; it must hold {LAYOUT}")
        for label, members in sorted(labels.items()):
            if not members:
                raise DataError(
                    f"--data {path}: {split}/{label} holds no image (jpg, png); fill the folder or remove it"
                )
    if unknown := sorted(images["test"].keys() - images["train"].keys()):
        raise DataError(f"--data {path}: no training images of {', '.join(unknown)}, which test/ has; needs {LAYOUT}")


@dataclass(frozen=True)
class Entry:
    """An image, or with no file the folder of a class."""

    split: str
    label: str
    name: str = ""
    file: BinaryIO | None = None


def _entries(path: Path) -> Iterator[Entry]:
    """What is in a folder or a tar. A tar is read in its own order: xz cannot seek back cheaply."""
    if path.is_dir():
        for file in path.rglob("*"):
            name = file.relative_to(path).as_posix()
            if file.is_dir() and (found := _place(f"{name}/")):
                yield Entry(*found)
            elif found := _place(name):
                with file.open("rb") as stream:
                    yield Entry(*found, stream)
        return
    try:
        archive = tarfile.open(path)  # noqa: SIM115  # what opening raises is told apart from what reading does
    except (*DAMAGED, OSError) as error:
        raise DataError(
            f"--data {path}: not a tar file; give a folder or a tar file with {LAYOUT} ({error})"
        ) from error
    try:
        with archive:
            for member in archive:
                if member.isdir() and (found := _place(f"{member.name}/")):
                    yield Entry(*found)
                elif member.isfile() and (found := _place(member.name)):
                    yield Entry(*found, BytesIO(archive.extractfile(member).read()))  # type: ignore[union-attr]
            _check_end(archive)
    except DAMAGED as error:
        raise DataError(f"--data {path}: the archive is damaged or cut short ({error}); fetch it again") from error


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise ReadError if no end was found: of an archive cut short ``tarfile`` gives what is there and says nothing."""
    stream = archive.fileobj
    assert stream is not None
    found = stream.tell() == archive.offset + tarfile.BLOCKSIZE  # the block of zeros that ends an archive, or no header
    if not found or any(stream.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError("it has no end")


def _place(name: str) -> tuple[str, str, str] | None:
    """(split, class, file name) of ``.../split/class/name``; the name is empty for the class folder itself."""
    parts = name.split("/")
    if len(parts) < 3 or parts[-3] not in ("train", "test") or any(part.startswith(".") for part in parts[-2:]):
        return None
    return (parts[-3], parts[-2], parts[-1]) if not parts[-1] or name.lower().endswith(IMAGE_SUFFIXES) else None


def _decode(entry: Entry, path: Path, image_size: int | None) -> np.ndarray:
    from PIL import Image

    assert entry.file is not None
    try:
        opened = Image.open(entry.file)
        image: Image.Image = opened if opened.mode in ("L", "RGB") else opened.convert("RGB")
        if image_size is not None and image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        return np.asarray(image)
    # Of a broken file PIL raises OSError, ValueError, SyntaxError, struct.error and what its decoders raise.
    except Exception as error:
        place = f"{entry.split}/{entry.label}/{entry.name}"
        raise DataError(f"--data {path}: cannot decode {place}; replace it or remove it ({error})") from error
