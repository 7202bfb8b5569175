"""Sources and splits: what is read from the original formats, and what is said when files are not there."""

import dataclasses
import gc
import gzip
import hashlib
import http.server
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from bnexp.data import mnist
from bnexp.data.cifar10 import CIFAR10
from bnexp.data.dataset import Dataset, Options, Split, channel_moments
from bnexp.data.digits import Digits
from bnexp.data.mnist import MNIST, FashionMNIST
from bnexp.errors import UserError

BYTES = torch.arange(36, dtype=torch.uint8).view(4, 1, 3, 3)
IDX_NAMES = [name for pair in mnist.PAIRS for name in pair]
REAL = Path(os.environ.get("BNEXP_DATA") or "/nonexistent")
needs_mnist = pytest.mark.skipif(
    not (REAL / "MNIST/raw/train-images-idx3-ubyte.gz").is_file(),
    reason="set BNEXP_DATA to a folder that holds MNIST/raw/*.gz",
)


def idx(array, magic=None):
    header = bytes((0, 0, 8, array.ndim)) if magic is None else magic
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + sizes + array.astype(np.uint8).tobytes()


def write_mnist(root, num_train=40, num_test=12, gzipped=True, name="MNIST"):
    """Random images whose first pixel is their label and whose second is their number."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, num_images in (("train", num_train), ("t10k", num_test)):
        images = rng.integers(0, 256, (num_images, 28, 28))
        labels = rng.integers(0, 10, num_images)
        images[:, 0, 0], images[:, 0, 1] = labels, np.arange(num_images)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            path = folder / f"{part}-{kind}-ubyte"
            if gzipped:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return folder


def python2_pickle(data, labels):
    """The bytes that Python 2 wrote for {"data": uint8 array, "labels": list}, as in the original files."""

    def text(value):
        return b"T" + len(value).to_bytes(4, "little") + value  # BINSTRING, which Python 3 no longer writes

    def number(value):
        return b"J" + value.to_bytes(4, "little", signed=True)

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
    array += number(0) + b"\x85" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = b"(" + b"".join(map(number, data.shape)) + b"t"
    array += b"(" + number(1) + shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    items = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + items + b"u."


def write_cifar10(root, num_images=6):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data = rng.integers(0, 256, (num_images, 3072)).astype(np.uint8)
        labels = rng.integers(0, 10, num_images).tolist()
        data[:, 0] = labels
        (folder / name).write_bytes(python2_pickle(data, labels))
    return folder


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def rows(split):
    return {image.numpy().tobytes() for image in split.images}


@pytest.fixture
def closed_port():
    """A port of this machine at which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield s.getsockname()[1]  # bound but not listening: connections are refused


@pytest.fixture
def server(tmp_path_factory):
    """A web server on this machine: (its address, its folder)."""
    folder = tmp_path_factory.mktemp("served")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/", folder
        running.shutdown()
        thread.join()


@pytest.fixture
def mirrors(monkeypatch):
    """Sets where MNIST is downloaded from and what its checksums are."""
    import torchvision.datasets

    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def set_mirrors(*addresses, folder=None):
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", list(addresses))
        if folder is not None:
            files = [(f"{name}.gz", (folder / f"{name}.gz").read_bytes()) for name in IDX_NAMES]
            resources = [(name, hashlib.md5(content).hexdigest()) for name, content in files]
            monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)

    return set_mirrors


# Splits


@pytest.mark.parametrize(
    ("valid", "expected"),
    [(0, (40, 0)), (0.0, (40, 0)), (7, (33, 7)), (0.25, (30, 10)), (0.001, (39, 1)), (39, (1, 39))],
)
def test_validation_images_are_taken_from_the_training_images(tmp_path, valid, expected):
    write_mnist(tmp_path)
    dataset = MNIST(root=tmp_path, valid=valid).load()
    assert (len(dataset.train), len(dataset.valid)) == expected
    assert len(dataset.test) == 12
    assert len(rows(dataset.train) | rows(dataset.valid)) == 40  # disjoint and complete
    for split in (dataset.train, dataset.valid, dataset.test):
        assert torch.equal(split.images[:, 0, 0, 0].long(), split.labels)  # labels went with their images


def test_the_split_is_random_but_always_the_same(tmp_path):
    write_mnist(tmp_path)
    torch.manual_seed(1)
    first = MNIST(root=tmp_path, valid=10).load()
    torch.manual_seed(2)
    second = MNIST(root=tmp_path, valid=10).load()
    assert torch.equal(first.valid.images, second.valid.images)
    assert torch.equal(first.train.images, second.train.images)
    numbers = first.valid.images[:, 0, 0, 1].tolist()
    assert numbers not in (list(range(10)), list(range(30, 40)))


def test_loading_leaves_the_global_generator_alone(tmp_path):
    write_mnist(tmp_path)
    before = torch.random.get_rng_state()
    MNIST(root=tmp_path, valid=10, limit=5).load()
    Digits().load()
    assert torch.equal(before, torch.random.get_rng_state())


def test_limit_caps_each_split_at_the_same_random_images(tmp_path):
    write_mnist(tmp_path)
    whole, some = (MNIST(root=tmp_path, valid=10, limit=limit).load() for limit in (None, 8))
    for name in ("train", "valid", "test"):
        kept, everything = getattr(some, name), getattr(whole, name)
        assert len(kept) == 8 and rows(kept) < rows(everything)
        assert not torch.equal(kept.images, everything.images[:8])  # a sorted set keeps all its classes
    fewer = MNIST(root=tmp_path, valid=10, limit=4).load()
    assert rows(fewer.train) < rows(some.train)
    assert len(MNIST(root=tmp_path, valid=10, limit=11).load().valid) == 10
    assert torch.equal(some.mean, channel_moments(some.train.images)[0])  # of the images that are trained on


@pytest.mark.parametrize("valid", [40, 41, 0.999])
def test_validation_must_leave_something_to_train_on(tmp_path, valid):
    write_mnist(tmp_path)
    with pytest.raises(UserError, match=rf"data\.valid={valid}: takes 4\d of 40 .* a count below 40"):
        MNIST(root=tmp_path, valid=valid).load()


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("valid", [-1, 1.0, 1.5, -0.1, float("nan"), "many", True, None]),
        ("limit", [0, -3, 2.5, True, "all"]),
        ("augment", ["flips", None, 1]),
        ("normalize", ["yes", 1, None]),
        ("size", [0, -28, 28.0, True, "large"]),
    ],
)
def test_an_option_that_cannot_be_is_named(option, values):
    for value in values:
        for source in (Digits, MNIST, CIFAR10):
            with pytest.raises(UserError, match=rf"^data\.{option}={value}: .*(give|choose) "):
                source(**{option: value})


# Preparing


def make_dataset(images, in_shape=None, normalize=True):
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    moments = channel_moments(images)
    in_shape = in_shape or images.shape[1:]
    return Dataset("made", split, split, split, ("a", "b"), in_shape, *moments, normalize=normalize)


def random_images(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_mean_and_std_are_those_of_the_training_images():
    images = random_images(5000, 3, 6, 4)  # more than one chunk
    images[:, 1] //= 2
    images[4096:, 2] = 7  # the chunks differ
    x = images.double() / 255
    mean, std = channel_moments(images)
    # float32 results of exact sums: rounding of 2^-24 relative
    torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(std.double(), x.std((0, 2, 3), correction=0), rtol=1e-7, atol=0)


def test_normalized_training_images_have_zero_mean_and_unit_variance():
    images = random_images(300, 3, 6, 4) // torch.tensor([1, 2, 5], dtype=torch.uint8).view(3, 1, 1)
    x = make_dataset(images).prepare(images)
    assert x.dtype == torch.float32
    # 7,200 values each rounded to 2^-24 of at most 2
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)


def test_without_normalization_values_run_from_0_to_1():
    images = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    x = make_dataset(images, normalize=False).prepare(images)
    torch.testing.assert_close(x.flatten(), torch.arange(256) / 255, rtol=1e-6, atol=0)  # float32 rounding
    assert x.min() == 0 and x.max() == 1


def test_a_constant_channel_does_not_divide_by_zero():
    images = torch.full((4, 1, 3, 3), 255, dtype=torch.uint8)
    x = make_dataset(images).prepare(images)
    assert x.abs().max() < 1e-3  # (1 - 1) / (1/255), a float32 rounding error times 255


def test_preparing_leaves_the_stored_images_alone():
    images = random_images(4, 1, 3, 3)
    before = images.clone()
    make_dataset(images).prepare(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("size", [7, 21])
@pytest.mark.parametrize("normalize", [True, False])
def test_square_images_are_resized_bilinearly(size, normalize):
    images = random_images(5, 3, 14, 14)
    x = make_dataset(images, (3, size, size), normalize).prepare(images)
    plain = make_dataset(images, normalize=normalize).prepare(images)
    expected = torch.nn.functional.interpolate(plain, size=(size, size), mode="bilinear", antialias=size < 14)
    assert x.shape == (5, 3, size, size)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)  # the same operation; atol for another order


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("shape", "rows", "columns"), [((6, 12), (6, 18), (0, 24)), ((12, 6), (0, 24), (6, 18))])
def test_other_aspect_ratios_are_kept_and_padded_with_black(shape, rows, columns, normalize):
    images = torch.full((2, 3, *shape), 200, dtype=torch.uint8)
    images[0] = 100
    dataset = make_dataset(images, (3, 24, 24), normalize)
    x = dataset.prepare(images)
    black = dataset.prepare(torch.zeros_like(images))
    assert torch.equal(black, black[0, 0, 0, 0].expand_as(black))
    inside = torch.zeros(24, 24, dtype=torch.bool)
    inside[rows[0] : rows[1], columns[0] : columns[1]] = True
    assert torch.equal((x[1, 0] - black[1, 0]).abs() > 1e-3, inside)
    plain = make_dataset(images, normalize=normalize).prepare(images)
    # interpolating equal values: rounding only
    torch.testing.assert_close(x[:, :, inside].mean(2), plain.mean((2, 3)), rtol=1e-5, atol=1e-5)


def test_a_dataset_moves_with_all_its_tensors():
    dataset = make_dataset(random_images(4, 1, 3, 3)).to("meta")
    splits = (dataset.train, dataset.valid, dataset.test)
    tensors = [tensor for split in splits for tensor in (split.images, split.labels)]
    assert {t.device.type for t in [*tensors, dataset.mean, dataset.std]} == {"meta"}
    assert dataset.device.type == "meta"
    assert dataset.prepare(dataset.train.images).device.type == "meta"


# Digits


def test_digits_are_the_real_ones_at_any_size():
    from sklearn.datasets import load_digits

    stored = Digits(size=8).load()
    parts = [stored.train, stored.valid, stored.test]
    assert [len(part) for part in parts] == [1293, 144, 360]
    pixels = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    originals = sorted(image.tobytes() for image in pixels)
    assert sorted(i.numpy().tobytes() for part in parts for i in part.images) == originals
    counts = sum(part.labels.bincount(minlength=10) for part in parts)
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # load_digits().target
    for size in (28, 5):
        source = Digits(size=size)
        dataset = source.load()
        assert source.in_shape == dataset.in_shape == dataset.train.images.shape[1:] == (1, size, size)
        assert dataset.train.images.dtype == torch.uint8
        small = stored.train.images.float()
        expected = torch.nn.functional.interpolate(small, (size, size), mode="bilinear", antialias=size < 8)
        # of 255: the originals and the result are rounded once each, by half a level at most
        assert (dataset.train.images - expected).abs().max() <= 1.001


def test_the_test_split_does_not_depend_on_validation():
    assert torch.equal(Digits(valid=0).load().test.images, Digits(valid=500).load().test.images)


# MNIST and Fashion-MNIST


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("source", [MNIST, FashionMNIST])
def test_files_in_torchvisions_layout_are_read(tmp_path, source, gzipped):
    folder = write_mnist(tmp_path, gzipped=gzipped, name=source.__name__)
    dataset = source(root=tmp_path, valid=0, size=32).load()
    assert (dataset.name, dataset.in_shape, len(dataset.class_names)) == (source.name, (1, 32, 32), 10)
    assert dataset.train.images.shape == (40, 1, 28, 28) and dataset.test.images.shape == (12, 1, 28, 28)
    assert dataset.train.images[:, 0, 0, 1].tolist() == list(range(40))
    path = next(folder.glob("t10k-images*"))
    content = gzip.decompress(path.read_bytes()) if gzipped else path.read_bytes()
    assert dataset.test.images.numpy().tobytes() == content[16:]


@needs_mnist
def test_the_real_mnist():
    dataset = MNIST(root=REAL).load()
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [55_000, 5_000, 10_000]
    assert dataset.in_shape == (1, 28, 28)
    # .1307 and .3081 are those of all 60,000; 55,000 at random differ by their standard error, about 3e-4
    assert dataset.mean.item() == pytest.approx(0.1307, abs=1e-3)
    assert dataset.std.item() == pytest.approx(0.3081, abs=1e-3)
    whole = MNIST(root=REAL, valid=0).load()
    assert (round(whole.mean.item(), 4), round(whole.std.item(), 4)) == (0.1307, 0.3081)
    assert dataset.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def break_gzip(path):
    path.write_bytes(path.read_bytes()[:-20])


def break_bytes(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def replace_with(content):
    return lambda path: path.write_bytes(gzip.compress(content))


ZEROS = np.zeros((40, 28, 28))


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("train-images-idx3-ubyte.gz", break_gzip, "cannot be unzipped"),
        ("t10k-images-idx3-ubyte.gz", break_bytes, "cannot be unzipped"),
        ("t10k-labels-idx1-ubyte.gz", lambda path: path.write_bytes(b"<html>404"), "cannot be unzipped"),
        ("t10k-labels-idx1-ubyte.gz", lambda path: path.write_bytes(b""), "does not begin as an idx"),
        ("train-images-idx3-ubyte.gz", replace_with(idx(ZEROS, b"\0\0\x0d\3")), "does not begin as an idx"),
        ("train-images-idx3-ubyte.gz", replace_with(idx(ZEROS)[:10]), "does not begin as an idx"),
        ("train-images-idx3-ubyte.gz", replace_with(idx(ZEROS)[:-5]), "31360 bytes .40x28x28. .*31355"),
        ("train-images-idx3-ubyte.gz", replace_with(idx(ZEROS) + b"\0"), "31360 bytes .40x28x28. and holds more"),
        ("train-images-idx3-ubyte.gz", replace_with(idx(ZEROS)[:4] + b"\x7f" * 12), "announces .* more than 268,"),
        ("train-images-idx3-ubyte.gz", replace_with(idx(np.zeros((40, 28, 27)))), "40x28x27, not images"),
        ("train-images-idx3-ubyte.gz", replace_with(idx(np.zeros((0, 28, 28)))), "0x28x28, not images"),
        ("train-labels-idx1-ubyte.gz", replace_with(idx(np.zeros(39))), "39 labels for the 40 images"),
        ("t10k-labels-idx1-ubyte.gz", replace_with(idx(np.full(12, 10))), "the label 10"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong_and_what_to_do(tmp_path, name, harm, said):
    folder = write_mnist(tmp_path)
    harm(folder / name)
    with pytest.raises(UserError, match=rf"^{folder / name}: damaged .*{said}.*delete it and run again"):
        MNIST(root=tmp_path, valid=5).load()


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_mnist(tmp_path)

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("bnexp.data.mnist.gzip.open", refuse)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz: cannot be read \(Permission denied\)"):
        MNIST(root=tmp_path).load()


# Where the files are looked for


def test_root_is_the_option_or_the_environment_or_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("BNEXP_DATA", str(tmp_path / "data"))
    assert MNIST(root="~/pictures").folder == tmp_path / "home/pictures/MNIST/raw"
    assert MNIST().folder == tmp_path / "data/MNIST/raw"
    monkeypatch.delenv("BNEXP_DATA")
    assert FashionMNIST().folder == tmp_path / "cache/bnexp/FashionMNIST/raw"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert CIFAR10().folder == tmp_path / "home/.cache/bnexp/cifar-10-batches-py"


@pytest.mark.parametrize("source", [MNIST, FashionMNIST, CIFAR10])
def test_a_root_that_is_a_file_is_an_error(tmp_path, monkeypatch, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data\.root=.*/file: a file; give the folder"):
        source(root=tmp_path / "file")
    monkeypatch.setenv("BNEXP_DATA", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^BNEXP_DATA=.*/file: a file; give the folder"):
        source()


# Downloading


def test_without_network_the_error_says_what_was_looked_for_and_offers_digits(tmp_path, mirrors, closed_port):
    mirrors(f"http://127.0.0.1:{closed_port}/", f"http://localhost:{closed_port}/")
    with pytest.raises(UserError) as caught:
        MNIST(root=tmp_path / "new/root").load()
    message = str(caught.value)
    assert everything_in(tmp_path) == list(tmp_path.iterdir()) == []
    assert "no network" in message and "Connection refused" in message and "data=digits" in message
    assert str(tmp_path / "new/root/MNIST/raw") in message
    assert all(f"{name}[.gz]" in message for name in IDX_NAMES)
    assert f"127.0.0.1:{closed_port}" in message and f"localhost:{closed_port}" in message  # both were tried
    assert "labels without images" not in message and "images without labels" not in message


@pytest.mark.parametrize(
    ("lost", "said"), [("images-idx3", "labels without images"), ("labels-idx1", "images without labels")]
)
def test_half_of_a_pair_is_named_as_such(tmp_path, mirrors, closed_port, lost, said):
    mirrors(f"http://127.0.0.1:{closed_port}/")
    (write_mnist(tmp_path) / f"t10k-{lost}-ubyte.gz").unlink()
    with pytest.raises(UserError, match=rf"looked in .* for t10k-{lost}-ubyte\[\.gz\] \({said}: t10k-"):
        MNIST(root=tmp_path).load()


def test_missing_files_are_downloaded_once(tmp_path, mirrors, server, capsys):
    address, served = server
    files = write_mnist(served)
    mirrors("http://127.0.0.1:9/", f"{address}MNIST/raw/", folder=files)  # the first mirror is down
    dataset = MNIST(root=tmp_path / "new", valid=5).load()
    assert len(dataset.train) == 35
    assert everything_in(tmp_path / "new") == sorted(f"MNIST/raw/{name}" for name in IDX_NAMES)
    told = capsys.readouterr().err
    assert told.startswith(f"data=mnist: downloading into {tmp_path / 'new/MNIST/raw'}\n")
    assert "100" in told  # percent; the form is torchvision's
    mirrors()
    MNIST(root=tmp_path / "new", valid=5).load()
    assert capsys.readouterr().err == ""


def test_a_download_leaves_the_files_that_were_there_as_they_are(tmp_path, mirrors, server):
    address, served = server
    mirrors(f"{address}MNIST/raw/", folder=write_mnist(served))
    folder = write_mnist(tmp_path, num_test=9)
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(MNIST(root=tmp_path, valid=5).load().test) == 9
    assert {path.name for path in folder.iterdir()} == {*before, "train-labels-idx1-ubyte"}
    assert all((folder / name).read_bytes() == content for name, content in before.items())


def test_a_download_with_a_wrong_checksum_is_never_taken_for_a_file(tmp_path, mirrors, server):
    address, served = server
    files = write_mnist(served)
    mirrors(f"{address}MNIST/raw/", folder=files)
    break_gzip(files / "train-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz: .*File not found or corrupted"):
        MNIST(root=tmp_path).load()
    assert everything_in(tmp_path) == []


def test_an_interrupted_download_leaves_nothing_behind(tmp_path, mirrors, server, monkeypatch):
    from torchvision.datasets import utils

    address, served = server
    mirrors(f"{address}MNIST/raw/", folder=write_mnist(served))

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "tqdm", interrupt)  # when the file is open
    with pytest.raises(KeyboardInterrupt):
        MNIST(root=tmp_path).load()
    assert everything_in(tmp_path) == []
    assert socket.getdefaulttimeout() is None


def test_a_mirror_that_does_not_have_the_file_is_named(tmp_path, mirrors, server):
    address, _ = server
    mirrors(address)
    with pytest.raises(UserError, match=f"Tried {address}, got: HTTP Error 404: File not found") as caught:
        MNIST(root=tmp_path).load()
    assert "\n" not in str(caught.value)
    del caught
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # torchvision leaves the answer of the server open
        gc.collect()


def test_a_server_that_says_nothing_is_given_up(tmp_path, mirrors, monkeypatch):
    monkeypatch.setattr("bnexp.data.download.TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirrors(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        start = time.monotonic()
        with pytest.raises(UserError, match=r"no network\? .*timed out"):
            MNIST(root=tmp_path).load()
        assert time.monotonic() - start < 5  # far above 0.1 s, far below any default


def test_a_folder_that_cannot_be_written_is_named(tmp_path, mirrors, server):
    address, served = server
    mirrors(f"{address}MNIST/raw/", folder=write_mnist(served))
    (tmp_path / "MNIST").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .* into .*MNIST/raw .* with data\.root="):
        MNIST(root=tmp_path).load()


def test_a_full_disk_is_named(tmp_path, mirrors, server, monkeypatch):
    from torchvision.datasets import utils

    address, served = server
    mirrors(f"{address}MNIST/raw/", folder=write_mnist(served))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils, "_urlretrieve", full)
    with pytest.raises(UserError, match=r"cannot write .*\(No space left on device\); free some space"):
        MNIST(root=tmp_path).load()
    assert everything_in(tmp_path) == []


def test_files_that_are_there_are_read_without_torchvision(tmp_path):
    write_mnist(tmp_path)
    write_cifar10(tmp_path)
    code = (
        "import sys; from bnexp.data.mnist import MNIST; from bnexp.data.cifar10 import CIFAR10; "
        "[source(root=sys.argv[1], valid=4).load() for source in (MNIST, CIFAR10)]; print('torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# CIFAR-10


def test_cifar10_pickles_of_python_2_are_read(tmp_path):
    folder = write_cifar10(tmp_path)
    source = CIFAR10(root=tmp_path, valid=4)
    dataset = source.load()
    assert source.in_shape == dataset.in_shape == (3, 32, 32)
    assert dataset.class_names[0] == "airplane" and dataset.class_names[9] == "truck"
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [26, 4, 6]
    assert torch.equal(dataset.train.images[:, 0, 0, 0].long(), dataset.train.labels)
    whole = CIFAR10(root=tmp_path, valid=0).load().train.images
    content = (folder / "data_batch_2").read_bytes().replace(b"numpy.core", b"numpy._core")  # its name today
    original = pickle.loads(content, encoding="latin1")
    assert np.array_equal(whole[6:12].numpy(), original["data"].reshape(6, 3, 32, 32))


@pytest.mark.parametrize("protocol", [3, 4])
def test_cifar10_pickles_of_python_3_are_read_too(tmp_path, protocol):
    folder = write_cifar10(tmp_path)
    data = np.full((6, 3072), 9, dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": data, b"labels": [1] * 6}, protocol=protocol))
    dataset = CIFAR10(root=tmp_path, valid=4).load()
    assert (dataset.test.images == 9).all() and dataset.test.labels.tolist() == [1] * 6


def test_a_pickle_runs_nothing(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    folder = write_cifar10(tmp_path)
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Harmful(), "labels": []}))
    with pytest.raises(UserError, match=r"data_batch_3: damaged .*mkdir.*delete it and run again"):
        CIFAR10(root=tmp_path).load()
    assert not (tmp_path / "harm").exists()


PIXELS = np.zeros((6, 3072), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no pickle"),
        (python2_pickle(PIXELS, range(6))[:-900], "no pickle"),
        (b"<html>404", "no pickle"),
        (pickle.dumps([1, 2]), "no pickle with data and labels"),
        (pickle.dumps({"data": PIXELS}), "no pickle with data and labels"),
        (python2_pickle(PIXELS[:, :3000].copy(), range(6)), "not bytes of 3x32x32 images"),
        (pickle.dumps({"data": PIXELS.astype(np.float64), "labels": [0] * 6}), "not bytes of 3x32x32 images"),
        (pickle.dumps({"data": [1, 2], "labels": [0] * 2}), "not bytes of 3x32x32 images"),
        (python2_pickle(PIXELS, range(5)), "5 labels for 6 images"),
        (python2_pickle(PIXELS[:0], []), "0 labels for 0 images"),
        (python2_pickle(PIXELS, [0, 1, 2, 3, 4, 10]), "labels outside 0 to 9"),
        (python2_pickle(PIXELS, [0, 1, 2, 3, 4, -1]), "labels outside 0 to 9"),
    ],
)
def test_a_damaged_cifar10_file_is_named(tmp_path, content, said):
    path = write_cifar10(tmp_path) / "data_batch_4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: damaged .*{said}.*delete it and run again"):
        CIFAR10(root=tmp_path, valid=4).load()


def pack_cifar10(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname="cifar-10-batches-py")


@pytest.fixture
def cifar10_address(monkeypatch):
    import torchvision.datasets

    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def set_address(address, archive=None):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", address)
        if archive is not None:
            checksum = hashlib.md5(archive.read_bytes()).hexdigest()
            monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", checksum)

    return set_address


def test_cifar10_is_downloaded_and_unpacked(tmp_path, server, cifar10_address):
    address, served = server
    archive = served / "cifar-10-python.tar.gz"
    pack_cifar10(write_cifar10(served), archive)
    cifar10_address(address + archive.name, archive)
    dataset = CIFAR10(root=tmp_path / "new", valid=4).load()
    assert len(dataset.train) == 26
    assert len(everything_in(tmp_path / "new")) == 6  # no archive


def test_a_cifar10_archive_that_is_there_is_unpacked_without_network(tmp_path, closed_port, cifar10_address):
    folder, archive = write_cifar10(tmp_path), tmp_path / "cifar-10-python.tar.gz"
    pack_cifar10(folder, archive)
    cifar10_address(f"http://127.0.0.1:{closed_port}/", archive)
    (folder / "data_batch_5").unlink()
    assert len(CIFAR10(root=tmp_path, valid=4).load().train) == 26
    assert archive.is_file()


def test_a_damaged_cifar10_archive_is_not_unpacked(tmp_path, closed_port, cifar10_address):
    folder, archive = write_cifar10(tmp_path), tmp_path / "cifar-10-python.tar.gz"
    pack_cifar10(folder, archive)
    cifar10_address(f"http://127.0.0.1:{closed_port}/", archive)
    whole = archive.read_bytes()
    (folder / "data_batch_5").unlink()
    for content in (whole[: len(whole) // 2], b"<html>404", b"", whole + b"more"):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=rf"for data_batch_5, or {archive}, which is there with a wrong checksum"):
            CIFAR10(root=tmp_path).load()
        assert archive.read_bytes() == content
    assert not (folder / "data_batch_5").exists()


def test_cifar10_without_network_says_what_was_looked_for(tmp_path, closed_port, cifar10_address):
    cifar10_address(f"http://127.0.0.1:{closed_port}/cifar-10-python.tar.gz")
    with pytest.raises(UserError) as caught:
        CIFAR10(root=tmp_path).load()
    message = str(caught.value)
    assert "data=cifar10" in message and "no network" in message and "data=digits" in message
    assert str(tmp_path / "cifar-10-batches-py") in message and "test_batch" in message
    assert f"{tmp_path / 'cifar-10-python.tar.gz'};" in message


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        Options(0.1, None, "none", True).valid = 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"valid": None}, "valid is no bnexp.data.dataset.Split of two tensors"),
        ({"test": (torch.zeros(1), torch.zeros(1))}, "test is no bnexp.data.dataset.Split of two tensors"),
        ({"train": Split(BYTES / 255, torch.arange(4))}, "the train images are torch.float32 (4, 1, 3, 3)"),
        ({"train": Split(BYTES[:, 0], torch.arange(4))}, "the train images are torch.uint8 (4, 3, 3)"),
        ({"train": Split(BYTES.expand(4, 3, 3, 3), torch.arange(4))}, "they must be uint8 (N, 1, H, W)"),
        ({"valid": Split(BYTES, torch.arange(3))}, "the valid labels are torch.int64 (3,); they must be int64 (4,)"),
        ({"valid": Split(BYTES, torch.arange(4).int())}, "the valid labels are torch.int32 (4,)"),
        ({"test": Split(BYTES, torch.arange(4) + 1)}, "the test labels go from 1 to 4; there are 4 classes"),
        ({"train": Split(BYTES[:0], torch.arange(0))}, "there are no training images"),
        ({"std": torch.zeros(1)}, "std is [0.0]; 1 finite numbers are expected, of std above 0"),
        ({"train": Split(BYTES[:, :, :0], torch.arange(4))}, "the train images are 0 pixels high and 3 wide"),
        ({"test": Split(BYTES.to("meta"), torch.arange(4))}, "the test images or labels lie on the meta device"),
        ({"valid": Split(BYTES.to_sparse(), torch.arange(4))}, "the valid images or labels are stored as torch.sparse"),
        ({"normalize": False, "mean": torch.zeros(1, requires_grad=True)}, "the numbers of mean need a gradient"),
        ({"augment": "rot"}, "augment is 'rot'; choose one of none, flip"),
        ({"mean": 0.5}, "mean is 0.5; it must be a tensor of 1 numbers"),
        ({"mean": torch.full((1,), torch.nan)}, "mean is [nan]; 1 finite numbers are expected"),
    ],
)
def test_a_dataset_names_what_is_wrong_with_its_tensors(changes, words):
    split = Split(BYTES, torch.arange(4))
    good = Dataset("d", split, split, split, ("a", "b", "c", "e"), (1, 3, 3), torch.zeros(1), torch.ones(1))
    assert good.fault() is None
    assert words in dataclasses.replace(good, **changes).fault()


# The seed draws the validation images: vary=[seed,split]


def test_the_seed_draws_other_validation_images_of_the_same_ones():
    def drawn(seed):
        source = Digits(valid=0.2)
        source.split_seed = seed
        return source.load()

    fixed, zero, one, again = Digits(valid=0.2).load(), drawn(0), drawn(1), drawn(1)
    assert len({each.fingerprint for each in (zero, one)}) == 2 and one.fingerprint == again.fingerprint
    assert zero.origin == one.origin != "" and fixed.origin == ""
    assert len(one.valid) == len(fixed.valid) and torch.equal(one.test.images, fixed.test.images)
    both = [torch.cat([each.train.images, each.valid.images]).sum(0, dtype=torch.int64) for each in (fixed, one)]
    assert torch.equal(*both), "no image is lost or doubled"
