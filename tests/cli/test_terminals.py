"""What a terminal can show never decides how a run ends."""

import io
import os
import subprocess
import sys

import pytest

from bnexp.store.run_folder import read_status

TINY = ("model=mlp", "data.limit=64", "batch_size=16", "steps=4", "threads=1")
ENCODINGS = ("ascii", "latin-1", "cp1252", "koi8-r", "gbk")


@pytest.fixture
def terminal(monkeypatch):
    """``terminal(encoding) -> buffer``: stdout writes bytes there and knows no other characters."""

    def call(encoding: str) -> io.BytesIO:
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding, write_through=True))
        return buffer

    return call


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_prints_what_the_encoding_has(encoding, terminal, bnexp, tmp_path):
    out = terminal(encoding)
    assert bnexp("train", *TINY, "out='läufe ±'") == 0
    assert bnexp("train", "-m", *TINY, "norm=none,library", "seed=0,1", "out=sweep") == 0
    assert bnexp("compare", *TINY, "norm=none,library", "seed=0,1", "out=compared") == 0
    assert bnexp("report", "sweep", "compared") == 0
    assert bnexp("inspect", "läufe ±") == 0
    assert bnexp("study") == 0
    assert read_status(tmp_path / "läufe ±")["status"] == "finished"
    assert "finished" in out.getvalue().decode(encoding) or b"test" in out.getvalue()


def test_a_terminal_without_any_of_our_characters_in_a_process_of_its_own(tmp_path):
    words = [sys.executable, "-m", "bnexp", "train", "-m", *TINY, "seed=0,1", "out=sweep"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").splitlines()[-1] == "sweep"
