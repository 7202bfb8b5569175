"""The compile engine: forward, loss and backward by code that torch.compile makes for this very model."""

import logging
import sys
import warnings
from collections.abc import Callable
from time import perf_counter

import torch

from bnexp.train.run import Run


def compiled(run: Run) -> Callable[[], None]:
    """The eager step with ``run.loss`` compiled: one graph if it can be, in pieces (said on stderr) if not.

    Compiled are the forward pass, the loss and their gradient. The optimizer is one fused kernel as it is, the batches
    and the evaluation stay eager. Sums are taken in another order than eager's: in float32 losses agree to about 1e-6
    in the first steps, and training amplifies that. torch keeps what it compiled on the disk (TORCHINDUCTOR_CACHE_DIR),
    so the same model and batch size start sooner the next time. ``run.setup_seconds`` gets the first step's time.
    """
    for name in ("torch.utils.cpp_extension", "torch._dynamo"):  # that there is no CUDA; where a graph is broken
        logging.getLogger(name).setLevel(logging.ERROR)
    written = run.loss
    run.loss = torch.compile(written, fullgraph=True, dynamic=False)  # the short last batch gets code of its own

    def take() -> None:
        batches = run.batches.state_dict()
        try:
            run.eager_step()
        except torch._dynamo.exc.TorchDynamoException as error:  # found before anything ran but the draw of the batch
            reason = str(error).strip().splitlines()[0]
            print(f"bnexp: warning: engine=compile: compiled in pieces, not as one graph ({reason})", file=sys.stderr)
            run.batches.load_state_dict(batches)
            run.loss = torch.compile(written, dynamic=False)
            run.eager_step()

    def first_step() -> None:
        began = perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's about itself
            take()
        run.setup_seconds += perf_counter() - began
        run.take_step = run.eager_step

    return first_step
