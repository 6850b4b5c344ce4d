import errno
import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from looksam.lab import data
from looksam.lab.cache import cache_folder, cached_arrays, cached_files
from looksam.lab.cli import main
from looksam.lab.config import DataConfig
from looksam.lab.data import DataError, load_dataset, noisy_labels, read_idx

from .runs import write_pets


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LOOKSAM_CACHE_DIR", raising=False)


@pytest.fixture
def folder(tmp_path):
    """Two classes; 3 training and 2 test images of 6x6 each, one of them grey, with distinct colours."""
    write_pets(tmp_path, 6, train=3, test=2)
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "pets"


def tensors(dataset):
    return dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y


def test_digits_split_is_fixed_and_stratified():
    first, second = load_dataset(DataConfig(), 0), load_dataset(DataConfig(), 1)
    assert first.train_x.shape == (1000, 1, 8, 8)
    assert first.test_x.shape == (797, 1, 8, 8)
    assert first.train_x.dtype == torch.uint8
    assert int(first.train_x.max()) == 255
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))
    assert int(first.train_y.bincount().min()) >= 96
    together = torch.cat([first.train_x, first.test_x]).double().mean()
    from sklearn.datasets import load_digits

    assert float(together) == pytest.approx(load_digits().images.mean() * 255 / 16, abs=0.5)


def test_statistics_normalise_the_training_images():
    digits = load_dataset(DataConfig(), 0)
    mean, std = digits.statistics()
    x = (digits.train_x.float() / 255 - mean) / std
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1, abs=1e-5)


def test_folder_contents_and_order(folder):
    pets = load_dataset(DataConfig(str(folder)), 0)
    assert pets.classes == ("cat", "dog")
    assert pets.train_y.tolist() == [0, 0, 0, 1, 1, 1]
    assert pets.test_y.tolist() == [0, 0, 1, 1]
    assert pets.train_x.shape == (6, 3, 6, 6)
    stored = np.asarray(Image.open(folder / "train" / "dog" / "2.png"))
    assert np.array_equal(pets.train_x[5].permute(1, 2, 0).numpy(), stored)


@pytest.mark.parametrize("mode", ["", "gz", "xz"])
def test_tar_gives_the_same_arrays_as_the_folder(folder, tmp_path, mode):
    path = tmp_path / f"pets.tar{'.' * bool(mode)}{mode}"
    with tarfile.open(path, f"w:{mode}") as archive:
        files = [f for f in folder.rglob("*") if f.is_file()]
        for file in sorted(files, reverse=True):  # an order that is not the one wanted
            archive.add(file, "some/leading/folders/" + str(file.relative_to(folder)))
    from_tar, from_folder = load_dataset(DataConfig(str(path)), 0), load_dataset(DataConfig(str(folder)), 0)
    assert all(torch.equal(a, b) for a, b in zip(tensors(from_tar), tensors(from_folder), strict=True))
    assert from_tar.classes == from_folder.classes


def test_cache_is_used_until_a_file_changes(folder, monkeypatch):
    before = load_dataset(DataConfig(str(folder)), 0)
    assert len(list(cache_folder().glob("*.npz"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode_images", lambda *_: pytest.fail("decoded again"))
        again = load_dataset(DataConfig(str(folder)), 0)
    assert torch.equal(before.train_x, again.train_x)

    changed = folder / "train" / "cat" / "0.png"
    Image.new("L", (6, 6), 7).save(changed)
    os.utime(changed, (1, 1))
    assert int(load_dataset(DataConfig(str(folder)), 0).train_x[0].max()) == 7


def test_image_size_resizes(folder):
    Image.new("RGB", (5, 6)).save(folder / "test" / "cat" / "odd.png")
    with pytest.raises(DataError, match="--image-size"):
        load_dataset(DataConfig(str(folder)), 0)
    assert load_dataset(DataConfig(str(folder), image_size=4), 0).train_x.shape == (6, 3, 4, 4)


def test_grey_folder_has_one_channel(folder):
    for file in folder.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    assert load_dataset(DataConfig(str(folder)), 0).train_x.shape == (6, 1, 6, 6)


def test_test_class_without_training_images(folder):
    (folder / "test" / "cow").mkdir()
    Image.new("RGB", (6, 6)).save(folder / "test" / "cow" / "0.png")
    with pytest.raises(DataError, match=r"no training images of cow, .* needs train/<class>"):
        load_dataset(DataConfig(str(folder)), 0)


def test_missing_and_broken_sources_name_the_remedy(tmp_path, folder):
    with pytest.raises(DataError, match="must hold train/<class>"):
        load_dataset(DataConfig(str(tmp_path / "nothing")), 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="train/<class>"):
        load_dataset(DataConfig(str(tmp_path / "empty")), 0)
    (tmp_path / "text").write_text("text")
    with pytest.raises(DataError, match="not a tar file"):
        load_dataset(DataConfig(str(tmp_path / "text")), 0)
    (folder / "train" / "cat" / "0.png").write_bytes(b"no png")
    with pytest.raises(DataError, match=r"cannot decode train/cat/0\.png; replace it"):
        load_dataset(DataConfig(str(folder)), 0)
    assert not list(cache_folder().glob("*"))


def pack(folder, path):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        archive.add(folder, "pets")


@pytest.mark.parametrize("name", ["pets.tar", "pets.tar.gz"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_archive_says_so(folder, tmp_path, name, share):
    pack(folder, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    # an uncompressed tar ends in kilobytes of zeros, which are nobody's loss
    (tmp_path / name).write_bytes(whole[: int(share * len(whole.rstrip(b"\0")))])
    with pytest.raises(DataError, match=r"--data \S+: the archive is damaged or cut short"):
        load_dataset(DataConfig(str(tmp_path / name)), 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_folder_is_named(folder, tmp_path, split, packed):
    (folder / split / "cow").mkdir()
    source = folder
    if packed:
        source = tmp_path / "pets.tar"
        pack(folder, source)
    with pytest.raises(DataError, match=f"{split}/cow holds no image"):
        load_dataset(DataConfig(str(source)), 0)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(folder, split):
    shutil.rmtree(folder / split)
    with pytest.raises(DataError, match=f"no folder {split}/ with images"):
        load_dataset(DataConfig(str(folder)), 0)


def test_hidden_files_and_folders_are_left_out(folder):
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "cat" / "._0.png").write_bytes(b"what another system leaves there")
    assert len(load_dataset(DataConfig(str(folder)), 0).train_y) == 6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(image_size=3), "--image-size 3: digits come in one size"),
        (DataConfig(directory="x"), "--data-dir x: it says where Fashion-MNIST lies"),
    ],
)
def test_options_of_other_sources_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(config, 0)


def write_idx(path, array, compress):
    raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
def test_fashion_mnist_layouts(tmp_path, compress, layout):
    place = tmp_path / layout
    place.mkdir(parents=True, exist_ok=True)
    images = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28)
    for name in data.FASHION_FILES.values():
        array = images if "images" in name else np.array([0, 9, 5], np.uint8)
        write_idx(place / (name + (".gz" if compress else "")), array, compress)
    fashion = load_dataset(DataConfig("fashion-mnist", str(tmp_path)), 0)
    assert torch.equal(fashion.train_x[:, 0], torch.from_numpy(images))
    assert fashion.test_y.tolist() == [0, 9, 5]
    assert len(fashion.classes) == 10


def test_fashion_mnist_missing_names_package_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"dataset-fashion-mnist.*FashionMNIST/raw.*--data-dir DIR"):
        load_dataset(DataConfig("fashion-mnist", str(tmp_path)), 0)


def test_truncated_idx(tmp_path):
    write_idx(tmp_path / "x", np.zeros((2, 2), np.uint8), compress=False)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(DataError, match="not a complete IDX file"):
        read_idx(tmp_path / "x")


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 0.999])
def test_label_noise_is_exact_reproducible_and_symmetric(fraction):
    labels = torch.arange(10).repeat(1000)
    noisy = noisy_labels(labels, fraction, 10, seed=3)
    wrong = noisy != labels
    assert int(wrong.sum()) == round(fraction * 10000)
    assert torch.equal(noisy, noisy_labels(labels, fraction, 10, seed=3))
    if fraction:
        assert not torch.equal(noisy, noisy_labels(labels, fraction, 10, seed=4))
        shift = ((noisy - labels) % 10)[wrong].bincount(minlength=10)
        assert shift[0] == 0
        expected = int(wrong.sum()) / 9
        assert ((shift[1:] - expected).abs() < 5 * expected**0.5).all()
    assert torch.equal(labels, torch.arange(10).repeat(1000))


def test_label_noise_leaves_the_test_part_clean():
    clean, noisy = load_dataset(DataConfig(), 0), load_dataset(DataConfig(label_noise=0.4), 0)
    assert torch.equal(clean.test_y, noisy.test_y)
    assert int((clean.train_y != noisy.train_y).sum()) == 400


def test_train_size():
    small = load_dataset(DataConfig(train_size=100, label_noise=0.25), 0)
    assert small.train_x.shape == (100, 1, 8, 8)
    assert torch.equal(small.train_x, load_dataset(DataConfig(train_size=100), 5).train_x)
    clean = load_dataset(DataConfig(train_size=100), 0)
    assert int((small.train_y != clean.train_y).sum()) == 25
    with pytest.raises(ValueError, match="--train-size 2000: digits has 1000"):
        load_dataset(DataConfig(train_size=2000), 0)


def test_image_mode_with_palette_becomes_rgb():
    buffer = io.BytesIO()
    Image.new("P", (4, 4), 3).save(buffer, "PNG")
    assert data._decode(data.Entry("train", "cat", "p.png", buffer), Path(), None).shape == (4, 4, 3)


def test_the_cache_keeps_what_was_used_last_within_its_limit(monkeypatch):
    monkeypatch.setenv("LOOKSAM_CACHE_GB", "2.5e-3")

    def decoded(key):
        calls = []
        array = data.cached_arrays(key, lambda: calls.append(key) or {"x": np.zeros(1_000_000, np.uint8)})["x"]
        assert array.shape == (1_000_000,)
        return bool(calls)

    assert decoded("a")
    assert decoded("b")
    os.utime(cached_files()[0], (1, 1))
    os.utime(cached_files()[1], (2, 2))
    assert not decoded("a")  # now the one used last
    assert decoded("c")
    assert not decoded("a")
    assert decoded("b")
    assert len(cached_files()) == 2
    monkeypatch.setenv("LOOKSAM_CACHE_GB", "0")
    assert decoded("d")
    assert decoded("d")


def test_a_damaged_cache_is_made_again(folder):
    first = load_dataset(DataConfig(str(folder)), 0)
    (file,) = cached_files()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(load_dataset(DataConfig(str(folder)), 0).train_x, first.train_x)
    assert len(cached_files()) == 1


def test_without_a_home_folder_nothing_is_cached(monkeypatch):
    """A user whom the machine does not know, as in many containers."""
    for name in ("LOOKSAM_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert list(cached_arrays("key", lambda: {"x": np.zeros(2)})) == ["x"]
    shown = CliRunner().invoke(main, ["cache"])
    assert shown.exit_code == 1
    assert "LOOKSAM_CACHE_DIR names the cache" in shown.output


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_cache_that_is_only_read_is_used(folder, monkeypatch):
    load_dataset(DataConfig(str(folder)), 0)
    (file,) = cached_files()
    for writes in ("utime", "unlink"):
        monkeypatch.setattr(os, writes, refused)
    monkeypatch.setattr(data, "decode_images", lambda *_: pytest.fail("decoded again"))
    load_dataset(DataConfig(str(folder)), 0)
    monkeypatch.undo()
    assert file.exists()


def refused(*arguments, **named):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_the_cache_command_shows_and_clears(folder):
    load_dataset(DataConfig(str(folder)), 0)
    shown = CliRunner().invoke(main, ["cache"])
    assert shown.output.startswith("1 data set(s), 0.0 MB, in ")
    assert str(cache_folder()) in shown.output
    assert "removed" in CliRunner().invoke(main, ["cache", "--clear"]).output
    assert not cached_files()
    wrong = CliRunner(env={"LOOKSAM_CACHE_GB": "many"}).invoke(main, ["cache"])
    assert wrong.exit_code == 2
    assert "LOOKSAM_CACHE_GB=many: must be a number" in wrong.output


def test_streamed_images_are_those_in_memory(folder):
    whole, streamed = (load_dataset(DataConfig(str(folder), image_size=8, stream=s), 0) for s in (False, True))
    assert streamed.classes == whole.classes
    assert streamed.train_x.shape == whole.train_x.shape
    for ours, theirs in ((streamed.train_x, whole.train_x), (streamed.test_x, whole.test_x)):
        assert torch.equal(ours.decoded(), theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours.split(3), theirs.split(3), strict=True))  # in two processes
    assert torch.equal(streamed.train_y, whole.train_y)
    for ours, theirs in zip(streamed.statistics(), whole.statistics(), strict=True):
        torch.testing.assert_close(ours, theirs)
    configs = [DataConfig(str(folder), image_size=8, stream=s, train_size=4, test_size=3, holdout=0.5) for s in (0, 1)]
    kept, kept_streamed = (load_dataset(config, 0) for config in configs)
    assert torch.equal(kept_streamed.train_x.decoded(), kept.train_x)
    assert torch.equal(kept_streamed.test_x.decoded(), kept.test_x)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig("pets.tar", image_size=8, stream=True), "--stream: .*pets.tar is no folder; unpack it"),
        (DataConfig("pets", stream=True), "--stream needs --image-size"),
        (DataConfig("digits", stream=True), "--stream: digits fits in memory"),
    ],
)
def test_what_cannot_be_streamed_names_the_remedy(folder, tmp_path, monkeypatch, config, message):
    pack(folder, tmp_path / "pets.tar")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((DataError, ValueError), match=message):
        load_dataset(config, 0)


def test_a_broken_streamed_image_is_named(folder):
    (folder / "train" / "dog" / "1.png").write_bytes(b"not an image")
    data = load_dataset(DataConfig(str(folder), image_size=8, stream=True), 0)
    with pytest.raises(DataError, match=r"cannot decode train/dog/1.png; replace it or remove it"):
        data.train_x.decoded()


def test_a_run_with_streamed_images_is_the_same_run(folder, tmp_path):
    """Through the command: its process has processes of its own then."""
    records = []
    for name, options in (("memory", ()), ("streamed", ("--stream",))):
        out = tmp_path / name
        arguments = [
            *("train", "sgd", "--data", folder, "--image-size", 8, "--model", "cnn", "--width", 0.25, "--epochs", 2),
            *("--batch-size", 2, "--device", "cpu", "--threads", 1, "--out", out, *options),
        ]
        result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        epochs = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()[1:]]
        records.append([(e["train_loss"], e["test_loss"]) for e in epochs])
    assert records[0] == records[1]
