"""Initial weights from one generator, so that the same seed gives the same weights whatever the norm.

Only convolutions and dense layers draw numbers, in the order in which the model lists them. Norms start from
constants, so another norm does not change what the layers draw.
"""

import math
from typing import NamedTuple

from torch import Generator, nn
from torch.nn.modules.conv import _ConvNd

from bnexp.errors import UserError

RULES = ("auto", "torch", "he", "xavier", "lecun")
GAINS = {"relu": math.sqrt(2), "tanh": 5 / 3, "sigmoid": 1.0, "identity": 1.0}  # torch.nn.init.calculate_gain


class Weights(NamedTuple):
    """How a model draws its weights: a rule of :func:`initialize`, the model's activation, a fixed deviation.

    A model of bnexp has one as its attribute ``initial_weights``; a model from elsewhere keeps its ``own``.
    """

    init: str = "torch"
    activation: str = "relu"
    std: float | None = None

    def check(self) -> "Weights":
        """Return the rule; :class:`UserError` if it is not known, or if ``std`` leaves it nothing to say."""
        if self.init not in RULES:
            raise UserError(f"model.init={self.init}: not known; choose one of {', '.join(RULES)}")
        if self.std is not None and self.init not in ("auto", "torch"):
            raise UserError(
                f"model.init={self.init} and model.weight_init_std={self.std}: both give the size of the weights; "
                "leave one of them out"
            )
        return self

    @property
    def rule(self) -> str:
        """``init``; for ``auto`` he with relu, else xavier, whose derivation assumes a linear response around 0."""
        return self.init if self.init != "auto" else "he" if self.activation == "relu" else "xavier"


def initialize(model: nn.Module, generator: Generator) -> None:
    """Draw the weights and biases of ``model``'s convolutions and dense layers, in place.

    A layer has ``n`` inputs and ``m`` outputs per unit, g is the gain of the model's activation (:data:`GAINS`):

        torch     weights and biases ~ U(-1/sqrt(n), 1/sqrt(n)), the ``reset_parameters`` of ``torch.nn``
        he        N(0, g^2 / n)                          He et al. 2015, arXiv:1502.01852, equation 10
        xavier    U(-b, b), b = g sqrt(6 / (n + m))      Glorot & Bengio 2010, equation 16
        lecun     N(0, 1 / n)                            LeCun et al. 1998, "Efficient BackProp", equation 16

    With ``model.weight_init_std`` weights are ~ N(0, weight_init_std^2). Biases are 0 in all rules but torch's. A model
    that has no ``initial_weights`` gets torch's.

    ``generator`` lives on the device of the parameters; on CPU the numbers are the same on every machine.
    """
    weights = getattr(model, "initial_weights", Weights())
    if weights.init == "own":
        return
    for module in model.modules():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        root, gain = math.sqrt(module.weight[0].numel()), GAINS.get(weights.activation, 1.0)
        is_torchs = weights.std is None and weights.rule == "torch"
        if is_torchs:
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
        elif weights.std is None and weights.rule == "xavier":
            nn.init.xavier_uniform_(module.weight, gain, generator=generator)
        else:
            std = weights.std or (gain if weights.rule == "he" else 1.0) / root
            nn.init.normal_(module.weight, 0.0, std, generator=generator)
        if module.bias is not None and is_torchs:
            nn.init.uniform_(module.bias, -1 / root, 1 / root, generator=generator)
        elif module.bias is not None:
            nn.init.zeros_(module.bias)
