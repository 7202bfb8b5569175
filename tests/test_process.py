"""What a process of ours sets for itself has the effect it is set for, and leaves what the user set."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from bnexp import startup

# Tensors of a step: four of 8 MB, taken, written and let go of, as often as there are steps.
CHURN = """
import json, resource, sys
from bnexp import startup
if sys.argv[1] == "ours":
    startup.keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    kept = [b"x" * 2**23 for _ in range(4)]
for _ in range(3):
    step()
before = faults()
for _ in range(20):
    step()
print(json.dumps((faults() - before) / 20))
"""
HUGE = """
import re, torch
ones = torch.ones(2**24)
text = open("/proc/self/smaps_rollup").read()
print(re.search(r"AnonHugePages: *(\\d+) kB", text)[1])
"""


def said(script, *arguments, **environment):
    words = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | environment)
    return json.loads(done.stdout)


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="elsewhere it does nothing")
def test_memory_that_is_let_go_of_is_not_asked_for_anew():
    """32 MB are 8,192 pages of 4 kB."""
    plain, ours = said(CHURN, "plain"), said(CHURN, "ours")
    assert plain > 1000, "if the allocator keeps it by itself, this file can go"
    assert ours < 100


def test_torch_takes_large_pages_where_there_are_any():
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not file.exists() or "[never]" in file.read_text():
        pytest.skip("this system has no large pages to give")
    assert said(HUGE, **startup.ENVIRONMENT) > said(HUGE, THP_MEM_ALLOC_ENABLE="0") + 2**14  # of 2**16 kB


def test_what_the_user_has_set_is_left(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    startup.settle()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ.pop("THP_MEM_ALLOC_ENABLE")) == ("ACTIVE", "1")


@pytest.mark.parametrize("limit, threshold", [(2**31, 2**30), (2**25, 2**25)])
def test_a_glibc_that_limits_the_threshold_gets_the_most_that_it_accepts(monkeypatch, limit, threshold):
    """Older versions refuse more than 32 MB, and would then return every larger tensor to the system."""
    accepted = {}

    class Library:
        def mallopt(self, option, value):
            is_accepted = option != startup.M_MMAP_THRESHOLD or value <= limit
            if is_accepted:
                accepted[option] = value
            return int(is_accepted)

    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    startup.keep_memory()
    assert accepted == {startup.M_MMAP_THRESHOLD: threshold, startup.M_TRIM_THRESHOLD: startup.KEPT}


def test_a_clone_that_is_not_installed_tells_its_version(bnexp, capsys, monkeypatch):
    def unknown(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("bnexp.store.run_folder.version", unknown)
    assert bnexp("--version") == 0
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert capsys.readouterr().out == f"bnexp {project['version']}\n"
