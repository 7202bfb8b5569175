"""The compile engine: forward, loss and backward by code that torch.compile makes for this very model."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from time import perf_counter
from types import FunctionType, MethodType

import torch

from bnexp.engines.base import says
from bnexp.errors import UserError
from bnexp.train.run import Run

MOST_MODELS = 2**20  # whose shared code one process compiles; torch's own limit is 8


def require_compiler(device: torch.device) -> None:
    """Raise :class:`UserError` without the compiler that torch.compile calls: of C++ for a CPU, of C for a GPU."""
    if device.type == "cuda":  # by Triton, which looks for it so
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


@says(require_device=require_compiler)
def compiled(run: Run) -> Callable[[], None]:
    """Return the eager step with ``run.loss`` compiled: as one graph, or in pieces (told on stderr), or not at all
    (told too).

    Forward pass, loss and their gradient are compiled. The optimizer is one fused kernel anyway; batches and evaluation
    stay eager. Sums are taken in another order than eager's: in float32 losses agree to about 1e-6 in the first steps,
    and training amplifies that. torch keeps compiled code on the disk (TORCHINDUCTOR_CACHE_DIR), so the same model and
    batch size start sooner the next time. The time of the first step is added to ``run.setup_seconds``.
    """
    for name in ("torch.utils.cpp_extension", "torch._dynamo"):  # their notes: that there is no CUDA; graph breaks
        logging.getLogger(name).setLevel(logging.ERROR)
    written = run.loss

    def take() -> None:
        batches = run.batches.state_dict()
        buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]
        for is_whole in (True, False):
            run.loss = torch.compile(with_own_code(written), fullgraph=is_whole, dynamic=False)
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
                # Pieces are compiled by the code that models share: torch counts them over the whole process.
                torch._dynamo.config.recompile_limit = MOST_MODELS
                torch._dynamo.config.accumulated_recompile_limit = MOST_MODELS
        run.loss = written
        run.eager_step()

    def first_step() -> None:
        began = perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's about itself
            take()
        run.setup_seconds += perf_counter() - began
        run.take_step = run.eager_step

    return first_step


def with_own_code(method: Callable) -> Callable:
    """The same method of the same object with a code object of its own: torch compiles at most 8 models for one."""
    function = method.__func__
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return MethodType(own, method.__self__)
