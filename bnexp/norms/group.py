"""Group normalization: every example is normalized by itself, over groups of its channels."""

import torch
from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.norms.base import Norm, check_activation, check_eps, check_input, divisors, finish, scale_and_shift

NAMED_GROUPS = ("layer", "instance")  # groups that fit every width


class GroupNorm(Norm):
    """Wu & He, "Group Normalization", 2018 (arXiv:1803.08494), equations 1 to 3, 6 and 7.

    The channels of ``x`` (N, C) or (N, C, ...) form ``groups`` groups of C / groups neighbours. For every example
    n and group g, over the m values of the example in the group::

        mean = sum(x) / m
        var  = sum((x - mean)^2) / m
        xhat = (x - mean) / sqrt(var + eps)
        y    = weight * xhat + bias          weight, bias: one per channel

    ``groups`` is a number that divides C, or a word that fits every width: ``layer`` is one group, which is
    layer norm over channels and pixels; ``instance`` is as many groups as channels, which is instance norm.

    Examples do not depend on each other, so there are no running statistics and evaluation does what training does.
    Half-precision inputs are normalized in float32 and the result is rounded once, to the input's dtype. The state
    dict has the keys of ``torch.nn.GroupNorm``.

    :class:`UserError` for groups that do not divide C and, in the forward pass, for groups of one value, as in an
    (N, C) input with ``instance``: the variance is 0 and the output would not depend on the input.
    """

    def __init__(
        self,
        num_features: int,
        groups: int | str = 2,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str = "identity",
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_eps(eps)
        self.num_features, self.groups, self.eps, self.affine = num_features, groups, eps, affine
        self.num_groups = count_groups(groups, num_features)
        self.activation = check_activation(activation)
        kind = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **kind)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_features, **kind)) if affine and bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        check_input(x, residual, self.num_features)
        z = x if x.dtype == torch.float64 else x.float()
        z = z.unflatten(1, (self.num_groups, self.num_features // self.num_groups))  # (N, groups, C / groups, ...)
        if z.numel() and z[0, 0].numel() == 1:
            raise UserError(
                f"norm=group: expected more than 1 value per group, got an input of size {tuple(x.shape)} with "
                f"norm.groups={self.groups}; after dense layers and on images of one pixel a channel has one value; "
                "set norm.groups=layer or a smaller number"
            )
        dims = list(range(2, z.dim()))
        mean = z.mean(dims, keepdim=True)
        var = (z - mean).square().mean(dims, keepdim=True)
        xhat = ((z - mean) / torch.sqrt(var + self.eps)).flatten(1, 2)
        y = scale_and_shift(xhat, self.weight, self.bias)
        return finish(y.to(x.dtype), residual, self.activation)

    def reduces_over(self, num_dims: int) -> str:
        """As ``C/2, H, W`` for half of the channels and all pixels."""
        channels = {1: ["C"], self.num_features: []}.get(self.num_groups, [f"C/{self.num_groups}"])
        return ", ".join(channels + {2: [], 3: ["L"], 4: ["H", "W"], 5: ["D", "H", "W"]}[num_dims])

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, groups={self.groups}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )


def count_groups(groups: int | str, num_features: int) -> int:
    """The number of groups of ``num_features`` channels; :class:`UserError` unless it divides ``num_features``."""
    if groups in NAMED_GROUPS:
        return 1 if groups == "layer" else num_features
    if type(groups) is not int or groups < 1:
        raise UserError(f"norm.groups={groups}: not known; give a positive whole number, {' or '.join(NAMED_GROUPS)}")
    if num_features % groups:
        able = ", ".join(map(str, divisors(num_features)))
        raise UserError(
            f"norm=group: {num_features} channels cannot be split into {groups} groups; "
            f"set norm.groups to a divisor of {num_features} ({able})"
        )
    return groups
