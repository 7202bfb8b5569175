"""Decoded images in a flat file: decoded once, whole or not there, read as asked, and the same run from there."""

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import Place, faulty
from PIL import Image
from test_data import write_mnist

from bnexp.config.build import build
from bnexp.config.compose import composed
from bnexp.data import folder as folder_module
from bnexp.data import stored
from bnexp.data.batches import Batches
from bnexp.data.dataset import channel_moments, fingerprint_of
from bnexp.data.folder import Folder
from bnexp.data.pairs import Pairs
from bnexp.data.stored import Flat, Stored, decode_once
from bnexp.data.torchvision import Torchvision
from bnexp.engines.graph import captured
from bnexp.errors import RunFailed, UserError

SIZE = 32
JPEGS = Path(os.environ.get("BNEXP_DATA") or "/nonexistent") / "cifar10_jpeg.zip"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of decoded images of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/bnexp/decoded"


@pytest.fixture
def photos(tmp_path):
    """120 random colour pictures in three classes."""
    rng = np.random.default_rng(0)
    for i in range(120):
        path = tmp_path / f"photos/train/{'abc'[i % 3]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def decodes(monkeypatch):
    """The paths of the pictures that are decoded."""
    seen, read = [], folder_module.read_picture
    monkeypatch.setattr(folder_module, "read_picture", lambda path, *rest: seen.append(path) or read(path, *rest))
    return seen


def load(photos, **options):
    return Folder(photos, size=SIZE, **options).load()


def tensors(dataset):
    """All images and labels."""
    splits = (dataset.train, dataset.valid, dataset.test)
    return [each for split in splits for each in (split.images_at(slice(None)), split.labels)]


def same(one, other):
    return all(map(torch.equal, tensors(one), tensors(other)))


# The same run


@pytest.mark.parametrize("options", [[], ["data.augment=crop_flip", "drop_last=false", "norm=group"]])
def test_a_run_from_the_file_is_bit_for_bit_the_resident_run(train, photos, options):
    probes = "probe=[activations,statistics,landscape,features,confusion]"
    every = [f"probe.{name}.every=5" for name in ("activations", "statistics", "landscape", "features", "confusion")]
    common = ["model=lenet", "data=folder", f"data.root={photos}", f"data.size={SIZE}", "batch_size=16", "epochs=2"]
    folders = [train(*common, *options, probes, *every, f"data.resident={each}") for each in ("true", "false")]
    lines = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in folders]
    for line in lines[0] + lines[1]:
        for key in [key for key in line if key.startswith(("time/", "throughput/", "seconds"))]:
            del line[key]
    assert lines[0] == lines[1] and any("loss/valid" in line for line in lines[0])
    states = [torch.load(each / "checkpoint.pt", weights_only=True) for each in folders]
    weights = [[*state["model"].values()] for state in (each.get("run", each) for each in states)]
    assert len(weights[0]) > 5 and all(map(torch.equal, *weights))


def test_folded_runs_from_the_file_are_the_resident_ones(bnexp, photos, tmp_path):
    for resident in ("true", "false"):
        assert bnexp(
            "train", "-m", "seed=0,1", "replicas=2", "model=mlp", "data=folder", f"data.root={photos}", "data.size=8",
            "steps=5", f"data.resident={resident}", f"out={resident}", "quiet=true", "threads=1",
        ) == 0  # fmt: skip
    runs = [sorted((tmp_path / each).glob("*/checkpoint.pt")) for each in ("true", "false")]
    assert len(runs[0]) == len(runs[1]) == 2
    for one, other in zip(*runs, strict=True):
        one, other = (torch.load(each, weights_only=True) for each in (one, other))
        assert all(map(torch.equal, one["model"].values(), other["model"].values()))


@pytest.mark.parametrize("ahead", [1, 2**20])
def test_batches_continue_in_the_middle_of_an_epoch(photos, ahead, monkeypatch):
    monkeypatch.setattr("bnexp.data.batches.AHEAD_BYTES", ahead)
    resident, streamed = (load(photos, resident=each) for each in (True, False))
    assert resident.is_resident and not streamed.is_resident
    one, other = Batches(resident, 8, 3), Batches(streamed, 8, 3)
    for step in range(40):
        if step in (5, 17):
            state, other = other.state_dict(), Batches(streamed, 8, 3)
            other.load_state_dict(state)
        if step == 21:  # as a fold does
            for batches in (one, other):
                batches.advance()
        assert all(map(torch.equal, one.next(), other.next()))


def test_the_fingerprint_and_the_moments_are_those_of_the_tensors_and_are_kept_beside_the_file(photos, monkeypatch):
    datasets = [load(photos, resident=each, limit=50) for each in (False, True)]
    whole = datasets[1]
    expected = fingerprint_of(whole.class_names, whole.train, whole.valid, whole.test)
    assert [each.fingerprint for each in datasets] == [expected] * 2
    mean, std = channel_moments(whole.train.images)
    assert all(torch.equal(each.mean, mean) and torch.equal(each.std, std) for each in datasets)
    other = load(photos, limit=40)
    assert other.fingerprint != expected and not torch.equal(other.mean, mean)
    for name in ("fingerprint_of", "channel_moments"):
        monkeypatch.setattr(f"bnexp.data.dataset.{name}", None)
    assert load(photos, limit=50).fingerprint == expected


# Decoded once


def test_a_second_start_decodes_nothing_whatever_part_it_trains_on(photos, decodes):
    first = load(photos, resident=True)
    assert len(decodes) == 120
    assert same(first, load(photos, resident=False)) and same(first, load(photos))
    assert len(load(photos, limit=10, valid=3, augment="flip").train) == 10
    assert len(decodes) == 120
    Folder(photos, size=16).load()
    assert len(decodes) == 240, "another size is another file"


def test_a_changed_image_is_decoded_anew_and_the_old_file_goes(photos, decodes, cache):
    before = load(photos)
    (old,) = cache.glob("*.u8")
    path = photos / "train/a/0.png"
    Image.new("RGB", (SIZE, SIZE), (1, 2, 3)).save(path)
    after = load(photos)
    (new,) = cache.glob("*.u8")
    assert len(decodes) == 240 and new != old and after.fingerprint != before.fingerprint
    os.utime(path, ns=(1, 1))
    load(photos)
    path.rename(path.with_name("00.png"))
    load(photos)
    assert len(decodes) == 480 and len([*cache.glob("*.u8")]) == 1 and len([*cache.glob("*.json")]) == 1


@pytest.mark.parametrize("harm", ["half", "longer", "notes"])
def test_half_a_file_is_not_used(photos, decodes, cache, harm):
    whole = load(photos)
    (path,) = cache.glob("*.u8")
    content = path.read_bytes()
    if harm == "notes":
        path.with_suffix(".json").write_text('{"a')
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "half" else content + b"x")
    again = load(photos)
    assert same(whole, again) and again.fingerprint == whole.fingerprint
    assert len(decodes) == (120 if harm == "notes" else 240) and path.read_bytes() == content


def test_killed_while_decoding_the_next_start_decodes_anew_and_leaves_nothing_behind(photos, cache, monkeypatch):
    monkeypatch.setattr(stored, "BLOCK_BYTES", 20 * 3 * SIZE**2)
    if not (child := os.fork()):
        read = folder_module.read_picture

        def kill(path, *rest):
            if path.name == "100.png":
                os.kill(os.getpid(), signal.SIGKILL)
            return read(path, *rest)

        folder_module.read_picture = kill
        try:
            load(photos)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not [*cache.glob("*.u8")] and len([*cache.glob(".*.new-*")]) == 1
    assert len(load(photos).train) == 108
    assert len([*cache.glob("*.u8")]) == 1 and not [*cache.glob(".*.new-*")]


def test_jobs_that_start_together_decode_once(photos, cache, tmp_path):
    children, read = [], folder_module.read_picture
    for _ in range(3):
        if not (child := os.fork()):
            with open(tmp_path / "log", "ab", buffering=0) as log:
                folder_module.read_picture = lambda path, *rest: log.write(b".") and read(path, *rest)
                try:
                    load(photos, resident=False)
                    os._exit(0)
                finally:
                    os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert (tmp_path / "log").stat().st_size == 120


@pytest.mark.parametrize("how", ["ENOSPC", "EROFS from then on"])
def test_on_a_full_disk_images_are_decoded_into_the_memory_or_it_is_said(photos, cache, capsys, how):
    whole = load(photos)
    for path in cache.iterdir():
        path.unlink()
    with faulty(Place("write", ".new-", 1, how)):
        found = load(photos)
    assert found.is_resident and same(found, whole) and found.fingerprint == whole.fingerprint
    assert f"bnexp: warning: {cache}: decoded images cannot be kept there (" in capsys.readouterr().err
    if how == "ENOSPC":
        assert not [each for each in cache.iterdir() if each.suffix != ".lock"]
    text = rf"^data\.resident=false: {cache}: .*; (free some space|make it writable again), or name another cache"
    with faulty(Place("write", ".new-", 1, how)), pytest.raises(UserError, match=text):
        load(photos, resident=False)


# Reading


@pytest.fixture
def numbered(tmp_path):
    """A flat file of 3,000 images of 2x1x3 whose values are their numbers, and the tensor of them."""
    images = torch.arange(3000).view(-1, 1, 1, 1).expand(-1, 2, 1, 3).to(torch.uint8).contiguous()
    labels = torch.arange(3000)
    (tmp_path / "n.u8").write_bytes(images.numpy().tobytes() + labels.numpy().tobytes())
    return Flat(tmp_path / "n.u8", images.shape), images


@pytest.mark.parametrize("most", [None, 1, 5, 100])
def test_images_come_in_the_order_asked_for_even_if_reads_stop_early(numbered, monkeypatch, most):
    flat, images = numbered
    preadv, counts = os.preadv, []

    def read(file, buffers, offset):
        total = sum(map(len, buffers))
        if most is None or total <= most:
            counts.append(preadv(file, buffers, offset))
        else:
            part = bytearray(most)
            counts.append(preadv(file, [part], offset))
            for buffer in buffers:
                buffer[: len(part)] = part[: len(buffer)]
                del part[: len(buffer)]
                if not part:
                    break
        return counts[-1]

    monkeypatch.setattr(os, "preadv", read)
    view = Stored(flat, torch.arange(0, 3000, 2))
    for picked in (torch.tensor([7, 3, 3, 1499, 0, 8]), slice(3, 9), torch.tensor([], dtype=torch.int64)):
        counts.clear()
        assert torch.equal(view[picked], images[::2][picked])
        assert sum(counts) == images[::2][picked].numel()
    assert torch.equal(flat.labels(), torch.arange(3000))


def test_nothing_is_read_that_was_not_asked_for_and_neighbours_at_once(numbered, monkeypatch):
    flat, images = numbered
    preadv, counts = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *rest: counts.append(preadv(*rest)) or counts[-1])
    assert torch.equal(Stored(flat).to("cpu"), images)
    assert sum(counts) == images.numel() and len(counts) == 3  # 1,024 buffers each
    counts.clear()
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    chunks = order.split(64)
    assert torch.equal(torch.cat([*Stored(flat).read_ahead(chunks)]), images[order])
    assert sum(counts) == images.numel()


def test_three_batches_are_read_ahead(numbered):
    flat, _ = numbered
    taken = []
    reads = Stored(flat).read_ahead(taken.append(i) or slice(i, i + 1) for i in range(10))
    next(reads)
    assert taken == [0, 1, 2, 3]
    next(reads)
    assert taken == [0, 1, 2, 3, 4]


def test_a_file_that_becomes_shorter_is_an_error(numbered):
    flat, _ = numbered
    os.truncate(flat.path, 600)
    with pytest.raises(RunFailed, match=r"n\.u8: became shorter while it was read"):
        Stored(flat).to("cpu")


@pytest.mark.parametrize(("free", "resident"), [(1, False), (2.1, True), (1.9, False)])
def test_auto_streams_what_half_the_free_memory_does_not_hold(photos, monkeypatch, free, resident):
    num_bytes = 120 * 3 * SIZE**2
    monkeypatch.setattr("bnexp.data.dataset.free_memory", lambda device: int(free * num_bytes))
    assert load(photos).is_resident is resident
    assert load(photos, resident=True).is_resident and not load(photos, resident=False).is_resident


def test_free_memory_is_what_the_system_says():
    assert 2**20 < stored.free_memory(torch.device("cpu")) < 2**50


def test_a_host_tensor_is_read_like_a_file_where_the_device_has_no_room(photos):
    whole = load(photos)
    moved = whole.like(resident=False).to("cpu")
    assert not moved.is_resident and same(moved, whole) and moved.fingerprint == whole.fingerprint
    assert all(map(torch.equal, Batches(moved, 8, 0).next(), Batches(whole, 8, 0).next()))


def test_a_graph_is_not_captured_of_a_run_whose_images_are_not_on_the_device(photos, capsys):
    cfg = composed(["model=mlp", "data=folder", f"data.root={photos}", "data.size=8", "data.resident=false"])
    run = build(cfg)
    assert captured(run) == run.eager_step
    assert "engine=graph: the images are not on the device" in capsys.readouterr().err


@pytest.mark.long
def test_resident_loading_needs_hardly_more_memory_than_the_data(tmp_path):
    """The peak of a process that loads 300 MB from the file that another made, beyond what it had before."""
    code = """if True:
        import torch
        from types import SimpleNamespace
        from bnexp.data.dataset import Options
        from bnexp.data.pairs import load_decoded
        from bnexp.startup import settle
        settle()
        def source():
            return SimpleNamespace(name="x", class_names=("a", "b"), in_shape=(3, 500, 500),
                                   options=Options(0.3, None, "none", True, test=0.1, resident=True))
        def peak():
            (line,) = [each for each in open("/proc/self/status") if each.startswith("VmHWM")]
            return int(line.split()[1]) * 1024  # ru_maxrss would count the process that started this one
        image = torch.zeros(3, 500, 500, dtype=torch.uint8)
        load_decoded(source(), ("small",), [], {"train": 40}, lambda i: (image, 0))  # buffers of a fixed size
        before = peak()
        dataset = load_decoded(source(), ("x",), [1], {"train": 400}, lambda i: (image + i % 100, i % 2))
        print((peak() - before) / 400 / image.numel(), len(dataset.train))
    """
    for _ in range(2):  # the first process makes the file, the second reads it
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ratio, num_train = map(float, done.stdout.split())
    assert num_train == 252 and 0.9 < ratio <= 1.1, done.stdout


# Sets of libraries


def test_a_set_of_torchvision_is_decoded_once(tmp_path, monkeypatch):
    write_mnist(tmp_path, gzipped=False, name="KMNIST")
    dataset = Torchvision("KMNIST", tmp_path).load()
    assert dataset.in_shape == (1, 28, 28) and dataset.class_names[0] == "o"
    assert [len(each) for each in (dataset.train, dataset.valid, dataset.test)] == [36, 4, 12]
    assert dataset.train.images[:, 0, 0, 0].tolist() == dataset.train.labels.tolist()
    source = Torchvision("KMNIST", tmp_path, resident=False)
    monkeypatch.setattr("bnexp.data.pairs.square_of", None)
    assert source.load().fingerprint == dataset.fingerprint
    os.utime(tmp_path / "KMNIST/raw/train-labels-idx1-ubyte", ns=(1, 1))
    with pytest.raises(UserError, match="data.name=KMNIST: train image 0: cannot be decoded"):
        source.load()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": None}, r"^data\.name=None: no data set of torchvision; give one"),
        ({"name": "SVNH"}, r"^data\.name=SVNH: .* \(did you mean SVHN\?\)"),
        ({"name": "FakeData"}, r"^data\.name=FakeData: no data set"),
        ({"name": "FER2013"}, r"^data\.name=FER2013: not in .*, and torchvision cannot download it; copy"),
        ({"name": "EMNIST"}, r"^data\.args={}: EMNIST refuses its arguments: .*'split'"),
        ({"name": "KMNIST", "args": {"zz": 1}}, r"^data\.args={'zz': 1}: KMNIST refuses"),
        ({"name": "KMNIST", "resident": "maybe"}, r"^data\.resident=maybe: choose true .* false .* or auto"),
    ],
)
def test_a_set_that_torchvision_does_not_have_is_named(tmp_path, options, text):
    write_mnist(tmp_path, gzipped=False, name="KMNIST")
    with pytest.raises(UserError, match=text):
        Torchvision(**options, root=str(tmp_path))


def test_a_missing_set_is_downloaded_into_its_place(tmp_path, monkeypatch):
    from torchvision.datasets import KMNIST

    monkeypatch.setattr(KMNIST, "download", lambda self: write_mnist(Path(self.root), gzipped=False, name="KMNIST")
                        if not Path(self.raw_folder).exists() else None)  # fmt: skip
    assert len(Torchvision("KMNIST", str(tmp_path / "here")).load().test) == 12
    assert [each.name for each in (tmp_path / "here").iterdir()] == ["KMNIST"]

    def fail(self):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(KMNIST, "download", fail)
    with pytest.raises(UserError, match="looked in .*there for KMNIST; not there, and downloading failed"):
        Torchvision("KMNIST", str(tmp_path / "there"))


def pairs(splits, classes=("a", "b"), **options):
    defaults = {"size": None, "valid": 0, "test": None, "limit": None, "augment": "none", "normalize": True,
                "channels": None, "resident": "auto"}  # fmt: skip
    return type("Mine", (Pairs,), {"name": "pairs"})(splits, classes, ("pairs", "mine"), list, **defaults | options)


def test_pairs_of_pictures_and_arrays_are_a_dataset():
    grey = [(np.full((6, 4), 10 * i, np.uint8), i % 2) for i in range(10)]
    source = pairs({"train": grey, "test": grey[:2]})
    dataset = source.load()
    assert source.in_shape == (1, 6, 6) and dataset.train.images[:, 0, 3, 3].tolist() == [*range(0, 100, 10)]
    assert dataset.train.labels.tolist() == [0, 1] * 5 and (dataset.train.images[:, 0, :, 0] == 0).all()
    colour = [(Image.new("RGB", (100, 20), (i, 2, 3)), torch.tensor(i % 2)) for i in range(20)]
    dataset = pairs({"train": colour}).load()
    assert (
        dataset.in_shape == (3, 64, 64) and len(dataset.test) == 2 and dataset.train.images[:, 1, 32, 0].unique() == 2
    )


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ((Image.new("RGB", (4, 4), (1, 2, 3)), 0), "has colours, others have none; give data.channels=3 or 1"),
        ((np.zeros((4, 4), np.uint8), 2), "its label is 2, and there are 2 classes"),
        ((np.zeros((4, 4), np.float32), 0), r"cannot be decoded as an image \(an array of float32 \(4, 4\)"),
        (3, "no pair of a picture and a number of a class"),
        ((np.zeros((4, 4), np.uint8), "cat"), "no pair of a picture and a number of a class"),
    ],
)
def test_a_pair_that_cannot_be_is_named(odd, text):
    fine = [(np.full((4, 4), i, np.uint8), 0) for i in range(40)]
    source = pairs({"train": fine[:5] + [odd] + fine[6:]})
    with pytest.raises(UserError, match=rf"^data=pairs data\.name=mine: train image 5: {text}"):
        source.load()


def test_a_set_of_hugging_face_is_decoded_once(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install 'bnexp[huggingface]'")
    from bnexp.data.huggingface import HuggingFace

    content = {"image": [Image.new("RGB", (8, 8), (i, i, 9)) for i in range(20)], "label": [i % 3 for i in range(20)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    whole = datasets.Dataset.from_dict(content, features=features)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(6))}).save_to_disk(str(tmp_path / "saved"))
    dataset = HuggingFace(str(tmp_path / "saved"), valid=0).load()
    assert dataset.class_names == ("x", "y", "z") and dataset.train.labels.tolist() == content["label"]
    assert dataset.train.images[:, 0, 0, 0].tolist() == [*range(20)] and len(dataset.test) == 6
    monkeypatch.setattr("bnexp.data.pairs.square_of", None)
    assert HuggingFace(str(tmp_path / "saved"), valid=0).load().fingerprint == dataset.fingerprint
    with pytest.raises(UserError, match=r"^data\.label=kind: no such column; .* has image, label"):
        HuggingFace(str(tmp_path / "saved"), label="kind")
    with pytest.raises(UserError, match=r"^data\.name=.*nowhere: datasets cannot load it"):
        HuggingFace(str(tmp_path / "nowhere"))


def test_hugging_face_without_its_library_says_what_to_install(monkeypatch):
    from bnexp.data.huggingface import HuggingFace

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'bnexp\[huggingface\]'"):
        HuggingFace("x")


# Together


def test_decoding_says_how_far_it_is(train, photos, bnexp, capsys, tmp_path):
    arguments = ["model=mlp", "data=folder", f"data.root={photos}", "data.size=8", "steps=1", "threads=1"]
    assert bnexp("train", *arguments) == 0
    assert re.search(r"^data=folder: decoding images: 120 in \d+\.\d s$", capsys.readouterr().out, re.M)
    assert bnexp("train", *arguments) == 0
    assert "decoding" not in capsys.readouterr().out
    seen = []
    zero = torch.zeros(1, 2, 2, dtype=torch.uint8)
    decode_once(("x",), [], (600, 1, 2, 2), lambda i: (zero, 0), lambda *at: seen.append(at), True)
    assert seen == [(256, 600), (512, 600), (600, 600)]


@pytest.mark.skipif(not JPEGS.is_file(), reason="set BNEXP_DATA to a folder that holds cifar10_jpeg.zip")
@pytest.mark.parametrize("verbs", [["train"], pytest.param(["train", "compare"], marks=pytest.mark.long)])
def test_the_commands_of_the_readme_run_on_real_pictures(bnexp, tmp_path, capsys, verbs):
    with zipfile.ZipFile(JPEGS) as archive:
        for name in archive.namelist():
            if re.search(r"/000\d\.jpg$", name):
                archive.extract(name, tmp_path)
    (tmp_path / "cifar10_jpeg").rename(tmp_path / "photos")
    write_mnist(tmp_path / "files", 100, gzipped=False, name="KMNIST")
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = re.findall(r"```\n(.*?)```", text.partition("## Your own data")[2].partition("\n## ")[0], re.S)
    commands = [line.split("#")[0].split() for line in block.splitlines() if line.startswith("bnexp ")]
    assert len(commands) == 4
    for command in commands:
        if "data=huggingface" not in command and command[1] in verbs:
            assert bnexp(*[word.strip("'") for word in command[1:]], "threads=1") == 0
    assert capsys.readouterr().out.count("decoding images") == 2, "one folder, one set"
