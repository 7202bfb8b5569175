"""What every implementation of batch normalization shares: its settings, its buffers, its last step.

The contract of a norm is one call per site, ``norm(x, residual) = activation(normalize(x) + residual)``,
because normalization, addition and activation together are what one kernel can do in one pass.
"""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from bnexp.errors import UserError

ACTIVATIONS = {"identity": None, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


def check_activation(activation: str) -> str:
    """Return ``activation`` if a norm can end with it, else raise :class:`UserError`."""
    if activation not in ACTIVATIONS:
        raise UserError(f"activation={activation}: not known; choose one of {', '.join(ACTIVATIONS)}")
    return activation


def finish(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """``activation(y + residual)``, the end of every norm that is not fused."""
    if residual is not None:
        y = y + residual
    function = ACTIVATIONS[activation]
    return y if function is None else function(y)


class BatchNormBase(_NormBase):
    """The settings and buffers of ``torch.nn.BatchNorm1d/2d/3d`` plus an activation; no arithmetic.

    The state dict has torch's keys (``weight bias running_mean running_var num_batches_tracked``), so a
    checkpoint of one implementation loads into every other and into ``torch.nn``.

    ``momentum`` is the weight of the *new* batch in the running statistics; ``None`` asks for the
    cumulative average over all batches seen.
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
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not eps >= 0:
            raise UserError(f"norm.eps={eps}: is added to a variance under a root; give 0 or more, 1e-5 as a rule")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation = check_activation(activation)

    def uses_batch_statistics(self) -> bool:
        """In training, and in evaluation when no running statistics are kept, as in ``torch.nn``."""
        return self.training or (self.running_mean is None and self.running_var is None)

    def check(self, x: Tensor, residual: Tensor | None) -> None:
        """Refuse what ``torch.nn`` refuses: wrong rank, width or kind, or one value per channel to average over."""
        if not 2 <= x.dim() <= 5:
            raise ValueError(f"expected a 2-D to 5-D input with channels at dimension 1, got {tuple(x.shape)}")
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels at dimension 1, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"expected floating-point numbers, got {x.dtype}")
        if self.uses_batch_statistics() and x.numel() == x.shape[1]:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
            )
        if residual is not None and residual.shape != x.shape:
            raise ValueError(f"the residual's shape {tuple(residual.shape)} is not the input's {tuple(x.shape)}")

    def count_batch(self) -> float:
        """Count this training batch and return the weight it gets in the running statistics.

        The weight is ``momentum``, or 1 / (number of batches so far) when ``momentum`` is None. Buffers that
        somebody has set to None, to turn tracking off in a finished network, are left alone, as in torch.
        """
        if self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)

    @staticmethod
    def reduces_over(num_dims: int) -> str:
        """The dimensions that mean and variance are taken over, for an input with ``num_dims`` dimensions."""
        return "N" + {2: "", 3: ", L", 4: ", H, W", 5: ", D, H, W"}[num_dims]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
