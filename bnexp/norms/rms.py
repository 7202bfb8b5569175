"""Root mean square normalization: every example is divided by its own size, nothing is subtracted."""

import torch
from torch import Tensor, nn

from bnexp.norms.base import Norm, check_activation, check_eps, check_input, finish, scale_and_shift


class RMSNorm(Norm):
    """Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467), equation 4.

    For every example of ``x`` (N, C) or (N, C, ...), over its m values of all channels and pixels::

        y = weight * x / sqrt(sum(x^2) / m + eps) + bias      weight, bias: one per channel, 1 and 0 at the start

    The paper's bias is that of the layer before, which models leave out before a norm. Examples do not depend on each
    other: evaluation does what training does. Half-precision inputs are computed in float32 and rounded once.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, *, activation: str = "identity", bias: bool = True
    ) -> None:
        super().__init__()
        check_eps(eps)
        self.num_features, self.eps = num_features, eps
        self.activation = check_activation(activation)
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        check_input(x, residual, self.num_features)
        z = x if x.dtype == torch.float64 else x.float()
        size = torch.sqrt(z.square().mean(list(range(1, z.dim())), keepdim=True) + self.eps)
        y = scale_and_shift(z / size, self.weight, self.bias)
        return finish(y.to(x.dtype), residual, self.activation)

    def reduces_over(self, num_dims: int) -> str:
        return "C" + {2: "", 3: ", L", 4: ", H, W", 5: ", D, H, W"}[num_dims]

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, bias={self.bias is not None}, activation={self.activation}"
