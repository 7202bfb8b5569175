"""Pictures of any source as a dataset: decoded once, kept in a flat file, and split."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from bnexp.data.dataset import Dataset, Options, Split, assemble, check_size
from bnexp.data.pictures import GREY_MODES, square_of
from bnexp.data.stored import Decoder, Stored, decode_once
from bnexp.errors import UserError

NUM_TRIED = 16  # images of a set that are looked at for colours before all are decoded
LARGEST_SIDE = 64  # pixels: the side of the images where none is given


def load_decoded(source, settings: Sequence, files: Sequence, counts: Mapping[str, int], decode: Decoder) -> Dataset:
    """The dataset of a source whose images ``decode(i)`` gives: ``counts["train"]`` training images, then others.

    ``settings`` and ``files`` are those of :func:`~bnexp.data.stored.decode_once`. While images are decoded,
    ``source.show(done, total)`` is called, if it is set.
    """
    shape = (sum(counts.values()), *source.in_shape)
    show = getattr(source, "show", lambda done, total: None)
    images, labels = decode_once(settings, files, shape, decode, show, source.options.resident is False)
    splits, end = {}, 0
    for split, count in counts.items():
        places = slice(end, end := end + count)
        splits[split] = Split(images.take(places) if isinstance(images, Stored) else images[places], labels[places])
    return assemble(source, splits["train"], splits.get("test"), splits.get("valid"))


def stats_of(paths: Sequence[Path], root: Path) -> list[tuple[str, int, int]]:
    """The name below ``root``, size and time of change of each file."""
    return [(str(path.relative_to(root)), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]


class Pairs:
    """A source of (picture, label) pairs; a picture is one of Pillow or an array uint8 (H, W) or (H, W, channels).

    ``splits`` has ``train`` and maybe ``valid`` and ``test``; a split has a length and gives pair i by ``[i]``. Labels
    are numbers into ``class_names``. Missing splits are set aside from the training images. ``size=None`` is the larger
    side of the first picture, at most 64. ``channels=None`` is 3 if one of 16 pictures spread over the training images
    has colours; a picture that has them is refused if the others have none. ``settings`` and ``files`` tell
    :func:`~bnexp.data.stored.decode_once` what the pictures are.
    """

    def __init__(
        self, splits: Mapping[str, Sequence], class_names: Sequence[str], settings: Sequence, files: Callable[[], list],
        *, size, valid, test, limit, augment, normalize, channels, resident, corrupt="none", strength=None,
    ):  # fmt: skip
        if channels not in (None, 1, 3):
            raise UserError(f"data.channels={channels}: not 1 (grey), 3 (colour) or null (as the images are)")
        test = (0 if "test" in splits else 0.1) if test is None else test
        self.options = Options(valid, limit, augment, normalize, test, resident, corrupt, strength)
        self.class_names, self._splits = tuple(class_names), dict(splits)
        self._settings, self._files, self._may_have_colour = settings, files, channels is not None
        train = self._splits["train"]
        tried = [self._pair("train", i)[0] for i in range(0, len(train), -(-len(train) // NUM_TRIED))]
        channels = channels or (3 if any(map(is_colour, tried)) else 1)
        size = check_size(
            size, min(LARGEST_SIDE, max(tried[0].shape[:2] if isinstance(tried[0], np.ndarray) else tried[0].size))
        )
        self.in_shape = (channels, size, size)

    def load(self) -> Dataset:
        places = [(split, i) for split, pairs in self._splits.items() for i in range(len(pairs))]
        counts = {split: len(pairs) for split, pairs in self._splits.items()}
        files = [counts, self.class_names, self._files()]
        return load_decoded(self, self._settings, files, counts, lambda i: self._decode(*places[i]))

    def _pair(self, split: str, i: int) -> tuple:
        name = self._name(split, i)
        try:
            picture, label = self._splits[split][i]
            return picture if hasattr(picture, "getbands") else np.asarray(picture), int(label)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: no pair of a picture and a number of a class ({error})") from error

    def _decode(self, split: str, i: int) -> tuple[Tensor, int]:
        name, (picture, label) = self._name(split, i), self._pair(split, i)
        if not 0 <= label < len(self.class_names):
            raise UserError(f"{name}: its label is {label}, and there are {len(self.class_names)} classes")
        if self.in_shape[0] == 1 and not self._may_have_colour and is_colour(picture):
            raise UserError(f"{name}: has colours, others have none; give data.channels=3 or 1")
        try:
            return square_of(picture, *self.in_shape[:2]), label
        except Exception as error:  # decoders fail in many ways
            raise UserError(f"{name}: cannot be decoded as an image ({error})") from error

    def _name(self, split: str, i: int) -> str:
        return f"data={self.name} data.name={self._settings[1]}: {split} image {i}"


def is_colour(picture) -> bool:
    """Whether a picture of Pillow, or an array, has several colour channels or a palette."""
    mode = getattr(picture, "mode", None)
    return picture.shape[2:] not in ((), (1,)) if mode is None else mode.partition(";")[0] not in GREY_MODES
