"""Reads a picture file of any format, depth and colour mode as 8-bit grey or RGB of one size."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bnexp.errors import UserError, unread

PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, which starts a program
GREY_MODES = ("1", "L", "LA", "La", "I", "F")  # and I;16 in its byte orders
BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF


def read_picture(path: Path, channels: int, size: int) -> Tensor:
    """The first picture of a file as uint8 (channels, size, size), ``channels`` 1 or 3.

    The picture is turned as its camera noted, put on white where it is transparent, and scaled with its aspect ratio
    kept into the middle of a black square. Samples of more than 8 bits are scaled from the range of their type, floats
    from 0 to 1. Raises :class:`UserError` naming the file if it cannot be decoded, has values outside of that range,
    or becomes one colour although its samples differ.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=PICTURE_FORMATS) as file:
            return square_of(file, channels, size, path)
    except Exception as error:  # decoders fail in many ways
        raise _undecodable(path, error) from None


def square_of(file, channels: int, size: int, path: Path | None = None) -> Tensor:
    """:func:`read_picture` of a picture of Pillow, opened from ``path`` if that is given, or an array uint8 (H, W, C).

    Raises ValueError if it cannot be understood.
    """
    from PIL import Image, ImageOps

    if not isinstance(file, Image.Image):
        file = np.asarray(file)
        if file.dtype != np.uint8 or file.ndim not in (2, 3):
            raise ValueError(f"an array of {file.dtype} {file.shape}, where uint8 (H, W) or (H, W, channels) is known")
        file = Image.fromarray(file.squeeze(2) if file.shape[2:] == (1,) else file)
    file.draft(None, (size, size))  # lets a JPEG decode to a smaller size, much faster
    white, zero_is_white = _white_level(file)
    is_cut = not _is_grey(file.mode) and _depth(file, path) > 8  # of colours Pillow decodes the upper 8 bits
    colour = _transparent_colour(file, path) if path else None
    picture = ImageOps.exif_transpose(file)
    if picture.mode == "P" and _num_colours(picture) <= picture.getextrema()[1]:
        raise ValueError("its pixels have colours that its palette lacks")
    if picture.mode == "LAB":
        picture = picture.convert("RGB")  # Pillow converts no LAB to L
    if colour is not None:
        picture.info["transparency"] = colour
    if white:
        picture = _scale_samples(picture, white, zero_is_white)
    flat = _on_white(picture).convert("L" if channels == 1 else "RGB")
    if _is_even(flat) and (is_cut or not _is_even(picture)):
        raise ValueError(f"all its pixels become one colour, {flat.getpixel((0, 0))}{', of 8 bits' * is_cut}")
    # A side is never scaled to nothing, as ImageOps.pad would.
    width, height = (max(1, round(side / max(flat.size) * size)) for side in flat.size)
    square = Image.new(flat.mode, (size, size))
    corner = (round((size - width) / 2), round((size - height) / 2))
    square.paste(flat.resize((width, height), Image.Resampling.BILINEAR), corner)
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, channels).permute(2, 0, 1)


def has_colour(path: Path) -> bool:
    """Whether a picture has colours: by its header, or by its pixels if it has a palette or is WebP, always RGB."""
    from PIL import Image

    try:
        with no_bombs(), Image.open(path, formats=PICTURE_FORMATS) as file:
            if file.mode in ("P", "PA") or file.format == "WEBP":
                samples = np.asarray(_on_white(file).convert("RGB")).astype(np.int16)
                rounding = file.format == "WEBP"  # one level, where a lossy one has luma and chroma
                return bool(np.ptp(samples, axis=2).max() > rounding)
            if file.format == "PNG":
                return _png_header(path)[1] not in (0, 4)  # Pillow has grey with alpha of 16 bits as RGBA
            return not _is_grey(file.mode)
    except Exception as error:
        raise _undecodable(path, error) from None


def _is_grey(mode: str) -> bool:
    return mode in GREY_MODES or mode.startswith("I;16")


@contextmanager
def no_bombs() -> Iterator[None]:
    """Make Pillow refuse very large pictures instead of warning. Enter it before threads are started."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's other warnings change nothing here
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _white_level(file) -> tuple[int, bool]:
    """The sample value of white, 0 if Pillow has scaled the samples to 8 bits; and whether it is black, and 0 white."""
    deep = file.mode == "F" or file.mode.startswith("I")
    if file.format == "JPEG2000":
        depth, is_signed = _jpeg2000_samples(Path(file.filename))
        if is_signed or depth < 8:
            what, other = ("signed", "unsigned ones") if is_signed else (f"of {depth} bits", "8")
            raise ValueError(f"its samples are {what}; save it with {other}")
    if file.format != "TIFF":
        return (1 if file.mode == "F" else 65535) if deep else 0, False
    tags = file.tag_v2
    if PHOTOMETRIC not in tags:
        raise ValueError("it does not say whether 0 is black or white")
    if tags.get(PLANAR) == 2 and tags[BITS][0] > 8:
        raise ValueError("it stores 16-bit channels one after the other, which Pillow misreads; save it with 8 bits")
    signed = tags.get(SAMPLE_FORMAT, (1,))[0] == 2
    if not deep and not signed:
        return 0, False
    bits = tags[BITS][0]
    return 1 if file.mode == "F" else 2 ** (bits - signed) - 1, tags[PHOTOMETRIC] == 0


def _scale_samples(picture, white: int, zero_is_white: bool):
    """A grey picture of mode I, I;16, F or signed L in 8 bits; with an alpha channel if one value is transparent."""
    from PIL import Image

    values = np.asarray(picture)
    if white == 2**32 - 1:
        values = values.view(np.uint32)  # Pillow has no such mode and keeps the bits
    elif white == 127:
        values = values.view(np.int8)
    lowest, highest = values.min(), values.max()
    margin = 1e-6 if white == 1 else 0  # roundings of float32
    if not -margin <= lowest <= highest <= white + margin:  # NaN is refused too
        raise ValueError(
            f"its values run from {lowest:g} to {highest:g}, where 0 to {white:,} is understood as black to white; "
            "save it with 8 or 16 bits"
        )
    levels = np.rint(values * 255.0) if white == 1 else values.astype(np.int64) * 255 // white
    if lowest < highest and levels.min() == levels.max():
        raise ValueError(
            f"its values run from {lowest:g} to {highest:g}, which is one grey of the range 0 to {white:,}; "
            "save it with 8 bits"
        )
    grey = Image.fromarray((255 - levels if zero_is_white else levels).astype(np.uint8))
    if "transparency" in picture.info:
        opaque = (values != picture.info["transparency"]) * np.uint8(255)
        grey = Image.merge("LA", (grey, Image.fromarray(opaque)))
    return grey


def _transparent_colour(file, path: Path) -> int | tuple[int, ...] | None:
    """A PNG's one transparent colour as samples of the decoded picture; None if it has no such colour.

    Pillow 10 to 13 give it as samples of the file. Of RGB with 16 bits they decode the upper 8 only.
    """
    colour = file.info.get("transparency")
    if file.format != "PNG" or colour is None or file.mode not in ("L", "RGB"):
        return None
    depth, _ = _png_header(path)
    if file.mode == "L":
        top = 2**depth - 1
        return (colour & top) * 255 // top
    return tuple(sample >> max(0, depth - 8) & 255 for sample in colour)


def _png_header(path: Path) -> tuple[int, int]:
    """Bits per sample and colour type of a PNG file (0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha)."""
    with open(path, "rb") as file:
        header = file.read(26)
    return header[24], header[25]


def _depth(file, path: Path | None) -> int:
    """Bits per sample of a PNG or TIFF file; 8 for other formats."""
    if file.format == "PNG" and path:
        return _png_header(path)[0]
    return file.tag_v2.get(BITS, (8,))[0] if file.format == "TIFF" else 8


def _jpeg2000_samples(path: Path) -> tuple[int, bool]:
    """Bits per sample of a JPEG 2000 file's first component, and whether they are signed (ISO 15444-1, A.5.1: Ssiz)."""
    content = path.read_bytes()
    size = content[content.index(b"\xff\x4f\xff\x51") + 42]
    return (size & 0x7F) + 1, bool(size & 0x80)


def _num_colours(picture) -> int:
    """The number of colours in the palette of a picture of mode P."""
    return len(picture.palette.palette) // len(picture.palette.mode) if picture.palette else 0


def _on_white(picture):
    """The picture as it looks on a white page."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture
    if picture.mode == "La":
        picture = picture.convert("LA")  # Pillow converts no La to RGBA
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def _is_even(picture) -> bool:
    """Whether all pixels are equal."""
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")
    extrema = picture.getextrema()
    return all(low == high for low, high in (extrema if isinstance(extrema[0], tuple) else [extrema]))


def _undecodable(path: Path, error: Exception) -> UserError:
    """The error for a file that is no picture, none of a known format, or that the system does not let us read."""
    if isinstance(error, OSError) and error.errno:  # Pillow's own have no number
        return unread(error, path)
    why, known = str(error) or type(error).__name__, ", ".join(PICTURE_FORMATS)
    return UserError(f"{path}: cannot be decoded as an image ({why}); replace or remove it; known are {known}")
