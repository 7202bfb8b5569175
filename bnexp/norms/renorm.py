"""Batch renormalization: batch statistics, corrected towards their moving averages within limits that widen."""

import math

import torch
from torch import Tensor

from bnexp.errors import UserError
from bnexp.norms.base import BatchNormBase, check_fraction, finish, move, per_channel, scale_and_shift


class BatchRenorm(BatchNormBase):
    """Ioffe, "Batch Renormalization", 2017 (arXiv:1702.03275), algorithm 1.

    For every channel c of ``x`` (N, C) or (N, C, ...), with the batch's mean_B and var_B as in batch normalization,
    the running mean and var from the batches before, sigma_B = sqrt(var_B + eps) and sigma = sqrt(var + eps)::

        r = clip(sigma_B / sigma, 1 / r_max, r_max)            constants to the gradient,
        d = clip((mean_B - mean) / sigma, -d_max, d_max)       as are mean and sigma
        y = weight * ((x - mean_B) / sigma_B * r + d) + bias

    Where nothing is clipped, (x - mean_B) / sigma_B * r + d = (x - mean) / sigma: the outputs of training are those of
    evaluation, and an example depends on the others of its batch through the gradient only. With r = 1 and d = 0 it is
    batch normalization. In evaluation y = weight * (x - mean) / sigma + bias.

    **Schedule.** For batch k, counted from 0, r = 1 and d = 0 if k < warmup_steps or k = 0. After that the limits widen
    linearly, to r_max over r_steps and to d_max over d_steps. The paper takes 5,000, 35,000 and 20,000 steps; the
    defaults are these divided by 50. k is the buffer ``num_batches_tracked``, so a resumed run continues the schedule;
    the host never reads it from the device.

    **Averages.** ``running_mean`` and ``running_var`` (unbiased, as in ``torch.nn``) are the moving averages that
    r and d use and that evaluation uses: one pair, as in the paper, so that training and evaluation agree.
    The t-th batch, counted from 1, has the weight max(1 / t, renorm_momentum): a plain average until 1 / t
    falls below it, so the initial values, 0 and 1, have no weight after the first batch, however slow the average.
    ``renorm_momentum`` is the weight of the *new* batch, as in torch; TF-slim's ``renorm_decay`` is 1 - that.
    0 gives all batches the same weight. The state dict has torch's keys.

    An empty batch is not counted: it moves neither averages nor schedule.
    """

    implements_batch_norm = False
    made_for_small_batches = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str = "identity",
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        renorm_momentum: float = 0.01,
        warmup_steps: int = 100,
        r_steps: int = 700,
        d_steps: int = 400,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= r_max < math.inf:
            raise UserError(f"norm.r_max={r_max}: the scale is corrected by 1 / r_max to r_max; give 1 or more")
        if not 0 <= d_max < math.inf:
            raise UserError(f"norm.d_max={d_max}: the shift is corrected by -d_max to d_max; give 0 or more")
        check_fraction("renorm_momentum", renorm_momentum, "the weight of a new batch")
        for name, value in (("warmup_steps", warmup_steps), ("r_steps", r_steps), ("d_steps", d_steps)):
            if type(value) is not int or value < 0:
                raise UserError(f"norm.{name}={value}: a number of training steps; give a whole number, 0 or more")
        self.r_max, self.d_max = r_max, d_max
        self.warmup_steps, self.r_steps, self.d_steps = warmup_steps, r_steps, d_steps
        super().__init__(
            num_features, eps, renorm_momentum, affine, activation=activation, bias=bias, device=device, dtype=dtype
        )  # fmt: skip

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.check(x, residual)
        dims = [d for d in range(x.dim()) if d != 1]
        z = x if x.dtype == torch.float64 else x.float()
        if self.uses_batch_statistics():
            mean = z.mean(dims)
            var = (z - per_channel(mean, z)).square().mean(dims)
        else:
            mean, var = self.running_mean.to(z.dtype), self.running_var.to(z.dtype)
        xhat = (z - per_channel(mean, z)) / torch.sqrt(per_channel(var, z) + self.eps)
        if self.training and x.numel() and self.running_mean is not None:
            r, d = self.correction(mean.detach(), var.detach())
            xhat = xhat * per_channel(r, z) + per_channel(d, z)
            self.track(mean.detach(), var.detach(), x.numel() // self.num_features)
        y = scale_and_shift(xhat, self.weight, self.bias)
        return finish(y.to(x.dtype), residual, self.activation)

    def correction(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """r and d, (C,) each, of a batch with this mean and biased variance, (C,) each."""
        r_max, d_max = self.limits()
        sigma = torch.sqrt(self.running_var.to(var.dtype) + self.eps)
        r = torch.sqrt(var + self.eps) / sigma
        d = (mean - self.running_mean.to(mean.dtype)) / sigma
        return r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)

    def limits(self) -> tuple[Tensor, Tensor]:
        """The limits of r and d for the next training batch: from 1 to r_max and from 0 to d_max, by the schedule."""
        step = self.num_batches_tracked.double()
        begin = max(self.warmup_steps, 1)  # before the first batch there is no average to correct towards

        def opened(num_steps: int) -> Tensor:
            """The share of the way, 0 at ``warmup_steps`` and 1 ``num_steps`` later."""
            done = (step - self.warmup_steps) / num_steps if num_steps else torch.ones_like(step)
            return torch.where(step < begin, 0.0, done.clamp(0, 1))

        return 1 + (self.r_max - 1) * opened(self.r_steps), self.d_max * opened(self.d_steps)

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Count this batch of ``count`` values per channel and move the running statistics towards it."""
        self.num_batches_tracked.add_(1)
        slowest = self.momentum or 0.0  # torch's update_bn sets momentum to None, to average all batches
        momentum = (1 / self.num_batches_tracked.double()).clamp(min=slowest)
        move(self.running_mean, mean, momentum)
        move(self.running_var, var * (count / (count - 1)), momentum)

    def share_left(self, num_batches: int) -> float:
        """0 after the first batch, which has the weight 1."""
        return 0.0 if num_batches else 1.0

    def momentum_setting(self, momentum: float) -> str:
        return f"norm.renorm_momentum={momentum:.6g}"

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, warmup_steps={self.warmup_steps}, "
            f"r_steps={self.r_steps}, d_steps={self.d_steps}"
        )
