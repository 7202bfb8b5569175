"""No normalization, only a shift per channel and the activation."""

import torch
from torch import Tensor, nn

from bnexp.norms.base import Norm, check_activation, check_input, finish, scale_and_shift


class Shift(Norm):
    """``activation(x + bias + residual)`` with one bias per channel, 0 at the start.

    Batch norm has a shift per channel, so the layer before a norm has no bias. With this module a network without
    normalization has the same shifts, and models need no branch for their biases. ``bias=False`` leaves it out, for a
    model whose layers have biases (``model.bias=true``): two shifts of a channel would move twice as fast as one.
    """

    normalizes = False

    def __init__(self, num_features: int, bias: bool = True, *, activation: str = "identity") -> None:
        super().__init__()
        self.num_features = num_features
        self.activation = check_activation(activation)
        self.bias = nn.Parameter(torch.zeros(num_features)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        check_input(x, residual, self.num_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return finish(scale_and_shift(x, None, bias), residual, self.activation)

    def extra_repr(self) -> str:
        return f"{self.num_features}, bias={self.bias is not None}, activation={self.activation}"
