"""File systems without locks or fsync: runs go on with a warning; other errors of the system are told with a remedy."""

import builtins
import errno
import fcntl
import io
import os
import socket
import stat
import subprocess
import sys

import pytest
import torch
from PIL import Image

from bnexp.data.cifar10 import TEST_FILES, TRAIN_FILES
from bnexp.errors import StorageError
from bnexp.store import checkpoint, files
from bnexp.store.files import ELSEWHERE, NO_SYNC, REMEDIES, not_written, write_json
from bnexp.store.run_folder import NO_LOCKS, is_taken, read_status, taken

TINY = ("model=mlp", "data.limit=64", "batch_size=16", "steps=1", "threads=1", "quiet=true")


@pytest.fixture
def no_locks(monkeypatch):
    """``no_locks(number)``: every flock ends with that errno."""

    def call(number: int) -> None:
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        files.warn_once.cache_clear()

    return call


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_runs_and_sweeps_go_on_with_one_warning(number, no_locks, bnexp, capfd, tmp_path):
    no_locks(number)
    assert bnexp("train", *TINY, "out=run") == 0
    assert bnexp("train", "-m", *TINY, "seed=0,1", "out=sweep") == 0
    assert bnexp("report", "sweep") == 0
    err = capfd.readouterr().err
    assert err.count("its file system has no locks") == 2 and "do not start two processes on a run there" in err
    assert read_status(tmp_path / "run")["status"] == "finished"


def test_without_locks_the_status_tells_who_is_at_work(no_locks, tmp_path):
    with taken(tmp_path) as is_mine:
        assert is_mine
    no_locks(errno.ENOSYS)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for pid, expected in ((sleeper.pid, True), (os.getpid(), False), (2**30, False)):
            write_json(tmp_path / "status.json", {"status": "running", "host": socket.gethostname(), "pid": pid})
            assert is_taken(tmp_path) == expected
    finally:
        sleeper.kill()
        sleeper.wait()


def test_another_error_of_a_lock_is_told(no_locks, bnexp, capsys):
    no_locks(errno.EIO)
    assert bnexp("train", *TINY, "out=run") == 1
    assert "check its disk" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE], ids=errno.errorcode.get)
def test_a_lock_that_is_refused_is_named(number, no_locks, bnexp, capsys, tmp_path):
    no_locks(number)
    assert bnexp("train", *TINY, "out=run") == 1
    assert bnexp("train", *TINY, "out=run") == 2, "the folder is taken now"
    for line in capsys.readouterr().err.splitlines():
        assert f"run/.lock cannot be locked: {os.strerror(number)}; " in line and "writable" not in line


@pytest.mark.parametrize("number", NO_SYNC, ids=errno.errorcode.get)
@pytest.mark.parametrize("only", [stat.S_ISREG, stat.S_ISDIR])
def test_a_run_goes_on_without_fsync(number, only, bnexp, capfd, monkeypatch, tmp_path):
    def fsync(handle: int) -> None:
        if only(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    files.warn_once.cache_clear()
    assert bnexp("train", *TINY, "out=run") == 0
    assert capfd.readouterr().err.count("its file system cannot flush to the disk") == 1
    assert read_status(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY, errno.ETXTBSY, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_move_that_the_file_system_refuses_is_told_with_a_way_out(number, bnexp, capsys, monkeypatch):
    def replace(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", replace)
    assert bnexp("train", *TINY, "out=run") == 1
    assert ELSEWHERE in capsys.readouterr().err


LOST = [errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.ENETUNREACH,
        errno.ECONNREFUSED, errno.EPROTO, errno.ESHUTDOWN, errno.EKEYEXPIRED]  # fmt: skip


@pytest.mark.parametrize("number", LOST)
def test_space_is_asked_for_only_where_space_is_missing(number, tmp_path):
    told = not_written(OSError(number, os.strerror(number)), tmp_path)
    assert REMEDIES[number] in told
    assert ("free some space" in told) == (number == errno.EDQUOT)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("words", [["out=run"], []], ids=["named", "new"])
def test_a_folder_that_cannot_be_made_is_told_with_the_remedy_of_its_error(number, words, bnexp, capsys, monkeypatch):
    def fail(*_, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("bnexp.store.run_folder.Path.mkdir", fail)
    assert bnexp("train", *TINY, *words) == 2
    assert f"{REMEDIES[number]}, or choose another folder" in capsys.readouterr().err


READ_REMEDIES = {
    errno.EIO: "check its disk", errno.EACCES: "check its permissions", errno.ESTALE: REMEDIES[errno.ESTALE],
}  # fmt: skip


class Unreadable(io.FileIO):
    """A file whose every read fails with ``number``."""

    number = errno.EIO

    def readinto(self, *_) -> int:
        raise OSError(self.number, os.strerror(self.number))

    read = readall = readinto


@pytest.fixture
def unreadable(monkeypatch):
    """``unreadable(name, number)``: files with ``name`` in their path are opened, and cannot be read."""
    plain = builtins.open

    def call(name: str, number: int) -> None:
        def opened(path, mode="r", *rest, **options):
            if isinstance(path, int) or name not in str(path) or mode not in ("r", "rb"):
                return plain(path, mode, *rest, **options)
            monkeypatch.setattr(Unreadable, "number", number)
            return io.BufferedReader(Unreadable(path))

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)

    return call


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Pillow leaves the file open
@pytest.mark.parametrize("number", READ_REMEDIES, ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "name, command",
    [
        ("checkpoint.pt", "resume run"), ("status.json", "resume run"), ("config.yaml", "resume run"),
        ("config.yaml", "rerun run out=new"), ("status.json", "rerun run out=new"), ("config.yaml", "inspect run"),
        ("checkpoint.pt", "inspect run"), ("a.png", "train data=folder data.root=photos out=new"),
        ("metrics.jsonl", "report run"), ("-ubyte", "train data=mnist out=new"),
        ("batch", "train data=cifar10 data.root=. out=new"), ("own.yaml", "study own.yaml out=new"),
    ],
)  # fmt: skip
def test_a_file_that_the_system_cannot_read_is_not_taken_for_a_damaged_one(
    name, command, number, train, bnexp, unreadable, capsys, tmp_path
):
    folder = train(*TINY, "checkpoint_every=1", "steps=2")
    status = (folder / "status.json").read_text()
    ended = command.startswith("report")
    (folder / "status.json").write_text(status if ended else status.replace('"finished"', '"interrupted"'))
    folder.rename(tmp_path / "run")
    for place in ("photos/a", "photos/b"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / place / "a.png")
    (tmp_path / "own.yaml").write_text("")
    (tmp_path / "cifar-10-batches-py").mkdir()
    for part in (*TRAIN_FILES, *TEST_FILES):
        (tmp_path / "cifar-10-batches-py" / part).write_bytes(b"")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    unreadable(name, number)
    assert bnexp(*command.split()) in (1, 2)
    out, err = capsys.readouterr()
    told = " ".join((out + err).split())
    assert f"cannot be read ({os.strerror(number)}); {READ_REMEDIES[number]}" in told
    assert not any(word in told for word in ("delete", "put back", "replace", "damaged"))
    assert not (tmp_path / "new").exists()
    after = {path: path.stat().st_size for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    assert after == {path: len(content) for path, content in before.items() if path.name != ".lock"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
def test_a_checkpoint_that_the_system_cannot_read_is_not_taken_for_a_damaged_one(number, train, monkeypatch):
    folder = train("model=mlp", "data.limit=64", "batch_size=16", "steps=2", "checkpoint_every=1")
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}

    def fails(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("bnexp.store.checkpoint.check_whole", fails)
    with pytest.raises(StorageError, match=f"cannot be read .{os.strerror(number)}.; {READ_REMEDIES[number]}"):
        checkpoint.load(folder, torch.device("cpu"), mend=True)
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == before
