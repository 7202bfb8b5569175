"""Fills a model's weights from one generator, so that the same seed gives the same start whatever the norm.

Only convolutions and dense layers draw, in the order the model lists them. Norms start from constants,
so exchanging one for another moves nobody's place in the stream.
"""

import math

from torch import Generator, nn
from torch.nn.modules.conv import _ConvNd


def initialize(model: nn.Module, generator: Generator) -> None:
    """Draw every weight and bias of ``model``'s convolutions and dense layers, in place.

    torch's default: weights and biases ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which kaiming_uniform with
    a = sqrt(5) says in other words (He et al. 2015, and ``reset_parameters`` in ``torch.nn``). Where the
    model states a ``weight_init_std``: weights ~ N(0, weight_init_std) and biases 0.

    ``generator`` lives on the device of the parameters; on CPU the numbers are the same on every machine.
    """
    std = getattr(model, "weight_init_std", None)
    for module in model.modules():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        if std is not None:
            nn.init.normal_(module.weight, 0.0, std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            continue
        nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
        if module.bias is not None:
            bound = 1 / math.sqrt(module.weight[0].numel())
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
