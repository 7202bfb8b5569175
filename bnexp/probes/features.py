"""Feature maps: the outputs of layers for single images, as pictures."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bnexp.data.dataset import Split
from bnexp.probes.layers import named_layers, smallest_batch, tapped
from bnexp.probes.population import shadow, some_of
from bnexp.store.readings import Image, Reading, Table
from bnexp.train.probe import Probe
from bnexp.train.run import Run

SIDE, GAP = 64, 2  # the least side of a map, and the gap between maps, in pixels
ACROSS, MOST_MAPS = 8, 16  # maps in a row, and maps of a layer at most
UNITS_ACROSS, MOST_UNITS = 40, 240  # the same for the units of a layer without maps
UNIT, PAPER = 12, 240  # the side of a unit's square in pixels, and the grey of empty squares


class Features(Probe):
    """A picture ``features/<layer>`` for each of the first ``layers`` layers whose output is maps of several pixels.

    A picture has a row for each of ``images`` validation images and a column for each of the first ``channels``
    channels, in evaluation mode. The images are the same every time; training images if there are too few validation
    images. Every map (H, W) is scaled by its own smallest (black) and largest value (white), and enlarged by repeating
    pixels to 64 or more. A map of one value and pixels that are NaN are black.
    """

    def __init__(self, every: int = 1000, layers: int = 8, images: int = 4, channels: int = 4) -> None:
        super().__init__(every)
        self.layers = self.at_least("layers", layers, 1, "layers with a picture each")
        self.images = self.at_least("images", images, 1, "images, a row each")
        self.channels = self.at_least("channels", channels, 1, "channels, a column each")

    def look(self, run: Run, before: object) -> Iterator[Reading]:
        model, valid = shadow(run).eval(), run.dataset.valid
        least = smallest_batch(model, run.batches.batch_size)
        images = some_of(valid if len(valid) >= least else run.dataset.train, max(self.images, least)).images
        _, outputs = outputs_of(run, model, images, range(min(self.images, len(images))))
        maps = {name: each[:, : self.channels] for name, each in outputs.items() if has_maps(each.shape[1:])}
        for name in list(maps)[: self.layers]:
            yield Image(f"features/{name}", tile_maps(to_grey(maps[name]).cpu()))


@torch.no_grad()
def outputs_of(
    run: Run, model: nn.Module, images: Tensor, places: Sequence[int], layers: Sequence[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and layers' outputs (all, or those of ``layers``) for the images at ``places`` of one batch ``images``."""

    modules = {name: each for name, each in named_layers(model).items() if layers is None or name in layers}
    outputs: dict[str, Tensor] = {}

    def see(name: str, _: Tensor, output: Tensor) -> None:
        if isinstance(output, Tensor):
            outputs.setdefault(name, output[list(places)])

    with tapped(modules, see):
        logits = run.forward(run.dataset.prepare(images), model)
    return logits[list(places)], outputs


def has_maps(shape: Sequence[int]) -> bool:
    """Whether an output of this shape, for one image, is maps (C, H, W) of several pixels."""
    return len(shape) == 3 and shape[1] * shape[2] > 1


def look_at_images(run: Run, split: Split, indices: Sequence[int], layers: Sequence[str]) -> Iterator[Reading]:
    """Readings of the run's model, in evaluation mode, on the images ``indices`` of ``split``.

    The table ``predictions``: image, true and predicted class, and the probability of every class. The table
    ``outputs``: for every image and layer the shape of the output, the number of maps or units in the picture, and the
    smallest and largest value. Pictures of every image i: ``image-i`` itself, ``image-i/<layer>`` the first maps or
    units, and ``liveliest-i/<layer>`` the map with the largest standard deviation.

    An image is evaluated in the same chunk as by :meth:`Run.evaluate`, so that its prediction is the same.
    """
    model, classes = shadow(run).eval(), run.dataset.class_names
    seen: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
    every = torch.arange(len(split), device=run.device)
    for picked in (every[chunk] for chunk in run.chunks(split, model)):
        if places := [place for place, index in enumerate(picked.tolist()) if index in indices]:
            logits, outputs = outputs_of(run, model, split.images_at(picked), places, layers)
            for i, index in enumerate(picked[places].tolist()):
                seen[index] = logits[i].softmax(0), {name: outputs[name][i].float().cpu() for name in layers}
    predictions, shapes = [], []
    for index in indices:
        shares, outputs = seen[index]
        predictions.append((index, classes[split.labels[index]], classes[shares.argmax()], *shares.tolist()))
        yield Image(f"image-{index}", split.images_at(slice(index, index + 1))[0].cpu().permute(1, 2, 0).squeeze(2))
        for name, output in outputs.items():
            if has_maps(output.shape):
                liveliest = output.flatten(1).std(1).nan_to_num(-1).argmax()
                yield Image(f"liveliest-{index}/{name}", to_grey(output[None, None, liveliest])[0, 0])
            pixels, pictured = picture_output(output)
            yield Image(f"image-{index}/{name}", pixels)
            shape = tuple(output.shape if has_maps(output.shape) else output.flatten().shape)
            shapes.append((index, name, shape, pictured, *map(float, output.aminmax())))
    yield Table("predictions", ("image", "true", "predicted", *classes), tuple(predictions))
    yield Table("outputs", ("image", "layer", "shape", "pictured", "lowest", "highest"), tuple(shapes))


def picture_output(output: Tensor) -> tuple[Tensor, int]:
    """A picture (height, width) of the first maps of an output, or of its first units as squares, and their number.

    Every map is scaled by its own values, units by those of all units.
    """
    if has_maps(output.shape):
        maps = to_grey(output[None, :MOST_MAPS])[0]
        return tile_maps(in_rows(maps, min(ACROSS, len(maps)), 255)), len(maps)
    units = to_grey(output.reshape(1, 1, 1, -1)[..., :MOST_UNITS]).flatten()
    return in_rows(units, UNITS_ACROSS, PAPER).repeat_interleave(UNIT, 0).repeat_interleave(UNIT, 1), len(units)


def to_grey(maps: Tensor) -> Tensor:
    """(N, C, H, W) to uint8, every map from 0 at its smallest finite value to 255 at its largest; NaN is 0."""
    maps = maps.double()
    is_finite = maps.isfinite()
    low = torch.where(is_finite, maps, torch.inf).amin((2, 3), keepdim=True)
    high = torch.where(is_finite, maps, -torch.inf).amax((2, 3), keepdim=True)
    share = (maps - low) / (high - low)
    return share.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1).mul(255).round().to(torch.uint8)


def in_rows(pieces: Tensor, across: int, empty: int) -> Tensor:
    """(n, ...) to (rows, across, ...), filled up with ``empty``."""
    rest = pieces.new_full((-len(pieces) % across, *pieces.shape[1:]), empty)
    return torch.cat([pieces, rest]).unflatten(0, (-1, across))


def tile_maps(maps: Tensor) -> Tensor:
    """One picture (height, width) of uint8 maps (rows, columns, H, W), enlarged, with white gaps."""
    factor = -(-SIDE // min(maps.shape[2:]))
    maps = maps.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    framed = nn.functional.pad(maps, (GAP, 0, GAP, 0), value=255)  # (rows, columns, GAP + H, GAP + W)
    rows, columns, height, width = framed.shape
    canvas = framed.transpose(1, 2).reshape(rows * height, columns * width)
    return nn.functional.pad(canvas, (0, GAP, 0, GAP), value=255)
