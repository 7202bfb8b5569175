"""The compile engine: forward, loss and backward by code that torch.compile makes for the model."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from time import perf_counter
from types import FunctionType, MethodType

import torch

from bnexp.engines.base import with_traits
from bnexp.errors import UserError
from bnexp.train.run import Run

MOST_MODELS = 2**20  # the most models for which a process compiles code that they share; torch's own limit is 8


def require_compiler(device: torch.device) -> None:
    """Raise :class:`UserError` without the compiler that torch.compile calls: C++ for a CPU, C for a GPU."""
    if device.type == "cuda":  # Triton looks for it in this way
        needed, variable, usual = "a C compiler", "CC", "gcc"
        is_there = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    else:
        from torch._inductor import cpp_builder, exc

        needed, variable, usual = "a C++ compiler", "CXX", "g++"
        try:
            is_there = cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            is_there = None
    if not is_there:
        raise UserError(
            f"engine=compile: torch.compile needs {needed} and finds none here; install {usual}, name another by the "
            f"environment variable {variable}, or use engine=eager"
        )


@with_traits(require_device=require_compiler)
def compiled(run: Run) -> Callable[[], None]:
    """Return the eager step with ``run.loss`` compiled.

    It is compiled as one graph; if that fails, in pieces, and if that fails, not at all, with a warning on stderr.
    The optimizer is one fused kernel anyway; batches and evaluation stay eager. Sums are taken in another order than by
    the eager engine: in float32, losses agree to about 1e-6 in the first steps, and training amplifies the difference.
    torch keeps compiled code on the disk (TORCHINDUCTOR_CACHE_DIR), so that the same model and batch size start sooner
    the next time. The seconds of the first step are added to ``run.setup_seconds``.
    """
    for name in ("torch.utils.cpp_extension", "torch._dynamo"):  # they log a missing CUDA and graph breaks
        logging.getLogger(name).setLevel(logging.ERROR)
    uncompiled = run.loss

    def take() -> None:
        batches = run.batches.state_dict()
        buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]
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
                for buffer, kept in buffers:
                    buffer.copy_(kept)
                if is_last:
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
