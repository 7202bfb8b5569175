"""A person's own images, or a stranger's: one folder per class, any size, grey or colour.

``root/train/<class>/*`` and, if there are any, ``root/valid/<class>/*`` and ``root/test/<class>/*``. Without
``valid/`` a part of the training images is set aside; without ``test/`` the test split is empty.
"""

import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from bnexp.data.dataset import Dataset, Options, Split, assemble, check_size, find_root
from bnexp.errors import UserError

LAYOUT = "one folder per class is expected in it, as in train/cat/1.jpg and train/dog/2.jpg"
GREY_MODES = ("1", "L", "LA", "I", "F")  # and I;16 in its byte orders
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # a terminal would obey it
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, which starts a program


class Folder:
    """Images of a folder, scaled to fit ``size`` x ``size`` with their aspect ratio kept and the rest black.

    The classes are the folders in ``train/``, sorted. ``channels``: 1 makes all images grey, 3 all of them
    colour, None decides from the headers of the training images, 3 if any has colours. Transparent pixels
    become white, photographs are turned as their camera noted, hidden files are passed over. Of an animation the
    first picture counts. Refused are files of other formats, and pictures of more than 89 million pixels: a small
    file can hold one that fills the memory.
    """

    name = "folder"

    def __init__(
        self, root=None, size=64, valid=0.1, limit=None, augment="none", normalize=True, channels=None
    ):
        if root is None:
            raise UserError(f"data=folder: which folder? Name it with data.root=photos/; {LAYOUT}")
        if channels not in (None, 1, 3):
            raise UserError(f"data.channels={channels}: not 1 (grey), 3 (colour) or null (as the images are)")
        self.options = Options(valid, limit, augment, normalize)
        self.root = find_root(root)
        size = check_size(size, default=64)
        if not (self.root / "train").is_dir():
            raise UserError(f"data.root={root}: no folder train/ in it; {LAYOUT}")
        self.class_names = tuple(path.name for path in _visible(self.root / "train") if path.is_dir())
        if odd := list(filter(UNPRINTABLE.search, self.class_names)):
            raise UserError(f"{self.root / 'train' / odd[0]}: control characters in the name of a class; rename it")
        if len(self.class_names) < 2:
            raise UserError(f"data.root={root}: fewer than two class folders in train/; {LAYOUT}")
        self._files = {split: self._scan(split) for split in ("train", "valid", "test")}
        if channels is None:
            channels = 3 if any(_has_colour(path) for path, _ in self._files["train"]) else 1
        self.in_shape = (channels, size, size)

    def load(self) -> Dataset:
        train, valid, test = (self._read(self._files[split]) for split in ("train", "valid", "test"))
        return assemble(self, train, test, valid if len(valid) else None)

    def _scan(self, split: str) -> list[tuple[Path, int]]:
        """Every image file of a split with its label; empty where there is no such folder."""
        folder = self.root / split
        if not folder.is_dir():
            return []
        names = [path.name for path in _visible(folder) if path.is_dir()]
        if unknown := sorted(set(names) - set(self.class_names)):
            raise UserError(
                f"{folder / unknown[0]}: no such class in {self.root / 'train'}; rename or remove it"
            )
        found = []
        for name in names:
            paths = _visible(folder / name)
            if not paths:
                raise UserError(f"{folder / name}: a class folder without images; add some or remove it")
            if folders := [path for path in paths if path.is_dir()]:
                raise UserError(f"{folders[0]}: a folder where images are expected; move its images one up")
            if odd := [path for path in paths if not path.is_file()]:  # a pipe would be waited for
                raise UserError(f"{odd[0]}: a pipe, a device or a link to nothing; replace or remove it")
            found += [(path, self.class_names.index(name)) for path in paths]
        if not found:
            raise UserError(f"{folder}: no class folders in it; add some or remove it")
        return found

    def _read(self, files: list[tuple[Path, int]]) -> Split:
        images = torch.empty(len(files), *self.in_shape, dtype=torch.uint8)
        with no_bombs(), ThreadPoolExecutor() as pool:  # decoding runs outside of Python's lock
            decoded = pool.map(lambda file: read_image(file[0], self.in_shape), files)
            for i, image in enumerate(decoded):
                images[i] = image
        return Split(images, torch.tensor([label for _, label in files], dtype=torch.int64))


def read_image(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    """The image as uint8 ``shape`` (C, H, W), C = 1 or 3; :class:`UserError` if it cannot be decoded."""
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft(None, (width, height))  # lets a JPEG decode to a smaller size, much faster
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits per pixel
                image = image.convert("I").point(lambda value: value / 257).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            image = ImageOps.pad(image, (width, height), Image.Resampling.BILINEAR)
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except Exception as error:  # decoders fail in many ways
        raise _undecodable(path, error) from None
    return pixels.view(height, width, channels).permute(2, 0, 1)


def _has_colour(path: Path) -> bool:
    from PIL import Image

    try:
        with no_bombs(), Image.open(path, formats=FORMATS) as image:  # reads the header only
            return image.mode not in GREY_MODES and not image.mode.startswith("I;16")
    except Exception as error:
        raise _undecodable(path, error) from None


@contextmanager
def no_bombs() -> Iterator[None]:
    """Have Pillow refuse pictures at which it would only warn. Not for threads: the warnings' filters are shared."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what else it thinks of the file is no news
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _undecodable(path: Path, error: Exception) -> UserError:
    known = ", ".join(FORMATS)
    return UserError(f"{path}: cannot be decoded as an image ({error}); replace or remove it; known are {known}")


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
