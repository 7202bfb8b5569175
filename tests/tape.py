"""A stand-in for CUDA graphs on a CPU: records operations with the tensors that they met, and repeats them.

Like a graph it repeats nothing that the host did in between: a number that came from Python stays what it was, a list
does not grow, and to ask a tensor for its value is an error.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Refusing(TorchDispatchMode):
    """Waiting for the device is an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was asked for while capturing")
        return function(*args, **(kwargs or {}))


class Recording(Refusing):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        """Every operation again; what it makes goes where it went before."""
        for function, args, kwargs, out in self.calls:
            new = function(*args, **kwargs)
            for before, now in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(before, torch.Tensor) and before.data_ptr() != now.data_ptr():
                    before.copy_(now)


class Tape:
    """What :class:`bnexp.engines.capture.CudaGraphs` is on a GPU.

    ``num_captures`` counts. A capture of ``refuses`` (``steps`` or ``evaluation``) raises once it has recorded.
    """

    def __init__(self, refuses=""):
        self.num_captures, self.refuses = 0, refuses

    @contextmanager
    def warming_up(self):
        with Refusing():
            yield

    def capture(self, function, generators, what="steps"):
        with Recording() as recording:
            function()
        if what == self.refuses:
            raise RuntimeError("CUDA error: operation failed\nand more lines")
        self.num_captures += 1
        return recording.replay
