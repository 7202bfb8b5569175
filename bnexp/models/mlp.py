"""The fully connected network: the smallest model that shows what normalization does.

    flatten -> (dense -> norm, activation) for each hidden width -> dense

Figure 1 of Ioffe & Szegedy 2015 uses three hidden layers of 100 units with sigmoid and weights ~ N(0, 0.01).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from bnexp.errors import UserError
from bnexp.models.initialize import Weights


class MLP(nn.Sequential):
    """Dense layers with a norm after all but the last: (N, ...) to (N, num_classes).

    Without hidden layers it is softmax regression. ``weight_init_std`` is the deviation of Gaussian weights, instead
    of ``init`` (:func:`bnexp.models.initialize.initialize`).
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_classes: int,
        norm: Callable[..., nn.Module],
        *,
        hidden: Sequence[int] = (32, 32),
        activation: str = "relu",
        bias: bool = False,
        init: str = "auto",
        weight_init_std: float | None = None,
    ) -> None:
        if not isinstance(hidden, Sequence) or any(type(width) is not int or width < 1 for width in hidden):
            raise UserError(
                f"model.hidden={hidden}: hidden layers have a positive whole number of units each; "
                "give a list such as model.hidden=[32,32], or [] for none"
            )
        is_number = type(weight_init_std) in (int, float)
        if weight_init_std is not None and not (is_number and 0 < weight_init_std < math.inf):
            raise UserError(
                f"model.weight_init_std={weight_init_std}: a standard deviation is a number above 0; "
                "give one such as 0.01, or null for the weights of model.init"
            )
        layers = OrderedDict(flatten=nn.Flatten())
        width = math.prod(in_shape)
        for i, hidden_width in enumerate(hidden, start=1):
            layers[f"dense{i}"] = nn.Linear(width, hidden_width, bias=bias)
            layers[f"norm{i}"] = norm(hidden_width, activation=activation)
            width = hidden_width
        layers["classifier"] = nn.Linear(width, num_classes)
        super().__init__(layers)
        self.initial_weights = Weights(init, activation, weight_init_std).check()
