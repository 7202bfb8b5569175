"""Dynamic tanh: a norm's scale and shift around a tanh, without statistics."""

import torch
from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.norms.base import FLOAT32, Norm, check_activation, check_input, finish, scale_and_shift


class DynamicTanh(Norm):
    """``activation(weight * tanh(alpha * x) + bias + residual)``; Zhu et al. 2025, arXiv:2503.10622, equation 2.

    ``alpha`` is one learnable scalar, ``alpha_init`` at the start; :class:`UserError` unless this is finite and not 0
    in float32. Weight, 1 at the start, and bias, 0, are one per channel. Half-precision inputs are computed in float32
    and rounded once, to the input's dtype.
    """

    def __init__(
        self, num_features: int, alpha_init: float = 0.5, *, activation: str = "identity", bias: bool = True
    ) -> None:
        super().__init__()
        if not FLOAT32.tiny <= abs(alpha_init) <= FLOAT32.max:
            raise UserError(f"norm.alpha_init={alpha_init}: the tanh would be the same for every input; give 0.5, say")
        self.num_features = num_features
        self.activation = check_activation(activation)
        self.alpha = nn.Parameter(torch.tensor(float(alpha_init)))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        check_input(x, residual, self.num_features)
        z = x if x.dtype == torch.float64 else x.float()
        y = scale_and_shift(torch.tanh(self.alpha * z), self.weight, self.bias)
        return finish(y.to(x.dtype), residual, self.activation)

    def extra_repr(self) -> str:
        return f"{self.num_features}, bias={self.bias is not None}, activation={self.activation}"
