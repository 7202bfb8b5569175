"""LeNet with a norm before every activation: two norms after convolutions, two after dense layers.

    conv 6 5x5 -> norm, activation -> maxpool 2 -> conv 16 5x5 -> norm, activation -> maxpool 2
    -> dense 120 -> norm, activation -> dense 84 -> norm, activation -> dense

LeCun et al. 1998, as the D2L tutorials modernize it: 44,878 parameters at 28x28 with batch norm and biases.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.models.initialize import Weights


class LeNet(nn.Module):
    """LeNet for images of 16x16 pixels or more: (N, C, H, W) to (N, num_classes)."""

    def __init__(
        self,
        in_shape: Sequence[int],
        num_classes: int,
        norm: Callable[..., nn.Module],
        *,
        activation: str = "relu",
        bias: bool = False,
        init: str = "auto",
    ) -> None:
        super().__init__()
        in_channels, height, width = in_shape
        # Twice, an unpadded 5x5 convolution takes 4 pixels off and a pooling halves the rest.
        pooled_height, pooled_width = (((size - 4) // 2 - 4) // 2 for size in (height, width))
        if min(pooled_height, pooled_width) < 1:
            raise UserError(
                f"model=lenet: {height}x{width} images are too small, nothing is left after the second "
                "pooling; the smallest that works is 16x16 (data.size=16)"
            )
        self.conv1 = nn.Conv2d(in_channels, 6, 5, bias=bias)
        self.norm1 = norm(6, activation=activation)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5, bias=bias)
        self.norm2 = norm(16, activation=activation)
        self.pool2 = nn.MaxPool2d(2)
        self.dense1 = nn.Linear(16 * pooled_height * pooled_width, 120, bias=bias)
        self.norm3 = norm(120, activation=activation)
        self.dense2 = nn.Linear(120, 84, bias=bias)
        self.norm4 = norm(84, activation=activation)
        self.classifier = nn.Linear(84, num_classes)
        self.initial_weights = Weights(init, activation).check()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.norm1(self.conv1(x)))
        x = self.pool2(self.norm2(self.conv2(x)))
        x = self.norm3(self.dense1(x.flatten(1)))
        x = self.norm4(self.dense2(x))
        return self.classifier(x)
