"""What norms share: the settings and buffers of batch normalization, the checks of an input, the last step.

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


def scale_and_shift(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``weight * xhat + bias`` with one weight and one bias per channel, dimension 1; None leaves its part out."""
    per_channel = [-1 if d == 1 else 1 for d in range(xhat.dim())]
    if weight is not None:
        xhat = weight.view(per_channel) * xhat
    return xhat if bias is None else xhat + bias.view(per_channel)


def move(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """``running = (1 - momentum) * running + momentum * batch`` in place.

    Computed in the precision of ``batch`` and rounded once, to that of the buffer.
    """
    running.copy_((1 - momentum) * running.to(batch.dtype) + momentum * batch)


def check_input(x: Tensor, residual: Tensor | None, num_features: int) -> None:
    """Raise ValueError, as ``torch.nn`` does, for input of the wrong rank, width or kind; for any other residual."""
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"expected a 2-D to 5-D input with channels at dimension 1, got {tuple(x.shape)}")
    if x.shape[1] != num_features:
        raise ValueError(f"expected {num_features} channels at dimension 1, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"expected floating-point numbers, got {x.dtype}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"the residual's shape {tuple(residual.shape)} is not the input's {tuple(x.shape)}")


def check_eps(eps: float) -> None:
    """Raise :class:`UserError` for what cannot be added to a variance."""
    if not eps >= 0:
        raise UserError(f"norm.eps={eps}: is added to a variance under a root; give 0 or more, 1e-5 as a rule")


def divisors(number: int) -> list[int]:
    """The whole numbers that divide ``number``, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


class BatchNormBase(_NormBase):
    """The settings and buffers of ``torch.nn.BatchNorm1d/2d/3d`` plus an activation; no arithmetic.

    The state dict has torch's keys (``weight bias running_mean running_var num_batches_tracked``), so a
    checkpoint of one implementation loads into every other and into ``torch.nn``.

    ``momentum`` is the weight of the *new* batch in the running statistics; ``None`` asks for the
    cumulative average over all batches seen.
    """

    # Implementations of batch normalization give the same numbers: parity holds them together and bench compares
    # their speed. A class that only shares its settings and buffers, but computes something else, says False.
    implements_batch_norm = True

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
        check_eps(eps)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation = check_activation(activation)

    def uses_batch_statistics(self) -> bool:
        """In training, and in evaluation when no running statistics are kept, as in ``torch.nn``."""
        return self.training or (self.running_mean is None and self.running_var is None)

    def check(self, x: Tensor, residual: Tensor | None) -> None:
        """Refuse what ``torch.nn`` refuses: wrong rank, width or kind, or one value per channel to average over."""
        check_input(x, residual, self.num_features)
        if self.uses_batch_statistics() and x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")

    def count_batch(self) -> float:
        """Count this training batch and return the weight it gets in the running statistics.

        The weight is ``momentum``, or 1 / (number of batches so far) when ``momentum`` is None. Buffers that
        somebody has set to None, to turn tracking off in a finished network, are left alone, as in torch.
        """
        if self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)

    def share_left(self, num_batches: int) -> float:
        """How much of the running statistics' initial values is left after ``num_batches`` training batches.

        1 is all of it: every batch multiplies the share by 1 - momentum, so it is (1 - momentum)^num_batches.
        A cumulative average forgets it with the first batch, and where nothing is tracked nothing is ever used.
        """
        if not self.track_running_stats:
            return 0.0
        if self.momentum is None:
            return 0.0 if num_batches else 1.0
        return float((1 - self.momentum) ** num_batches)

    @staticmethod
    def reduces_over(num_dims: int) -> str:
        """The dimensions that mean and variance are taken over, for an input with ``num_dims`` dimensions."""
        return "N" + {2: "", 3: ", L", 4: ", H, W", 5: ", D, H, W"}[num_dims]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
