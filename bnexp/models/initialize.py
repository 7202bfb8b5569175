"""Initial weights from one generator, so that the same seed gives the same weights whatever the norm.

Only convolutions and dense layers draw numbers, in the order in which the model lists them. Norms start from
constants, so another norm does not change what the layers draw.
"""

import math

from torch import Generator, nn
from torch.nn.modules.conv import _ConvNd


def initialize(model: nn.Module, generator: Generator) -> None:
    """Draw the weights and biases of ``model``'s convolutions and dense layers, in place.

    The default is torch's: weights and biases ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is kaiming_uniform with
    a = sqrt(5) (He et al. 2015; ``reset_parameters`` in ``torch.nn``). With ``model.weight_init_std``, weights are
    ~ N(0, weight_init_std^2) and biases 0.

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
