"""Pictures of every format, depth and mode: a ramp in, a ramp out, or an error that names the file."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import OPEN_INFO

from bnexp.data.pictures import _white_level, has_colour, read_picture
from bnexp.errors import UserError

LAB = 8  # of TIFF's photometric interpretations
RAMP = np.arange(256).reshape(16, 16)  # black at the top left, white at the bottom right


def read_grey(path, size=16):
    return read_picture(path, 1, size)[0].numpy().astype(int)


def pack(samples, bits, byte_order=">", signed=False, floats=False):
    """Rows of samples (H, W * samples per pixel), of which a row begins at a byte, as bytes."""
    if bits >= 16:
        kind = "f" if floats else "i" if signed else "u"
        return samples.astype(f"{byte_order}{kind}{bits // 8}").tobytes()
    planes = samples.astype(np.int64)[:, :, None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(planes.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()


def quantized(bits, signed=False, floats=False):
    """The ramp in samples, and as it is on a scale of 0 to 255."""
    top = 1 if floats else 2 ** (bits - signed) - 1
    samples = RAMP / 255 * top if floats else np.rint(RAMP / 255 * top)
    return samples, samples / top * 255


# TIFF: every combination that Pillow knows, by its own table


def tiff(key, samples):
    """The bytes of a 16x16 TIFF file of one strip. ``samples`` (16, 16, C) are in the file's own scale."""
    prefix, photometric, sample_format, fill_order, bits, extra = key
    order = "<" if prefix == b"II" else ">"
    rows = samples.reshape(16, -1)
    content = pack(rows, bits[0], order, signed=sample_format == (2,), floats=sample_format == (3,))
    if fill_order == 2:
        content = bytes(int(f"{byte:08b}"[::-1], 2) for byte in content)
    tags = {
        256: (16,), 257: (16,), 258: bits, 259: (1,), 262: (photometric,), 266: (fill_order,), 273: (8,),
        277: (len(bits),), 278: (16,), 279: (len(content),), 338: extra, 339: sample_format * len(bits),
    }  # fmt: skip
    if photometric == 3:
        tags[320] = tuple(np.rint(np.arange(2 ** bits[0]) / (2 ** bits[0] - 1) * 65535).astype(int)) * 3
    tags = {tag: values for tag, values in sorted(tags.items()) if values}
    long_values, entries = b"", b""
    place = 8 + len(content) + len(content) % 2
    behind = place + 2 + 12 * len(tags) + 4
    for tag, values in tags.items():
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            packed, long_values = struct.pack(f"{order}I", behind + len(long_values)), long_values + packed
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    header = prefix + struct.pack(f"{order}HI", 42, place)
    count = struct.pack(f"{order}H", len(tags))
    return header + content + b"\0" * (len(content) % 2) + count + entries + bytes(4) + long_values


def tiff_ramp(key):
    _, photometric, sample_format, _, bits, extra = key
    samples, expected = quantized(bits[0], sample_format == (2,), sample_format == (3,))
    top = 1 if sample_format == (3,) else 2 ** (bits[0] - (sample_format == (2,))) - 1
    full, none = np.full_like(samples, top), np.zeros_like(samples)
    colours = {
        0: [top - samples],
        1: [samples],
        2: [samples] * 3,
        3: [samples],
        5: [none, none, none, top - samples],
        6: [samples, none + 128, none + 128],
        8: [samples, none, none],
    }[photometric][: len(bits)]
    others = [full] * (len(bits) - len(colours))  # opaque
    return tiff(key, np.stack(colours + others, axis=2)), expected


@pytest.mark.parametrize("key", OPEN_INFO, ids=str)
def test_a_ramp_in_every_kind_of_tiff_is_a_ramp(tmp_path, key):
    content, expected = tiff_ramp(key)
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    try:
        grey = read_picture(path, 3 if key[1] == LAB else 1, 16)[0].numpy().astype(int)
    except UserError as error:  # Pillow lists these kinds, and not every version decodes them
        assert str(error).startswith(f"{path}: cannot be decoded as an image (") and (key[1] == LAB or key[3] == 2)
        return
    if key[1] == LAB:  # lightness is not linear
        assert (np.diff(grey.flatten()) >= 0).all() and grey[0, 0] <= 2 and grey[-1, -1] >= 253
    else:
        assert abs(grey - expected).max() <= 1  # 16 bits are rounded down, colour spaces round


@pytest.mark.parametrize("bits, sample_format", [(32, (1,)), (32, (2,)), (16, (2,)), (12, (1,)), (8, (2,))])
def test_integers_of_any_width_are_scaled_from_the_range_of_their_type(tmp_path, bits, sample_format):
    key = (b"II", 1, sample_format, 1, (bits,), ())
    top = 2 ** (bits - (sample_format == (2,))) - 1
    samples = np.zeros((16, 16, 1))
    samples[0, :3, 0] = 1, top // 2, top
    (tmp_path / "a.tif").write_bytes(tiff(key, samples))
    assert read_grey(tmp_path / "a.tif")[0, :4].tolist() == [1 * 255 // top, 127 - (bits == 8), 255, 0]


@pytest.mark.parametrize(
    "bits, sample_format, low, high, said",
    [
        (32, (3,), 0, 255, "from 0 to 255, where 0 to 1 is understood as black to white"),
        (32, (3,), -1, 1, "from -1 to 1, where 0 to 1 "),
        (32, (3,), 0, np.nan, "from nan to nan, where 0 to 1 "),
        (32, (3,), 0, np.inf, "from 0 to inf, where 0 to 1 "),
        (16, (2,), -1, 32767, "from -1 to 32767, where 0 to 32,767 "),
        (32, (2,), -5, 1000, "from -5 to 1000, where 0 to 2,147,483,647 "),
        (32, (2,), 0, 65535, "from 0 to 65535, which is one grey of the range 0 to 2,147,483,647; save it with 8 bits"),
        (32, (1,), 7, 255, "from 7 to 255, which is one grey of the range 0 to 4,294,967,295"),
        (16, (1,), 0, 255, "from 0 to 255, which is one grey of the range 0 to 65,535"),
        (32, (3,), 0, 0.001, "from 0 to 0.001, which is one grey of the range 0 to 1"),
    ],
)
def test_values_that_have_no_place_between_black_and_white_are_refused(tmp_path, bits, sample_format, low, high, said):
    samples = np.full((16, 16, 1), low, dtype=np.float64)
    samples[3, 4] = high
    path = tmp_path / "a.tif"
    path.write_bytes(tiff((b"II", 1, sample_format, 1, (bits,), ()), samples))
    with pytest.raises(UserError, match=rf"^{path}: cannot be decoded as an image \(its values run {said}"):
        read_picture(path, 3, 16)


@pytest.mark.parametrize("key", [(b"MM", 0, (1,), 1, (16,), ()), (b"II", 1, (3,), 1, (64,), ())], ids=str)
def test_a_tiff_that_pillow_does_not_know_is_named(tmp_path, key):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(key, np.zeros((16, 16, 1))))
    with pytest.raises(UserError, match=f"^{path}: cannot be decoded"):
        read_picture(path, 1, 16)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_that_does_not_say_which_value_is_black_is_refused(tmp_path, bits):
    content = tiff((b"II", 1, (1,), 1, (bits,), ()), quantized(bits)[0][:, :, None])
    place = content.index(struct.pack("<HH", 262, 3))
    path = tmp_path / "a.tif"
    path.write_bytes(content[:place] + struct.pack("<H", 263) + content[place + 2 :])  # another tag
    with pytest.raises(UserError, match=rf"^{path}: .*\(it does not say whether 0 is black or white\)"):
        read_grey(path)


def test_floats_may_miss_the_range_by_their_rounding(tmp_path):
    samples = RAMP / 255 * (1 + 2e-7) - 1e-7
    (tmp_path / "a.tif").write_bytes(tiff((b"II", 1, (3,), 1, (32,), ()), samples[:, :, None]))
    assert (read_grey(tmp_path / "a.tif") == RAMP).all()


# PNG


def png(samples, depth, colour_type, **chunks):
    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    height, width, channels = samples.shape
    content = pack(samples.reshape(height, -1), depth)
    stride = len(content) // height
    lines = b"".join(b"\0" + content[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    more = b"".join(chunk(name.encode(), bytes(value)) for name, value in chunks.items())
    data = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + data + chunk(b"IEND", b"")


PNG_KINDS = [(d, 0) for d in (1, 2, 4, 8, 16)] + [(d, 3) for d in (1, 2, 4, 8)]
PNG_KINDS += [(d, colour_type) for d in (8, 16) for colour_type in (2, 4, 6)]
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def png_ramp(depth, colour_type):
    """The samples (16, 16, C) of an opaque ramp, it on the scale of 255, and the palette if there is one."""
    samples, expected = quantized(depth)
    samples = np.stack([samples] * PNG_CHANNELS[colour_type], axis=2)
    if colour_type in (4, 6):
        samples[..., -1] = 2**depth - 1
    grey = np.rint(np.arange(2**depth) * 255 / (2**depth - 1)).astype(np.uint8)
    return samples, expected, {"PLTE": np.repeat(grey, 3)} if colour_type == 3 else {}


@pytest.mark.parametrize("depth, colour_type", PNG_KINDS)
def test_a_ramp_in_every_kind_of_png_is_a_ramp(tmp_path, depth, colour_type):
    samples, expected, palette = png_ramp(depth, colour_type)
    path = tmp_path / "a.png"
    path.write_bytes(png(samples, depth, colour_type, **palette))
    assert abs(read_grey(path) - expected).max() <= 1  # 16 bits are rounded down
    assert has_colour(path) == (colour_type in (2, 6))


@pytest.mark.parametrize("number", [0, 100, 255])
@pytest.mark.parametrize("depth, colour_type", [kind for kind in PNG_KINDS if kind[1] in (0, 2, 3)])
def test_the_one_transparent_colour_of_a_png_is_white(tmp_path, depth, colour_type, number):
    samples, expected, palette = png_ramp(depth, colour_type)
    colour = samples.reshape(256, -1)[number].astype(int)
    tRNS = b"".join(struct.pack(">H", sample) for sample in colour)
    if colour_type == 3:
        tRNS = bytes(0 if i == colour[0] else 255 for i in range(2**depth))
    path = tmp_path / "a.png"
    path.write_bytes(png(samples, depth, colour_type, **palette, tRNS=tRNS))
    is_transparent = (samples == colour).all(2)
    if depth == 1 and number < 128:  # black on white turns white
        with pytest.raises(UserError, match=f"^{path}: .*all its pixels become one colour, 255"):
            read_grey(path)
    else:
        assert abs(read_grey(path) - np.where(is_transparent, 255, expected)).max() <= 1


def test_of_16_bits_of_grey_only_the_transparent_value_itself_is_white(tmp_path):
    samples = np.array([1000, 1001, 1002, 40000]).reshape(2, 2, 1)
    (tmp_path / "a.png").write_bytes(png(samples, 16, 0, tRNS=struct.pack(">H", 1001)))
    assert read_grey(tmp_path / "a.png", 2).tolist() == [[3, 255], [3, 155]]


def test_of_16_bits_of_colour_the_upper_8_decide_which_are_transparent(tmp_path):
    samples = np.array([[0x1234, 0x1234, 0x1234], [0x3412, 0x3412, 0x3412]]).reshape(1, 2, 3)
    (tmp_path / "a.png").write_bytes(png(samples, 16, 2, tRNS=struct.pack(">HHH", 0x1234, 0x1234, 0x1234)))
    assert read_grey(tmp_path / "a.png", 2)[0].tolist() == [255, 0x34]


# The other formats, by every mode that Pillow writes in them


def modes():
    """Pictures of the ramp in Pillow's modes, by their names."""
    grey = Image.fromarray(RAMP.astype(np.uint8))
    opaque, zero = Image.new("L", (16, 16), 255), Image.new("L", (16, 16), 0)
    middle = Image.new("L", (16, 16), 128)
    palette = grey.copy()
    palette.putpalette([i for i in range(256) for _ in "rgb"])
    inverted = Image.fromarray((255 - RAMP).astype(np.uint8))
    yield "1", grey.point(lambda value: value >= 128 and 255).convert("1")
    yield from (("L", grey), ("P", palette), ("LA", Image.merge("LA", (grey, opaque))))
    yield from (("RGB", Image.merge("RGB", [grey] * 3)), ("RGBA", Image.merge("RGBA", [grey] * 3 + [opaque])))
    yield "CMYK", Image.merge("CMYK", [zero, zero, zero, inverted])
    yield "YCbCr", Image.merge("YCbCr", [grey, middle, middle])
    yield "HSV", Image.merge("HSV", [zero, zero, grey])
    yield "I;16", Image.fromarray((RAMP * 257).astype(np.uint16))
    yield "I", Image.fromarray((RAMP * 257).astype(np.int32))
    yield "F", Image.fromarray((RAMP / 255).astype(np.float32))


OPTIONS = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True, "exact": True}}
INEXACT = {"JPEG": 3}  # grey levels
SPOILT = {"GIF": ("RGBA", "I", "I;16", "F"), "WEBP": ("I", "I;16", "F")}  # written by Pillow with fewer levels


def written():
    """(format, mode, bytes, picture) of all that Pillow can write."""
    for format in ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"):
        for mode, picture in modes():
            if mode in SPOILT.get(format, ()):
                continue
            file = io.BytesIO()
            try:
                picture.save(file, format, **OPTIONS.get(format, {}))
            except (OSError, ValueError):  # Pillow cannot write this mode
                continue
            yield pytest.param(format, mode, file.getvalue(), id=f"{format}-{mode}")


WRITTEN = list(written())


def test_the_table_has_many_modes_of_every_format():
    assert len(WRITTEN) > 40
    assert {format for format, *_ in (each.values for each in WRITTEN)} == {
        "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP",
    }  # fmt: skip


@pytest.mark.parametrize("format, mode, content", WRITTEN)
def test_a_ramp_in_every_mode_and_format_is_a_ramp_or_refused_by_name(tmp_path, format, mode, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    if (format, mode) == ("TIFF", "I"):  # 16 of its 31 bits
        with pytest.raises(UserError, match=f"^{path}: .*from 0 to 65535, which is one grey of the range"):
            read_grey(path)
        return
    expected = (RAMP >= 128) * 255 if mode == "1" else RAMP
    for channels in (1, 3):
        levels = read_picture(path, channels, 16).numpy().astype(int)
        assert abs(levels - expected).max() <= INEXACT.get(format, 1)
    if mode in ("1", "L", "P", "I;16", "F"):
        assert not has_colour(path)


@pytest.mark.parametrize("magic", ["P2", "P5"])
@pytest.mark.parametrize("top", [1, 3, 100, 255, 256, 1000, 4095, 65535])
def test_a_portable_greymap_of_any_maximum_is_a_ramp(tmp_path, magic, top):
    samples = np.rint(RAMP / 255 * top).astype(int)
    body = " ".join(map(str, samples.flatten())).encode()
    if magic == "P5":
        body = samples.astype(">u2" if top > 255 else "u1").tobytes()
    (tmp_path / "a.pgm").write_bytes(f"{magic} 16 16 {top}\n".encode() + body)
    assert abs(read_grey(tmp_path / "a.pgm") - samples / top * 255).max() <= 1


@pytest.mark.parametrize("order, scale", [("<", "-1.0"), (">", "1.0")])
def test_a_portable_floatmap_is_a_ramp(tmp_path, order, scale):
    values = (RAMP[::-1] / 255).astype(f"{order}f4")  # from the bottom up
    (tmp_path / "a.pfm").write_bytes(f"Pf\n16 16\n{scale}\n".encode() + values.tobytes())
    assert abs(read_grey(tmp_path / "a.pfm") - RAMP).max() <= 1


def j2k(samples, depth, signed):
    """The bytes of a JPEG 2000 codestream of ``samples`` (16, 16): encoded as 16 bits, then declared as ``depth``."""
    file = io.BytesIO()
    zero_of_16, zero = 2**15, 0 if signed else 2 ** (depth - 1)
    picture = Image.fromarray((samples + zero_of_16 - zero).astype(np.uint16))
    picture.save(file, "JPEG2000", irreversible=False, no_jp2=True)
    content = bytearray(file.getvalue())
    content[content.index(b"\xff\x51") + 40] = (depth - 1) | signed << 7
    return bytes(content)


@pytest.mark.parametrize("depth", [9, 10, 12, 15, 16])
def test_a_jpeg2000_of_any_depth_is_a_ramp_and_a_signed_one_is_refused(tmp_path, depth):
    path = tmp_path / "a.j2k"
    samples, expected = quantized(depth)
    path.write_bytes(j2k(samples, depth, signed=False))
    # Pillow shifts samples to 16 bits, which leaves white up to 1 grey level darker, and they are rounded down.
    assert abs(read_grey(path) - expected).max() < 2
    path.write_bytes(j2k(quantized(depth, signed=True)[0], depth, signed=True))
    with pytest.raises(UserError, match=rf"^{path}: .*\(its samples are signed; save it with unsigned ones\)"):
        read_grey(path)


@pytest.mark.parametrize("depth", [1, 4, 7])
def test_a_jpeg2000_of_fewer_than_8_bits_is_refused(tmp_path, depth):
    (tmp_path / "a.j2k").write_bytes(j2k(np.zeros((16, 16), int), depth, signed=False))
    with pytest.raises(UserError, match=rf"its samples are of {depth} bits; save it with 8"):
        read_grey(tmp_path / "a.j2k")


def test_colours_of_16_bits_that_differ_below_the_upper_8_are_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(np.stack([RAMP * 257] * 3, axis=2), 16, 2))
    assert abs(read_grey(path) - RAMP).max() <= 1
    path.write_bytes(png(np.stack([RAMP] * 3, axis=2), 16, 2))
    with pytest.raises(UserError, match="all its pixels become one colour, 0, of 8 bits"):
        read_grey(path)


def test_16_bit_channels_in_planes_are_refused(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "TIFF", tiffinfo={284: 2})
    content = file.getvalue()
    (tmp_path / "a.tif").write_bytes(content)
    with Image.open(tmp_path / "a.tif") as picture:
        picture.tag_v2[258], picture.tag_v2[284] = (16, 16, 16), 2
        with pytest.raises(ValueError, match="one after the other"):
            _white_level(picture)


@pytest.mark.parametrize("quality", [1, 50, 80])
def test_a_grey_webp_with_losses_is_grey(tmp_path, quality):
    path = tmp_path / "a.webp"
    Image.fromarray(RAMP.astype(np.uint8)).save(path, quality=quality)
    assert not has_colour(path)
    Image.new("RGB", (16, 16), (90, 100, 110)).save(path, quality=quality)
    assert has_colour(path)


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_pictures_of_16_bits_are_turned_too(tmp_path, name, orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray((RAMP * 257).astype(np.uint16)).transpose(undo).save(tmp_path / name, exif=exif)
    assert (read_grey(tmp_path / name) == RAMP).all()


def test_lab_can_be_made_grey(tmp_path):
    grey, middle = Image.fromarray(RAMP.astype(np.uint8)), Image.new("L", (16, 16), 128)
    Image.merge("LAB", (grey, middle, middle)).save(tmp_path / "a.tif")
    levels = read_grey(tmp_path / "a.tif")
    assert (np.diff(levels.flatten()) >= 0).all() and levels[0, 0] <= 2 and levels[-1, -1] >= 253


# Colours


def test_a_palette_has_colour_only_if_its_pixels_do(tmp_path):
    picture = Image.fromarray(np.zeros((4, 4), dtype=np.uint8))
    picture.putpixel((0, 0), 1)
    picture.putpalette([0, 0, 0, 9, 9, 9, 200, 0, 0])
    for name in ("a.gif", "a.png", "a.bmp", "a.tif"):
        picture.save(tmp_path / name)
        assert not has_colour(tmp_path / name)
    picture.putpixel((2, 2), 2)
    for name in ("b.gif", "b.png", "b.bmp", "b.tif"):
        picture.save(tmp_path / name)
        assert has_colour(tmp_path / name)
    picture.save(tmp_path / "c.gif", transparency=2)
    assert not has_colour(tmp_path / "c.gif")  # nobody sees that red


# What is lost on the way


@pytest.mark.parametrize("size", [(129, 1), (1, 129), (1000, 1), (3, 700)])
def test_a_thin_picture_keeps_a_row_of_pixels(tmp_path, size):
    row = np.linspace(1, 255, max(size)).astype(np.uint8)
    pixels = np.broadcast_to(row if size[0] > size[1] else row[:, None], size[::-1])
    Image.fromarray(pixels.copy()).save(tmp_path / "a.png")
    grey = read_grey(tmp_path / "a.png", 64)
    line = grey.max(0) if size[0] > size[1] else grey.max(1)
    assert (np.diff(line) > 0).all() and np.count_nonzero(grey) == 64


def test_a_picture_that_becomes_one_colour_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.merge("LA", [Image.new("L", (16, 16), 255), Image.fromarray(RAMP.astype(np.uint8))]).save(path)
    with pytest.raises(UserError, match=rf"^{path}: .*all its pixels become one colour, 255\); replace or remove"):
        read_grey(path)
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(path)  # it always was one colour
    assert (read_grey(path) == 255).all()
    picture = Image.fromarray(np.eye(4, dtype=np.uint8))
    picture.putpalette([7, 7, 7, 7, 7, 7])  # two entries of one colour
    picture.save(path)
    assert (read_grey(path) == 7).all()


@pytest.mark.parametrize("palette", [{}, {"PLTE": np.arange(48, dtype=np.uint8)}], ids=["none", "short"])
def test_a_palette_that_lacks_colours_of_the_pixels_is_refused(tmp_path, palette):
    path = tmp_path / "a.png"
    path.write_bytes(png(RAMP[:, :, None], 8, 3, **palette))
    with pytest.raises(UserError, match=rf"^{path}: .*\(its pixels have colours that its palette lacks\)"):
        read_grey(path)


def test_an_error_always_has_a_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(png(RAMP[:, :, None], 8, 3))  # Pillow fails with an empty AssertionError
    with pytest.raises(UserError, match=r"cannot be decoded as an image \(\w+"):
        has_colour(tmp_path / "a.png")


def test_shapes_of_a_picture(tmp_path):
    Image.new("RGB", (7, 3), (10, 20, 30)).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png", 3, 5)
    assert picture.dtype == torch.uint8 and picture.shape == (3, 5, 5)
