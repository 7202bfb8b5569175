"""Ghost batch normalization: a batch is split into blocks, and every block is normalized by its own statistics."""

import torch
from torch import Tensor

from bnexp.errors import UserError
from bnexp.norms.base import BatchNormBase, check_input, divisors, finish, move, per_channel, scale_and_shift


class GhostBatchNorm(BatchNormBase):
    """Hoffer, Hubara & Soudry, "Train longer, generalize better", 2017 (arXiv:1705.08741), algorithm 1; as a
    regularizer in Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization", 2020
    (arXiv:1906.03548).

    In training the N examples of ``x`` (N, C) or (N, C, ...) form N / virtual_batch blocks of consecutive examples.
    For every block b and channel c, over the m values of the channel in the block::

        mean = sum(x) / m
        var  = sum((x - mean)^2) / m
        y    = weight * (x - mean) / sqrt(var + eps) + bias

    One block of all examples is batch normalization. Evaluation uses the running statistics and no blocks.

    The running statistics move once per batch, by ``momentum``, towards the mean over the blocks of ``mean`` and of
    ``var * m / (m - 1)``. If the m values of a block are independent draws, as the examples of a shuffled batch are
    for (N, C), every block's two estimates of the population's mean and variance are unbiased. So is their mean over
    the blocks, and it is less noisy. The pixels of one image are not independent, so m - 1 corrects too little: the
    variance is too small by a share of up to 1 / virtual_batch, as for a batch of that size in ``torch.nn``. Hoffer
    et al. move the running statistics once per block instead, as if the blocks were successive batches: the last block
    of a batch weighs most, and with more blocks the initial values fade faster.

    :class:`UserError` for a batch size that ``virtual_batch`` does not divide, and for blocks of one value per channel.
    """

    implements_batch_norm = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        activation: str = "identity",
        bias: bool = True,
        virtual_batch: int = 32,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if type(virtual_batch) is not int or virtual_batch < 1:
            raise UserError(f"norm.virtual_batch={virtual_batch}: a number of examples; give a positive whole number")
        self.virtual_batch = virtual_batch
        super().__init__(
            num_features, eps, momentum, affine, activation=activation, bias=bias, device=device, dtype=dtype
        )  # fmt: skip

    def check_batch_size(self, batch_size: int) -> None:
        """Raise :class:`UserError` unless ``virtual_batch`` divides ``batch_size``."""
        if batch_size % self.virtual_batch:
            able = ", ".join(map(str, divisors(batch_size)[1:])) or "1"
            raise UserError(
                f"norm=ghost: a batch of {batch_size} cannot be split into blocks of {self.virtual_batch}; set "
                f"norm.virtual_batch to a divisor of {batch_size} ({able}) or batch_size to a multiple of "
                f"{self.virtual_batch}"
            )

    def check(self, x: Tensor, residual: Tensor | None) -> None:
        check_input(x, residual, self.num_features)
        if not self.uses_batch_statistics():
            return
        self.check_batch_size(len(x))
        if x.numel() and self.virtual_batch * x[0, 0].numel() == 1:
            raise UserError(
                "norm=ghost: expected more than 1 value per channel in every block when training, got an input of size "
                f"{tuple(x.shape)} with norm.virtual_batch=1; set it to 2 or more"
            )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.check(x, residual)
        z = x if x.dtype == torch.float64 else x.float()
        if self.uses_batch_statistics():
            z = z.unflatten(0, (len(x) // self.virtual_batch, self.virtual_batch))  # (blocks, virtual_batch, C, ...)
            dims = [d for d in range(z.dim()) if d not in (0, 2)]
            mean = z.mean(dims, keepdim=True)
            var = (z - mean).square().mean(dims, keepdim=True)
            if self.training:
                self.track(mean.detach().flatten(1), var.detach().flatten(1), z[:1, :, :1].numel())
            xhat = ((z - mean) / torch.sqrt(var + self.eps)).flatten(0, 1)
        else:
            mean, var = (per_channel(t.to(z.dtype), z) for t in (self.running_mean, self.running_var))
            xhat = (z - mean) / torch.sqrt(var + self.eps)
        y = scale_and_shift(xhat, self.weight, self.bias)
        return finish(y.to(x.dtype), residual, self.activation)

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Count the batch and move the running statistics towards those of its blocks.

        ``mean`` and ``var`` are (blocks, C), each over ``count`` values.
        """
        momentum = self.count_batch()
        if count == 0 or self.running_mean is None:  # an empty batch is counted but has no statistics, as in torch
            return
        move(self.running_mean, mean.mean(0), momentum)
        move(self.running_var, (var * (count / (count - 1))).mean(0), momentum)

    def reduces_over(self, num_dims: int) -> str:
        """``32 of N, H, W``, in training."""
        return f"{self.virtual_batch} of {super().reduces_over(num_dims)}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch={self.virtual_batch}"
