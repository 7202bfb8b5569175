"""ResNet: every residual block ends in one norm call that normalizes, adds and activates.

    stem -> stages of residual blocks, all but the first halve the size -> global average pool -> dense

He et al. 2015; by default the 18-layer net of the D2L tutorials, whose shortcuts carry no norm.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.models.initialize import Weights

Norm = Callable[..., nn.Module]
MOST_BLOCKS = 1000  # more take hours to build


class Residual(nn.Module):
    """activation(norm(conv3x3(activation(norm(conv3x3(x))))) + shortcut(x)), the first convolution strided.

    The shortcut is x itself, or a strided 1x1 convolution where the shape changes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Norm,
        stride: int = 1,
        activation: str = "relu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = norm(out_channels, activation=activation)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = norm(out_channels, activation=activation)
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        else:
            # No norm follows, but the bias of norm2 is added to the same sum.
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(y), residual=self.shortcut(x))


class ResNet(nn.Sequential):
    """Residual stages of ``blocks[i]`` blocks at ``widths[i]`` channels; (N, C, H, W) to (N, num_classes).

    ``stem="imagenet"`` quarters the size (conv 7x7/2, norm, activation, maxpool 3/2), ``"cifar"`` keeps it
    (conv 3x3, norm, activation). Sizes round up, so images of any size work.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_classes: int,
        norm: Norm,
        *,
        stem: str = "imagenet",
        blocks: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        activation: str = "relu",
        bias: bool = False,
        init: str = "auto",
    ) -> None:
        check_resnet(stem, blocks, widths)
        layers = OrderedDict()
        width = widths[0]
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        layers["conv1"] = nn.Conv2d(in_shape[0], width, kernel, stride=stride, padding=kernel // 2, bias=bias)
        layers["norm1"] = norm(width, activation=activation)
        if stem == "imagenet":
            layers["pool1"] = nn.MaxPool2d(3, stride=2, padding=1)
        for i, (num_blocks, out_width) in enumerate(zip(blocks, widths, strict=True), start=1):
            stage = OrderedDict()
            for j in range(1, num_blocks + 1):
                stride = 2 if i > 1 and j == 1 else 1
                stage[f"block{j}"] = Residual(width, out_width, norm, stride, activation, bias)
                width = out_width
            layers[f"stage{i}"] = nn.Sequential(stage)
        layers["pool2"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["classifier"] = nn.Linear(width, num_classes)
        super().__init__(layers)
        self.initial_weights = Weights(init, activation).check()


def check_resnet(stem: str, blocks: Sequence[int], widths: Sequence[int]) -> None:
    """Raise :class:`UserError` unless these are a known stem and as many positive widths as positive block counts."""
    if stem not in ("imagenet", "cifar"):
        raise UserError(f"model.stem={stem}: not known; choose imagenet or cifar")
    for name, values, example in (("blocks", blocks, "[2,2,2,2]"), ("widths", widths, "[64,128,256,512]")):
        if not isinstance(values, Sequence) or not values or any(type(n) is not int or n < 1 for n in values):
            raise UserError(
                f"model.{name}={values}: every stage needs a positive whole number; "
                f"give a list such as model.{name}={example}"
            )
    if len(blocks) != len(widths):
        raise UserError(
            f"model.blocks={blocks} has {len(blocks)} stages and model.widths={widths} has {len(widths)}; "
            "give both the same length"
        )
    if sum(blocks) > MOST_BLOCKS:
        raise UserError(f"model.blocks={blocks}: {sum(blocks):,} blocks, more than {MOST_BLOCKS:,}; give fewer")
