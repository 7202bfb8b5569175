"""What the layers of a trained model make of single images: pictures to keep, and small ones for a terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bnexp.data.dataset import Split
from bnexp.probes.features import GAP, SIDE, grey, grid
from bnexp.probes.layers import Layer, layers, tapped
from bnexp.report.figures.curves import DPI, render
from bnexp.train.run import Run

MOST_LAYERS = 8  # that are shown unasked
ACROSS, MOST_MAPS, MOST_UNITS = 8, 16, 256  # maps in a row of a picture, and maps and units of a layer in all
MOST_BARS, BAR = 10, 330  # classes whose probability is drawn, and pixels of a certainty
LABELS, WIDEST = 190, 1000  # pixels: the column of names beside the maps, and what maps side by side may take
LINE, UNIT, MARGIN = 17, 12, 14  # pixels: a line of text, a unit of a dense layer, around everything
PAPER = 228  # the grey behind all, on which white can be seen
LONGEST_NAME = 20  # letters of a class's name
CAPTION = (
    "Every map is drawn from its own smallest value (black) to its largest (white), units of a dense layer all alike.",
    "The numbers beside them are the smallest and the largest value in the layer. Norms end with their activation.",
)
TILE = 12  # columns of a terminal that a small picture takes; half as many rows


@dataclass(frozen=True, eq=False)
class Portrait:
    """One image and what the model makes of it: ``outputs`` are (C, H, W) or (C,), one per layer, in float32."""

    index: int
    image: Tensor
    label: int
    probabilities: Tensor
    outputs: dict[str, Tensor]

    @property
    def predicted(self) -> int:
        return int(self.probabilities.argmax())

    def sentence(self, split: str, classes: Sequence[str]) -> str:
        """``test image 0: true class 7, predicted 7 (99.8%)``."""
        share = float(self.probabilities[self.predicted])
        sure = f"{share:.1%}" if math.isfinite(share) else "not finite"
        true, predicted = classes[self.label], classes[self.predicted]
        return f"{split} image {self.index}: true class {true}, predicted {predicted} ({sure})"


def has_maps(layer: Layer) -> bool:
    """Whether a layer puts out maps of more than one pixel, and not one number per unit."""
    return len(layer.out_shape) == 4 and layer.out_shape[2] * layer.out_shape[3] > 1


def choose(found: Sequence[Layer]) -> list[str]:
    """The layers to show unasked: those with maps, or of more than 8 the last of every size; without any the last 8."""
    shown = [layer for layer in found if has_maps(layer)]
    if len(shown) > MOST_LAYERS:
        shown = list({layer.out_shape[2:]: layer for layer in shown}.values())
    shown = shown or [layer for layer in found if layer.num_parameters][-MOST_LAYERS:]
    return [layer.name for layer in shown][:MOST_LAYERS]


@torch.no_grad()
def portraits(run: Run, model: nn.Module, split: Split, indices: Sequence[int], names: Sequence[str]) -> list[Portrait]:
    """What ``model``, in the mode that it is in, makes of some images of ``split``; the layers ``names`` in detail.

    An image is evaluated among those that it is scored among, so that it is taken for what the scores say.
    """
    chosen = {name: module for name, module in layers(model).items() if name in names}
    found: dict[int, Portrait] = {}
    for chunk in run.chunks(split, model):
        members = torch.arange(len(split), device=run.device)[chunk].tolist()
        own = [index for index in indices if index in members]
        places = [members.index(index) for index in own]
        if not places:
            continue
        outputs: dict[str, Tensor] = {}

        def see(name: str, _: Tensor, output: Tensor, outputs=outputs, places=places) -> None:
            is_map = output.dim() == 4 and output[0, 0].numel() > 1
            outputs.setdefault(name, (output if is_map else output.flatten(1))[places].float().cpu())

        images, labels = split.images[chunk], split.labels[chunk]
        with tapped(chosen, see):
            probabilities = run.forward(run.dataset.prepare(images), model)[places].softmax(1).cpu()
        for i, (index, place) in enumerate(zip(own, places, strict=True)):
            maps = {name: outputs[name][i] for name in names}
            found[index] = Portrait(index, images[place].cpu(), int(labels[place]), probabilities[i], maps)
    return [found[index] for index in indices]


# ---------------------------------------------------------------- a picture to keep


def draw(portrait: Portrait, split: str, classes: Sequence[str]) -> bytes:
    """A PNG: the image and the probabilities of the classes, and below a block of maps for every layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name[:LONGEST_NAME] for name in classes]
    bars = portrait.probabilities.topk(min(MOST_BARS, len(names))).indices.sort().values.tolist()
    blocks = {"": picture_of(portrait.image)} | {name: block(each) for name, each in portrait.outputs.items()}
    tops, bottom = {}, MARGIN + 2 * LINE
    for name, pixels in blocks.items():
        tops[name] = bottom
        bottom += max(len(pixels), LINE * (3 if name else len(bars))) + MARGIN
    height = bottom + len(CAPTION) * LINE + MARGIN
    width = 2 * MARGIN + LABELS + max(*(pixels.shape[1] for pixels in blocks.values()), 640)
    canvas = torch.full((height, width, 3), PAPER, dtype=torch.uint8)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)

    def write(x: int, y: int, text: str, **style: object) -> None:
        style = {"size": 6.5, "family": "DejaVu Sans", "parse_math": False, "color": "#222222", "va": "top"} | style
        figure.text(x / width, 1 - y / height, text, **style)

    color = "#222222" if portrait.predicted == portrait.label else "#c00000"
    write(MARGIN, MARGIN, portrait.sentence(split, names), size=8, weight="bold", color=color)
    draw_bars(canvas, write, tops[""], portrait, {each: names[each] for each in bars})
    for name, pixels in blocks.items():
        left = MARGIN + LABELS if name else MARGIN
        canvas[tops[name] : tops[name] + len(pixels), left : left + pixels.shape[1]] = pixels
    for name, each in portrait.outputs.items():
        write(MARGIN, tops[name], name, weight="bold")
        write(MARGIN, tops[name] + LINE, size_of(each))
        write(MARGIN, tops[name] + 2 * LINE, range_of(each))
    for row, line in enumerate(CAPTION):
        write(MARGIN, bottom + row * LINE, line, color="#666666")
    figure.figimage(canvas.numpy(), origin="upper")
    return render(figure, "png")


def draw_bars(canvas: Tensor, write: Callable, top: int, portrait: Portrait, names: dict[int, str]) -> None:
    """A bar for every class of ``names``, as long as it is probable."""
    left = MARGIN + LABELS + 110
    for row, (each, name) in enumerate(names.items()):
        y, share = top + row * LINE, float(portrait.probabilities[each].nan_to_num(0))
        length, color = round(BAR * share), color_of(portrait, each)
        canvas[y + 2 : y + LINE - 2, left : left + max(1, length)] = torch.tensor(color, dtype=torch.uint8)
        write(left - 8, y + 1, name, ha="right", color=f"#{bytes(color).hex()}")
        write(left + length + 6, y + 1, f"{share:.1%}", color=f"#{bytes(color).hex()}")


def color_of(portrait: Portrait, index: int) -> tuple[int, int, int]:
    """Green for the true class, red for what the model takes it for, grey for the others."""
    colors = {portrait.predicted: (200, 40, 40), portrait.label: (0, 140, 70)}
    return colors.get(index, (110, 110, 110))


def size_of(output: Tensor) -> str:
    """``6 maps of 24x24``, ``16 of 64 maps of 7x7``, ``120 units``."""
    what = f"maps of {output.shape[1]}x{output.shape[2]}" if output.dim() == 3 else "units"
    shown = min(len(output), MOST_MAPS if output.dim() == 3 else MOST_UNITS)
    return f"{len(output)} {what}" if shown == len(output) else f"{shown} of {len(output)} {what}"


def range_of(output: Tensor) -> str:
    low, high = (float(end) for end in output.aminmax())
    return f"{low:.3g} to {high:.3g}" if math.isfinite(low) and math.isfinite(high) else "not finite"


def picture_of(image: Tensor) -> Tensor:
    """A stored image (C, h, w), enlarged, as colours (H, W, 3)."""
    pixels = (image if len(image) == 3 else image[:1].expand(3, -1, -1)).permute(1, 2, 0)
    factor = max(1, 2 * SIDE // min(image.shape[1:]))
    return pixels.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def block(output: Tensor) -> Tensor:
    """The first maps of a layer in rows, or its first units as squares, as colours (height, width, 3)."""
    if output.dim() == 3:
        maps = grey(output[None, :MOST_MAPS])[0]
        side = maps.shape[2] * -(-SIDE // min(maps.shape[1:])) + GAP
        pixels = grid(in_rows(maps, min(ACROSS, max(1, WIDEST // side)), 255))
    else:
        units = grey(output[None, None, None, :MOST_UNITS])[0, 0, 0]
        pixels = in_rows(units, WIDEST // 2 // UNIT, PAPER).repeat_interleave(UNIT, 0).repeat_interleave(UNIT, 1)
    return pixels[..., None].expand(-1, -1, 3)


def in_rows(pieces: Tensor, across: int, empty: int) -> Tensor:
    """(n, ...) to (rows, across, ...), filled up with ``empty``."""
    across = min(across, len(pieces))
    rest = pieces.new_full((-len(pieces) % across, *pieces.shape[1:]), empty)
    return torch.cat([pieces, rest]).unflatten(0, (-1, across))


# ---------------------------------------------------------------- a small one for a terminal


def can_show(console: Console) -> bool:
    """Whether pictures made of coloured half blocks can be seen there."""
    has_colours = console.color_system in ("256", "truecolor") and not console.no_color
    return console.is_terminal and has_colours and console.encoding.startswith("utf")


def strip(portrait: Portrait, width: int) -> Text:
    """The image and the liveliest map of every layer, side by side in at most ``width`` columns, under their names."""
    tiles = {"input": small(portrait.image.float().div(255))}
    for name, output in portrait.outputs.items():
        if output.dim() == 3:
            spread = output.flatten(1).std(1).nan_to_num(-1)
            tiles[name] = small(grey(output[None, int(spread.argmax()), None])[0].float().div(255))
    num_tiles = max(1, width // (TILE + 1))
    tiles = dict(list(tiles.items())[:num_tiles])
    text = Text("".join(f"{name[-TILE:]:<{TILE + 1}}" for name in tiles).rstrip() + "\n", no_wrap=True)
    for row in range(0, TILE, 2):
        for pixels in tiles.values():
            for upper, lower in zip(pixels[row].tolist(), pixels[row + 1].tolist(), strict=True):
                text.append("▀", f"rgb({','.join(map(str, upper))}) on rgb({','.join(map(str, lower))})")
            text.append(" ")
        text.append("\n")
    text.rstrip()
    return text


def small(image: Tensor) -> Tensor:
    """(C, h, w) in [0, 1] as uint8 colours (TILE, TILE, 3)."""
    kind = "nearest" if max(image.shape[1:]) < TILE else "area"
    image = interpolate(image[None], size=(TILE, TILE), mode=kind)[0]
    image = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    return image.mul(255).round().to(torch.uint8).permute(1, 2, 0)
