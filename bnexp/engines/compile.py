"""The compile engine: forward, loss and backward by code that torch.compile makes for the model."""

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import FunctionType, MethodType

import torch

from bnexp.engines.base import with_traits
from bnexp.errors import UserError
from bnexp.train.run import Run

MOST_MODELS = 2**20  # the most models for which a process compiles code that they share; torch's own limit is 8
for name in ("torch.utils.cpp_extension", "torch._dynamo"):  # they log a missing CUDA and graph breaks
    logging.getLogger(name).setLevel(logging.ERROR)


def require_compiler(device: torch.device) -> None:
    """Raise :class:`UserError` unless the compiler that torch.compile calls works: C++ for a CPU, C for a GPU."""
    language, variable, usual = ("C", "CC", "gcc") if device.type == "cuda" else ("C++", "CXX", "g++")
    try:
        compile_line(language)
    except Exception as error:  # of the system, of torch or of the compiler
        said = str(error).partition(" in torch._inductor")[0]
        if isinstance(error, subprocess.CalledProcessError):
            said = error.stderr.strip().partition("\n")[0] or f"exit code {error.returncode}"
        given = f"{variable}={os.environ[variable]}" if variable in os.environ else usual
        raise UserError(
            f"engine=compile: torch.compile needs a {language} compiler, and {given} makes nothing that runs "
            f"({said[:200]}); install {usual}, name a compiler by the environment variable {variable} and a folder for "
            "its files by TORCHINDUCTOR_CACHE_DIR, or use engine=eager"
        ) from error


@cache
def compile_line(language: str) -> None:
    """Compile a small file as torch.compile compiles the code of a model, and load the library."""
    from torch._inductor import cpp_builder
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with TemporaryDirectory(dir=cache_dir()) as folder:
        source, library = f"{folder}/line.{'cpp' if language == 'C++' else 'c'}", f"{folder}/line.so"
        Path(source).write_text("#include <Python.h>\nint line;\n")
        if language == "C++":
            builder = cpp_builder.CppBuilder("line", source, cpp_builder.CppTorchOptions(), folder)
            command = shlex.split(builder.get_command_line())
        else:  # as Triton does
            compiler = os.environ.get("CC", shutil.which("gcc") or shutil.which("clang") or "gcc")
            include = f"-I{sysconfig.get_path('include')}"
            command = [compiler, source, "-shared", "-fPIC", include, "-o", library]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=True)
        ctypes.CDLL(library)


@with_traits(require_device=require_compiler)
def compiled(run: Run) -> Callable[[], None]:
    """Return the eager step with ``run.loss`` compiled.

    It is compiled as one graph; if that fails, in pieces, and if that fails, not at all, with a warning on stderr.
    The optimizer is one fused kernel anyway; batches and evaluation stay eager. Sums are taken in another order than by
    the eager engine: in float32, losses agree to about 1e-6 in the first steps, and training amplifies the difference.
    torch keeps compiled code on the disk (TORCHINDUCTOR_CACHE_DIR), so that the same model and batch size start sooner
    the next time. The seconds of the first step are added to ``run.setup_seconds``.
    """
    uncompiled = run.loss

    def take() -> None:
        batches = run.batches.state_dict()
        buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]
        drawn = run.draws.state_dict()
        for is_whole in (True, False):
            run.loss = torch.compile(with_own_code(uncompiled), fullgraph=is_whole, dynamic=False)
            try:
                return run.eager_step()
            except torch._dynamo.exc.TorchDynamoException as error:  # before any weight has moved
                has_failed = isinstance(error, torch._dynamo.exc.BackendCompilerFailed)
                is_last = has_failed or not is_whole
                what = "not compiled" if is_last else "compiled in pieces, not as one graph"
                reason = str(error.inner_exception if has_failed else error).strip().partition("\n")[0]
                print(f"bnexp: warning: engine=compile: {what} ({reason})", file=sys.stderr)
                run.batches.load_state_dict(batches)
                run.draws.put(drawn)
                for buffer, kept in buffers:
                    buffer.copy_(kept)
                if is_last:
                    run.fallback = reason
                    break
                # Pieces belong to code that all models share, for which torch counts compilations in the process.
                torch._dynamo.config.recompile_limit = MOST_MODELS
                torch._dynamo.config.accumulated_recompile_limit = MOST_MODELS
        run.loss = uncompiled
        run.eager_step()

    def first_step() -> None:
        began = perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler warns about its own internals
            take()
        run.setup_seconds += perf_counter() - began
        run.take_step = run.eager_step

    return first_step


def with_own_code(method: Callable) -> Callable:
    """A copy of ``method`` with a code object of its own, because torch compiles one for 8 models at most."""
    function = method.__func__
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return MethodType(own, method.__self__)
