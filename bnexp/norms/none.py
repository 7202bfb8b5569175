"""No normalization: the other side of every comparison."""

import torch
from torch import Tensor, nn

from bnexp.norms.base import check_activation, check_input, finish


class Shift(nn.Module):
    """``activation(x + bias + residual)`` with one bias per channel, zero at the start.

    Batch norm carries its own per-channel shift, so the layers before a norm have none. Here the shift
    stays and nothing else does: with and without normalization the network can express the same offsets,
    and no model needs a branch for it.
    """

    def __init__(self, num_features: int, *, activation: str = "identity") -> None:
        super().__init__()
        self.activation = check_activation(activation)
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        check_input(x, residual, len(self.bias))
        bias = self.bias.to(x.dtype).view([-1 if d == 1 else 1 for d in range(x.dim())])
        return finish(x + bias, residual, self.activation)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, activation={self.activation}"
