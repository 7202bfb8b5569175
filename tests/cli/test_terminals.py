"""What a terminal can show never decides how a run ends."""

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bnexp
from bnexp.store.run_folder import read_status

TINY = ("model=mlp", "data.limit=64", "batch_size=16", "steps=4", "threads=1")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
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
    assert "läufe ±".encode(encoding, "replace") in out.getvalue()


def test_a_terminal_without_any_of_our_characters_in_a_process_of_its_own(tmp_path):
    words = [sys.executable, "-m", "bnexp", "train", "-m", *TINY, "seed=0,1", "out=sweep"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").splitlines()[-1] == "sweep"


def in_ascii(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    """``python words`` in the locale C, which has ASCII alone."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=os.environ | ASCII, cwd=cwd)


def test_a_clone_whose_path_the_locale_cannot_hold(tmp_path):
    clone = tmp_path / "rép"
    shutil.copytree(Path(bnexp.__file__).parent, clone / "bnexp", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init"], ["add", "bnexp/errors.py"], ["commit", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    done = in_ascii("-c", "from bnexp.store.run_folder import git_commit; print(git_commit())", cwd=clone)
    assert len(done.stdout.strip()) == 40, done.stderr
    assert "spam: not a command" in in_ascii("-m", "bnexp", "spam", cwd=clone).stderr


def test_a_word_that_the_locale_cannot_hold_is_blamed_on_the_locale(tmp_path):
    done = in_ascii("-m", "bnexp", "train", *TINY, "out='läufe'", cwd=tmp_path)
    assert done.returncode == 2 and "the locale C cannot hold" in done.stderr and "PYTHONUTF8=1" in done.stderr
    assert "not UTF-8 text" in in_ascii("-m", "bnexp", "train", os.fsdecode(b"out=\xff"), cwd=tmp_path).stderr


@pytest.fixture(scope="module")
def in_latin_1(tmp_path_factory):
    """``in_latin_1(*words, cwd=) -> error``: what ``bnexp words`` prints on stderr in a locale of ISO-8859-1."""
    folder = tmp_path_factory.mktemp("locales")
    name = "en_US.ISO-8859-1"
    made = shutil.which("localedef") and subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / name])
    if not made or not (folder / name).is_dir():
        pytest.skip("localedef cannot make a locale of ISO-8859-1 here")
    latin = {"LC_ALL": name, "LOCPATH": str(folder), "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"}

    def call(*words: str, cwd: Path) -> str:
        words = [sys.executable, "-m", "bnexp", *words]
        done = subprocess.run(words, capture_output=True, encoding="utf-8", env=os.environ | latin, cwd=cwd)
        assert done.returncode == 2, done.stderr
        return done.stderr

    return call


@pytest.mark.parametrize("line", [
    "train out='Ü'", "train data=folder data.root='Ü'", "train data=folder data.root=photos", "report Ü",
    "train --config-dir Ü", "train --config-name Ü", "study Ü.yaml",
])  # fmt: skip
def test_utf8_that_the_locale_reads_as_control_characters_is_blamed_on_the_locale(line, in_latin_1, tmp_path):
    (tmp_path / "photos/Ü").mkdir(parents=True)
    told = in_latin_1(*line.split(), cwd=tmp_path)
    assert "Ü" in told and "the locale en_US.ISO-8859-1 cannot hold this UTF-8 text; set PYTHONUTF8=1" in told
    assert [each.name for each in tmp_path.iterdir()] == ["photos"]


MAIN = {  # a main config of the user's own, and what the error says
    "batch_sise: 8": "batch_sise: there is no such setting (did you mean batch_size?)",
    "batch_size: many": "batch_size: Value 'many'",
}
STUDY = {
    "settings: [model=mlp]": "title: has to be given",
    "titel: x": "titel: there is no such setting",
    "seeds: many": "seeds: Value 'many'",
}


@pytest.mark.parametrize("text", [*MAIN, *STUDY])
def test_a_yaml_of_the_users_own_is_refused_in_words(text, bnexp, capsys, tmp_path):
    head = "defaults: [train, _self_]\n" if text in MAIN else ""
    (tmp_path / "étude.yaml").write_text(f"{head}{text}\n", encoding="utf-8")
    words = ["train", "--config-dir", ".", "--config-name", "étude"] if text in MAIN else ["study", "étude.yaml"]
    assert bnexp(*words) == 2
    told = capsys.readouterr().err
    assert (MAIN | STUDY)[text] in told and "étude" in told
    assert not any(raw in told for raw in ("full_key", "object_type", "Structured config", "raised while"))


@pytest.mark.parametrize("command, is_ignored", [
    (["train", *TINY, "out=run"], False), (["train", "-m", *TINY, "seed=0,1", "out=run"], True),
    (["report", "old"], False),
])  # fmt: skip
def test_a_closed_terminal_is_a_hangup(command, is_ignored, train, tmp_path):
    train(*TINY, "out=old")
    ours, theirs = os.openpty()
    os.close(ours)
    heard = signal.SIG_IGN if is_ignored else signal.SIG_DFL
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    words = [sys.executable, "-m", "bnexp", *command]
    process = subprocess.Popen(words, cwd=tmp_path, **streams, preexec_fn=lambda: signal.signal(signal.SIGHUP, heard))
    os.close(theirs)
    assert process.wait(60) == (0 if is_ignored else 130)
    statuses = {read_status(path.parent)["status"] for path in tmp_path.glob("run/**/status.json")}
    assert statuses <= ({"finished"} if is_ignored else {"finished", "interrupted"})
