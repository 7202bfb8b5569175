"""Batch normalization as the paper writes it, in plain tensor operations: the version to read."""

import torch
from torch import Tensor

from bnexp.errors import UserError
from bnexp.norms.base import BatchNormBase, finish


class BatchNorm(BatchNormBase):
    """Algorithm 1 and 2 of Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167).

    For every channel c of ``x`` (N, C) or (N, C, ...), over the m values that it has in the batch::

        mean = sum(x) / m
        var  = sum((x - mean)^2) / m
        xhat = (x - mean) / sqrt(var + eps)
        y    = weight * xhat + bias

    In evaluation the running averages of mean and variance stand in for the batch's own. Half-precision
    inputs are normalized in float32 and the result is rounded once, to the input's dtype.

    The conventions in which tutorials differ are options, never silent:

    * ``running_var="unbiased"`` averages var * m / (m - 1), as the paper and torch do; ``"biased"`` averages var.
    * ``running_var_init`` is where the running variance starts: 1 (torch, TensorFlow) or 0 (D2L).
    * ``decay`` is the weight of the *old* average (TensorFlow), so ``decay=0.9`` is ``momentum=0.1``.
      Set one of the two: ``decay`` beside a ``momentum`` other than its default is an error.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str = "identity",
        running_var: str = "unbiased",
        running_var_init: float = 1.0,
        decay: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if running_var not in ("unbiased", "biased"):
            raise UserError(f"norm.running_var={running_var}: not known; choose unbiased or biased")
        if decay is not None:
            if momentum != 0.1:
                raise UserError(
                    f"norm.momentum={momentum} and norm.decay={decay}: both name the same weight "
                    "(decay = 1 - momentum); give one of them"
                )
            if not 0 <= decay <= 1:
                raise UserError(f"norm.decay={decay}: the weight of the old average lies between 0 and 1")
            momentum = 1.0 - decay
        self.running_var_kind = running_var
        self.running_var_init = float(running_var_init)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats,
            activation=activation, device=device, dtype=dtype,
        )  # fmt: skip

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if self.track_running_stats:
            self.running_var.fill_(self.running_var_init)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.check(x, residual)
        dims = [d for d in range(x.dim()) if d != 1]
        per_channel = [-1 if d == 1 else 1 for d in range(x.dim())]
        z = x if x.dtype == torch.float64 else x.float()

        if self.uses_batch_statistics():
            mean = z.mean(dims)
            var = (z - mean.view(per_channel)).square().mean(dims)
            if self.training and self.track_running_stats:
                self.track(mean.detach(), var.detach(), x.numel() // max(self.num_features, 1))
        else:
            mean, var = self.running_mean.to(z.dtype), self.running_var.to(z.dtype)

        y = (z - mean.view(per_channel)) / torch.sqrt(var.view(per_channel) + self.eps)
        if self.affine:
            y = self.weight.view(per_channel) * y + self.bias.view(per_channel)
        return finish(y.to(x.dtype), residual, self.activation)

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running averages towards this batch: running = (1 - momentum) * running + momentum * batch.

        Computed in the precision of the batch's statistics and rounded once, to that of the buffers.
        """
        momentum = self.count_batch()
        if count == 0 or self.running_mean is None:  # an empty batch is counted but says nothing, as in torch
            return
        if self.running_var_kind == "unbiased":
            var = var * (count / (count - 1))
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_((1 - momentum) * running.to(batch.dtype) + momentum * batch)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, running_var={self.running_var_kind}"
