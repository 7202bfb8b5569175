"""What the layers make of a few images, as pictures."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bnexp.probes.layers import named_layers, smallest_batch, tapped
from bnexp.probes.population import shadow, spread
from bnexp.store.readings import Image, Reading
from bnexp.train.probe import Probe
from bnexp.train.run import Run

SIDE = 64  # pixels that a map should have at least
GAP = 2  # pixels between maps


class Features(Probe):
    """A picture ``features/<layer>`` of each of the first ``layers`` layers that put out maps of more than one pixel.

    A row per image and a column per channel, the first ``channels`` of them, of ``images`` validation images (always
    the same; training images where none are set aside) in evaluation mode. Every map (H, W) is scaled to its own
    smallest and largest value, from black to white, and enlarged by repeating pixels until it has 64 or more. A map of
    one value, and pixels that are not a number, are black.
    """

    def __init__(self, every: int = 1000, layers: int = 8, images: int = 4, channels: int = 4) -> None:
        super().__init__(every)
        self.layers = self.at_least("layers", layers, 1, "layers with a picture each")
        self.images = self.at_least("images", images, 1, "images, a row each")
        self.channels = self.at_least("channels", channels, 1, "channels, a column each")

    @torch.no_grad()
    def look(self, run: Run, before: object) -> Iterator[Reading]:
        model = shadow(run).eval()
        maps: dict[str, Tensor] = {}

        def see(name: str, _: Tensor, output: Tensor) -> None:
            if output.dim() == 4 and output[0, 0].numel() > 1 and len(maps) < self.layers:
                maps.setdefault(name, grey(output[: self.images, : self.channels]))

        valid, least = run.dataset.valid, smallest_batch(model)
        images = spread(valid if len(valid) >= least else run.dataset.train, max(self.images, least)).images
        with tapped(named_layers(model), see):
            run.forward(run.dataset.prepare(images), model)
        if maps:
            flat = torch.cat([each.flatten() for each in maps.values()]).cpu()
            pieces = flat.split([each.numel() for each in maps.values()])
            for (name, each), piece in zip(maps.items(), pieces, strict=True):
                yield Image(f"features/{name}", grid(piece.view(each.shape)))


def grey(maps: Tensor) -> Tensor:
    """(N, C, H, W) to uint8, every map from 0 at its smallest finite value to 255 at its largest; NaN is 0."""
    maps = maps.double()
    is_finite = maps.isfinite()
    low = torch.where(is_finite, maps, torch.inf).amin((2, 3), keepdim=True)
    high = torch.where(is_finite, maps, -torch.inf).amax((2, 3), keepdim=True)
    share = (maps - low) / (high - low)
    return share.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1).mul(255).round().to(torch.uint8)


def grid(maps: Tensor) -> Tensor:
    """uint8 maps (rows, columns, H, W) side by side on white, (height, width), enlarged to be seen."""
    factor = -(-SIDE // min(maps.shape[2:]))
    maps = maps.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    rows, columns, height, width = maps.shape
    canvas = maps.new_full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), 255)
    for i in range(rows):
        for j in range(columns):
            top, left = GAP + i * (height + GAP), GAP + j * (width + GAP)
            canvas[top : top + height, left : left + width] = maps[i, j]
    return canvas
