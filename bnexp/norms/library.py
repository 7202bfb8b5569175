"""Batch normalization by ``torch.nn.functional.batch_norm``: the baseline of every comparison."""

import torch.nn.functional as F
from torch import Tensor

from bnexp.norms.base import BatchNormBase, finish


class BatchNorm(BatchNormBase):
    """``torch.nn.BatchNorm1d/2d/3d`` in one class, followed by residual and activation.

    Torch chooses the kernel: on CUDA, cuDNN for float32 and for float16 under autocast,
    torch's own kernels for bfloat16 and pure float16; on a CPU, torch's own.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.check(x, residual)
        momentum = self.momentum if self.momentum is not None else 0.0
        if self.training and self.track_running_stats:
            momentum = self.count_batch()
        keep = not self.training or self.track_running_stats
        y = F.batch_norm(
            x,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            self.weight,
            self.bias,
            self.uses_batch_statistics(),
            momentum,
            self.eps,
        )
        return finish(y, residual, self.activation)
