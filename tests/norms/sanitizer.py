"""Scripts run under NVIDIA's compute-sanitizer."""

import os
import subprocess
import sys
from pathlib import Path

TIME_LIMIT_S = 120


def sanitize(tool: str, check: str, script: str, folder: Path) -> subprocess.CompletedProcess:
    """Run ``script``, written to ``folder``, under a check of ``tool``; the exit code is 9 if it finds something.

    torch may not cache memory: a read beyond a tensor in a cached block is no error. Errors that CUDA returns to torch,
    which asks for what a device may lack, do not count.
    """
    path = folder / "script.py"
    path.write_text(script)
    options = ["--tool", check, "--report-api-errors", "no", "--error-exitcode", "9"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        [tool, *options, sys.executable, str(path)], env=environment, capture_output=True, text=True,
        timeout=TIME_LIMIT_S,
    )  # fmt: skip
