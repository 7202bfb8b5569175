"""What all tests share: the environment before torch and triton are imported, and bnexp run in process."""

import ctypes
import os
import signal


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


# Both are read when the library is imported, so they have to be set before anything below imports it.
if not _has_cuda_driver():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Sums in one order, and no quarrel over cores when tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Decoded images go to a folder of this session; matplotlib keeps its list of fonts."""
    usual = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(usual, "matplotlib"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _signals_are_heard():
    """Signals that the tests were started to ignore, in the background or under nohup, are heard by what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder that holds the real MNIST files, named by BNEXP_DATA."""
    root = Path(os.environ.get("BNEXP_DATA") or "/nonexistent")
    files = [root / f"MNIST/raw/{part}-ubyte" for part in ("train-images-idx3", "t10k-images-idx3")]
    if not all(file.is_file() or file.with_name(file.name + ".gz").is_file() for file in files):
        pytest.skip("real MNIST is needed: set BNEXP_DATA to a folder that holds MNIST/raw/*.gz")
    return root


@pytest.fixture
def bnexp(tmp_path, monkeypatch):
    """``bnexp(*arguments) -> exit code``: the command line in process, in an empty directory.

    What a command leaves behind in the process (arguments, environment, Hydra's singletons) is undone.
    """
    from hydra.core.global_hydra import GlobalHydra

    from bnexp.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bnexp"])
    for name in ("HYDRA_FULL_ERROR", "COMP_LINE", "COMP_POINT"):
        monkeypatch.setenv(name, "")  # so that it is put back whatever the command sets it to
        monkeypatch.delenv(name)

    def call(*arguments: str) -> int:
        GlobalHydra.instance().clear()
        try:
            return main(list(arguments))
        except SystemExit as end:  # Hydra's --help and argparse's errors
            return int(end.code or 0)
        finally:
            GlobalHydra.instance().clear()

    return call


@pytest.fixture
def train(bnexp, tmp_path):
    """``train(*overrides) -> folder``: a finished run, quiet, on one thread, in a folder under tmp_path."""
    names = (f"run-{i}" for i in range(1, 1000))

    def call(*overrides: str) -> Path:
        out = next((each[4:] for each in overrides if each.startswith("out=")), None)
        extra = [] if out else [f"out={(out := next(names))}"]
        code = bnexp("train", "quiet=true", "threads=1", *extra, *overrides)
        assert code == 0, f"bnexp train {' '.join(overrides)} ended with {code}"
        return tmp_path / out

    return call


@pytest.fixture
def size17_fails(monkeypatch):
    """Runs with images of 17x17 cannot be built."""
    from bnexp.config import build

    whole = build.build

    def fail(cfg, datasets=None):
        if cfg.data.size == 17:
            raise RuntimeError("out of luck")
        return whole(cfg, datasets)

    monkeypatch.setattr(build, "build", fail)
