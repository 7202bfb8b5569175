"""No normalization: a learnable scalar, 0 at the start, on every residual branch."""

import torch
from torch import Tensor, nn

from bnexp.norms.base import check_input, finish, scale_and_shift
from bnexp.norms.none import Shift


class SkipInit(Shift):
    """``activation(alpha * (x + bias) + residual)``, alpha one scalar per norm; De & Smith 2020, arXiv:2002.10444.

    alpha is 0 at the start, so that a residual block is its shortcut. Section 3 of the paper: batch norm lets deep
    residual networks train because it makes the residual branches small beside the shortcuts.

    Without a residual it is :class:`~bnexp.norms.none.Shift`, and alpha gets no gradient. ``bias`` is one per channel.
    """

    def __init__(self, num_features: int, bias: bool = True, *, activation: str = "identity") -> None:
        super().__init__(num_features, bias, activation=activation)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return super().forward(x)
        check_input(x, residual, self.num_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return finish(self.alpha.to(x.dtype) * scale_and_shift(x, None, bias), residual, self.activation)
