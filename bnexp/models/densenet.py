"""DenseNet: every layer normalizes the outputs of all layers of its block before it.

    conv 7x7/2 -> norm, activation -> maxpool 3/2 -> dense blocks with transitions between them
    -> norm, activation -> global average pool -> dense

Huang et al. 2017, in the small form of the D2L tutorials (conv3x3 layers without bottlenecks).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.models.initialize import Weights

Norm = Callable[..., nn.Module]
MOST_DENSE_LAYERS = 500  # more take hours to build


class DenseLayer(nn.Module):
    """concat(x, conv3x3(activation(norm(x)))): (N, C, H, W) to (N, C + growth, H, W)."""

    def __init__(self, in_channels: int, growth: int, norm: Norm, activation: str, bias: bool) -> None:
        super().__init__()
        self.norm = norm(in_channels, activation=activation)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.norm(x))], dim=1)


class DenseBlock(nn.Sequential):
    """``num_layers`` dense layers: (N, C, H, W) to (N, C + num_layers * growth, H, W)."""

    def __init__(
        self, in_channels: int, num_layers: int, growth: int, norm: Norm, activation: str = "relu", bias: bool = False
    ) -> None:
        layers = [DenseLayer(in_channels + i * growth, growth, norm, activation, bias) for i in range(num_layers)]
        super().__init__(OrderedDict((f"layer{i}", layer) for i, layer in enumerate(layers, start=1)))


class Transition(nn.Sequential):
    """norm, activation, conv1x1, average pool 2: (N, C, H, W) to (N, out_channels, H/2, W/2).

    Odd sizes round up; a window at the edge averages the pixels that it has. The sizes of the paper (224) and of the
    tutorials (96) stay even. Images of 28 pixels would not survive rounding down: 7, 3, 1, 0.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: Norm, activation: str = "relu", bias: bool = False
    ) -> None:
        layers = OrderedDict(
            norm=norm(in_channels, activation=activation),
            conv=nn.Conv2d(in_channels, out_channels, 1, bias=bias),
            pool=nn.AvgPool2d(2, ceil_mode=True),
        )
        super().__init__(layers)


class DenseNet(nn.Sequential):
    """Dense blocks of ``blocks[i]`` layers with a transition between two blocks: (N, C, H, W) to (N, num_classes).

    A transition halves channels, height and width. Sizes round up, so images of any size work.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_classes: int,
        norm: Norm,
        *,
        growth: int = 32,
        blocks: Sequence[int] = (4, 4, 4, 4),
        stem_width: int = 64,
        activation: str = "relu",
        bias: bool = False,
        init: str = "auto",
    ) -> None:
        check_densenet(growth, blocks, stem_width)
        layers = OrderedDict(
            conv1=nn.Conv2d(in_shape[0], stem_width, 7, stride=2, padding=3, bias=bias),
            norm1=norm(stem_width, activation=activation),
            pool1=nn.MaxPool2d(3, stride=2, padding=1),
        )
        width = stem_width
        for i, num_layers in enumerate(blocks, start=1):
            if i > 1:
                layers[f"transition{i - 1}"] = Transition(width, width // 2, norm, activation, bias)
                width //= 2
            layers[f"block{i}"] = DenseBlock(width, num_layers, growth, norm, activation, bias)
            width += num_layers * growth
        layers.update(
            norm2=norm(width, activation=activation),
            pool2=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(width, num_classes),
        )
        super().__init__(layers)
        self.initial_weights = Weights(init, activation).check()


def check_densenet(growth: int, blocks: Sequence[int], stem_width: int) -> None:
    """Raise :class:`UserError` unless these are positive whole numbers and not too many layers."""
    for name, value in (("growth", growth), ("stem_width", stem_width)):
        if type(value) is not int or value < 1:
            raise UserError(f"model.{name}={value}: a number of channels; give a positive whole number")
    if not isinstance(blocks, Sequence) or not blocks or any(type(n) is not int or n < 1 for n in blocks):
        raise UserError(f"model.blocks={blocks}: every block needs a positive whole number of layers, as in [4,4,4,4]")
    if sum(blocks) > MOST_DENSE_LAYERS:
        raise UserError(f"model.blocks={blocks}: {sum(blocks):,} layers, more than {MOST_DENSE_LAYERS:,}; give fewer")
