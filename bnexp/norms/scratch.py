"""Batch normalization as the paper writes it, in plain tensor operations."""

import math

import torch
from torch import Tensor

from bnexp.errors import UserError
from bnexp.norms.base import FLOAT32, BatchNormBase, check_fraction, finish, move, per_channel, scale_and_shift


class BatchNorm(BatchNormBase):
    """Algorithm 1 and 2 of Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167).

    For every channel c of ``x`` (N, C) or (N, C, ...), over the m values that it has in the batch::

        mean = sum(x) / m
        var  = sum((x - mean)^2) / m
        xhat = (x - mean) / sqrt(var + eps)
        y    = weight * xhat + bias

    Evaluation uses the running averages of mean and variance instead of the batch's. Half-precision inputs are
    normalized in float32 and the result is rounded once, to the input's dtype.

    Conventions that differ between tutorials are options:

    * ``running_var="unbiased"`` averages var * m / (m - 1), as the paper and torch do; ``"biased"`` averages var.
    * ``running_var_init`` is where the running variance starts: 1 (torch, TensorFlow) or 0 (D2L).
    * ``decay`` is the weight of the *old* average (TensorFlow), so ``decay=0.9`` is ``momentum=0.1``.
      Set one of the two: ``decay`` beside a ``momentum`` other than its default is an error.
    * ``center=False`` drops bias, as ``bias=False`` does in torch, ``scale=False`` drops weight (TF-slim),
      ``affine=False`` drops both. If a relu and then a dense layer follow, that layer can learn the scale.
    * ``zero_debias=True`` (TF-slim; section 3 of Kingma & Ba 2015, arXiv:1412.6980) removes the initial 0 from a
      running average: with decay = 1 - momentum the t-th batch, counted from 1, has the weight
      (1 - decay) / (1 - decay^t), so the first batch has the weight 1 and the initial value none. The running mean
      starts at 0; the running variance does so with ``running_var_init=0`` only, else the option leaves it as it is.
    * ``decay_warmup=True`` (TensorFlow's moving averages) lets the averages move faster at first: after t batches the
      decay is decay_t = min(decay, (1 + t) / (10 + t)).

    Both options change the weights of the first batches, so setting both is an error.
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
        bias: bool = True,
        running_var: str = "unbiased",
        running_var_init: float = 1.0,
        decay: float | None = None,
        center: bool = True,
        scale: bool = True,
        zero_debias: bool = False,
        decay_warmup: bool = False,
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
            check_fraction("decay", decay, "the weight of the old average")
            momentum = 1.0 - decay
        check_decay(momentum, zero_debias, decay_warmup)
        if not 0 <= running_var_init <= FLOAT32.max:
            raise UserError(f"norm.running_var_init={running_var_init}: a variance is 0 or more; give 1 or 0")
        self.running_var_kind = running_var
        self.running_var_init = float(running_var_init)
        self.zero_debias, self.decay_warmup = zero_debias, decay_warmup
        super().__init__(
            num_features, eps, momentum, affine and (center or scale), track_running_stats,
            activation=activation, bias=bias and center, device=device, dtype=dtype,
        )  # fmt: skip
        if not scale:
            self.weight = None

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if self.track_running_stats:
            self.running_var.fill_(self.running_var_init)

    def forward(self, x: Tensor, residual: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """activation(y + residual); ``weights`` (N,) are the frequencies of the examples in the batch's statistics.

        An example of weight 2 counts as if it were in the batch twice, one of weight 0 not at all; fractions are
        allowed. With m the sum of the weights of a channel's values::

            mean = sum(weights x) / m      var = sum(weights (x - mean)^2) / m      unbiased: var * m / (m - 1)

        All examples are normalized, those of weight 0 too. Evaluation by running statistics ignores the weights.
        ValueError for another shape, for weights below 0 or not finite, and for m <= 1, which gives no variance. To
        know m, the host waits for the device.
        """
        self.check(x, residual)
        z = x if x.dtype == torch.float64 else x.float()

        if self.uses_batch_statistics():
            count = count_values(x, weights)
            mean = average(z, weights)
            var = average((z - per_channel(mean, z)).square(), weights)
            if self.training and self.track_running_stats:
                self.track(mean.detach(), var.detach(), count)
        else:
            mean, var = self.running_mean.to(z.dtype), self.running_var.to(z.dtype)

        xhat = (z - per_channel(mean, z)) / torch.sqrt(per_channel(var, z) + self.eps)
        y = scale_and_shift(xhat, self.weight, self.bias)
        return finish(y.to(x.dtype), residual, self.activation)

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, count: float) -> None:
        """Count this batch of ``count`` values per channel and move the running averages towards it."""
        momentum = self.count_batch()
        if count == 0 or self.running_mean is None:  # an empty batch is counted but has no statistics, as in torch
            return
        if self.running_var_kind == "unbiased":
            var = var * (count / (count - 1))
        move(self.running_mean, mean, self.debias(momentum))
        move(self.running_var, var, self.debias(momentum) if self.running_var_init == 0 else momentum)

    def count_batch(self) -> float | Tensor:
        """The weight of this batch: 1 - decay_t with ``decay_warmup``, else as in the base class."""
        momentum = super().count_batch()
        if not self.decay_warmup or self.num_batches_tracked is None or self.momentum is None:
            return momentum
        t = self.num_batches_tracked.double() - 1  # batches before this one
        return 1 - ((1 + t) / (10 + t)).clamp(max=1 - momentum)

    def debias(self, momentum: float | Tensor) -> float | Tensor:
        """The weight of this batch in an average that started at zero: momentum / (1 - (1 - momentum)^t)."""
        if not self.zero_debias or self.num_batches_tracked is None or self.momentum is None:
            return momentum
        return momentum / (1 - (1 - momentum) ** self.num_batches_tracked.double())

    def share_left(self, num_batches: int) -> float:
        """The larger share of the two, running mean and running variance.

        decay^num_batches; with ``decay_warmup`` the product of all decay_t; with ``zero_debias`` and
        ``running_var_init=0``, which correct both, 0 after one batch.
        """
        share = super().share_left(num_batches)
        if self.zero_debias and self.running_var_init == 0:
            return share if num_batches == 0 else 0.0
        if self.decay_warmup and self.track_running_stats:
            return math.prod(min(1 - self.momentum, (1 + t) / (10 + t)) for t in range(num_batches))
        return share

    def momentum_setting(self, momentum: float) -> str:
        return f"{super().momentum_setting(momentum)} (norm.decay={1 - momentum:.6g})"

    def ways_to_forget(self) -> list[str]:
        if self.zero_debias:  # the variance is left, since the mean always starts at 0
            return ["set norm.running_var_init=0"]
        return [] if self.decay_warmup else super().ways_to_forget()

    def extra_repr(self) -> str:
        differences = {
            "scale=False": self.affine and self.weight is None,
            "center=False": self.affine and self.bias is None,
            "zero_debias=True": self.zero_debias,
            "decay_warmup=True": self.decay_warmup,
        }
        shown = [text for text, differs in differences.items() if differs]
        return ", ".join([super().extra_repr(), f"running_var={self.running_var_kind}", *shown])


def check_decay(momentum: float | None, zero_debias: bool, decay_warmup: bool) -> None:
    """Raise :class:`UserError` for both options at once, and for one of them without a momentum above 0."""
    if zero_debias and decay_warmup:
        raise UserError(
            "norm.zero_debias=True and norm.decay_warmup=True: each changes the weights of the first batches in its "
            "own way; give one of them"
        )
    for name, asked in (("zero_debias", zero_debias), ("decay_warmup", decay_warmup)):
        if asked and (momentum is None or not 0 < momentum <= 1):
            raise UserError(
                f"norm.{name}=True: needs a weight of the new batch above 0, not norm.momentum={momentum}; "
                f"give one such as 0.1 (decay=0.9), or leave out {name}"
            )


def count_values(x: Tensor, weights: Tensor | None) -> float:
    """The number of values per channel in ``x`` (N, C, ...); with ``weights`` (N,), the sum of their weights."""
    if x.numel() == 0:
        return 0
    if weights is None:
        return x.numel() // x.shape[1]
    if weights.shape != x.shape[:1]:
        raise ValueError(f"expected one weight per example, {tuple(x.shape[:1])}, got {tuple(weights.shape)}")
    if not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError("expected finite weights of 0 or more: the frequencies of the examples")
    count = float(weights.double().sum()) * x[0, 0].numel()
    if not count > 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got weights that add up to {count:g}")
    return count


def average(z: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over all dimensions but channels, (C,), in which example n counts ``weights[n]`` times."""
    dims = [d for d in range(z.dim()) if d != 1]
    if weights is None:
        return z.mean(dims)
    weights = weights.to(z.dtype).view([-1] + [1] * (z.dim() - 1))
    return (weights * z).sum(dims) / (weights.sum() * z[:1, :1].numel())
