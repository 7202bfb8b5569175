"""A norm of the user's own, named by its path."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

NONE_GIVEN: Mapping[str, Any] = MappingProxyType({})


def own(
    num_features: int, *, activation: str = "identity", path: Any = None,
    args: Mapping[str, Any] = NONE_GIVEN,
) -> nn.Module:  # fmt: skip
    """What ``path(num_features, activation=..., **args)`` returns: the user's class or function.

    Its forward takes x (N, C) or (N, C, H, W) and a residual, None or of the same shape, and returns
    activation(normalize(x) + residual); :func:`bnexp.norms.base.finish` does the last two steps.
    """
    return path(num_features, activation=activation, **args)
