"""Batch normalization, residual addition and activation in one kernel (Triton)."""

import torch
from torch import Tensor

from bnexp.norms.base import BatchNormBase
from bnexp.norms.kernels.batch_norm import batch_norm, interpreted, require_kernels
from bnexp.norms.kernels.tiling import dense, tiling_for


class BatchNorm(BatchNormBase):
    """The same operation as scratch and library, with addition and activation in the same pass over memory.

    Statistics are float32, float64 for float64 input. A call needs a CUDA device or ``TRITON_INTERPRET=1``, else it
    raises :class:`~bnexp.errors.UserError`; the module can be built without. It can be differentiated once. ``repr``
    shows the kernels' tier for the last input and the reason for it.
    """

    _seen: tuple | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.check(x, residual)
        track = self.training and self.track_running_stats
        keep = not self.training or self.track_running_stats
        if not torch.compiler.is_compiling():  # the compiler would guard on an attribute that changes
            self._seen = (x.shape, x.stride(), x.dtype, x.device)
        return batch_norm(
            x,
            residual,
            self.weight,
            self.bias,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            self.num_batches_tracked if track else None,
            training=self.uses_batch_statistics(),
            momentum=self.momentum,
            eps=self.eps,
            activation=self.activation,
        )

    def require_device(self, device: torch.device) -> None:
        require_kernels(device)

    def is_interpreted(self) -> bool:
        return interpreted()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self._seen is None:
            return text
        shape, stride, dtype, device = self._seen
        x, _ = dense(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))
        p = tiling_for(x, device)
        return f"{text}, tier={p.tier} ({p.reason})"
