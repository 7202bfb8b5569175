"""How compute-sanitizer is called, read from a stand-in for it."""

import subprocess

import pytest
import sanitizer


@pytest.fixture
def tool(tmp_path):
    """``tool(command)``: a program that runs this line of shell."""

    def make(command):
        path = tmp_path / "compute-sanitizer"
        path.write_text(f"#!/bin/sh\n{command}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_the_sanitizer_sees_each_tensor_by_itself_and_no_errors_of_the_interface(tool, tmp_path):
    done = sanitizer.sanitize(tool('echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"; exit 9'), "racecheck", "1", tmp_path)
    assert done.returncode == 9
    assert done.stdout.startswith("1 --tool racecheck --report-api-errors no --error-exitcode 9 ")


def test_a_sanitizer_that_does_not_end_is_ended(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "TIME_LIMIT_S", 0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        sanitizer.sanitize(tool("exec sleep 30"), "memcheck", "1", tmp_path)
