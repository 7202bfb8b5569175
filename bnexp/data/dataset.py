"""The images that a run trains, validates and tests on: tensors on its device, or read when a batch needs them.

A source (digits, mnist, cifar10, folder) reads its files and gives whole splits to :func:`assemble`. Every dataset
has uint8 images, which become floats on the model's device, batch by batch.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bnexp.data.corrupt import check_corruption, corrupt
from bnexp.data.stored import Stored, block_of, free_memory
from bnexp.errors import UserError, home_path

AUGMENTATIONS = ("none", "flip", "crop_flip")
SPLIT_SEED = 20150211  # runs of all seeds share one split, unless vary=[seed,split] adds the run's seed to it


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 (N, C, H, W) and labels int64 (N,); N = 0 if a dataset has no such split.

    :meth:`images_at` and :meth:`images_in` give images as tensors on the device of the labels, wherever they are.
    """

    images: Tensor | Stored
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def images_at(self, indices: slice | Tensor) -> Tensor:
        """The images at ``indices``, a slice or int64 (B,)."""
        is_plain = isinstance(self.images, Stored) or isinstance(indices, slice)
        return self.images[indices] if is_plain else self.images.index_select(0, indices)

    def images_in(self, chunks: Iterable[slice | Tensor]) -> Iterator[Tensor]:
        """Yield the images of every chunk of indices. Images that are not resident are read ahead."""
        is_stored = isinstance(self.images, Stored)
        return self.images.read_ahead(chunks) if is_stored else map(self.images_at, chunks)

    def to(self, device, resident: bool = True) -> "Split":
        """The split on ``device``; its images stay where they are, and are read from there, unless ``resident``."""
        images = self.images.to(device) if resident else Stored.of(self.images, device)
        return Split(images, self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        """The images at ``indices``, in the order in which they are stored."""
        indices = indices.sort().values
        is_stored = isinstance(self.images, Stored)
        images = self.images.take(indices) if is_stored else self.images.index_select(0, indices)
        return Split(images, self.labels.index_select(0, indices))


@dataclass(frozen=True, eq=False)
class Dataset:
    """The splits that a source loads, and how their images become the input of a model.

    ``mean`` and ``std`` (C,) are those of the training images in [0, 1]. Nothing is reported on an empty ``valid`` or
    ``test`` split. ``origin`` is the fingerprint from before a run's seed drew the validation images, if it did.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    class_names: tuple[str, ...]
    in_shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor
    augment: str = "none"
    normalize: bool = True
    about: str = ""  # one line on what was found, if a person has put the files together
    origin: str = ""
    place: str = "data.root"  # where its files are, in words
    resident: bool | str = True  # on the device, or not (False), or "auto": there if half the free memory holds it

    def __post_init__(self):
        # (u/255 - mean)/std = u*scale + offset, shaped (C, 1, 1) to meet (N, C, H, W)
        scale = 1 / (255 * self.std) if self.normalize else torch.full_like(self.std, 1 / 255)
        offset = -self.mean / self.std if self.normalize else torch.zeros_like(self.mean)
        object.__setattr__(self, "_scale", scale.view(-1, 1, 1))
        object.__setattr__(self, "_offset", offset.view(-1, 1, 1))
        object.__setattr__(self, "device", self.train.images.device)

    def to(self, device) -> "Dataset":
        """The same dataset on ``device``, with its images there or read when they are used, by ``resident``."""
        device, splits = torch.device(device), [self.train, self.valid, self.test]
        far = [each.images for each in splits if isinstance(each.images, Stored) or each.images.device != device]
        to_move = sum(images.numel() for images in far)
        fits = 2 * to_move <= free_memory(device) if self.resident == "auto" and to_move else self.resident
        train, valid, test = (each.to(device, fits) if len(each) else each.to(device) for each in splits)
        return self.like(train=train, valid=valid, test=test, mean=self.mean.to(device), std=self.std.to(device))

    def like(self, **changes: Any) -> "Dataset":
        """The dataset with ``changes`` that leave its images as they are, so that its fingerprint stays known."""
        other = replace(self, **changes)
        other.__dict__.update({key: value for key, value in vars(self).items() if key == "fingerprint"})
        return other

    @property
    def is_resident(self) -> bool:
        """Whether the training images are a tensor on the device."""
        return isinstance(self.train.images, Tensor)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of a SHA-256 over the classes, and the images and labels of every split."""
        return fingerprint_of(self.class_names, self.train, self.valid, self.test)

    @cached_property
    def majority(self) -> dict[str, tuple[float, int]]:
        """{split: (the share of its largest class, its number of images)} of the splits that hold images."""
        splits = {name: getattr(self, name).labels for name in ("train", "valid", "test")}
        counts = {name: labels.flatten().bincount() for name, labels in splits.items() if len(labels)}
        return {name: (int(each.max()) / int(each.sum()), int(each.sum())) for name, each in counts.items()}

    def fault(self) -> str | None:
        """What is wrong with the tensors, in words; None if nothing is."""
        channels, num_classes = self.in_shape[0], len(self.class_names)
        for name in ("train", "valid", "test"):
            split = getattr(self, name)
            if not isinstance(split, Split) or not all(
                isinstance(each, Tensor | Stored) for each in vars(split).values()
            ):
                return f"{name} is no bnexp.data.dataset.Split of two tensors"
            images, labels = split.images, split.labels
            if images.dtype != torch.uint8 or len(images.shape) != 4 or images.shape[1] != channels:
                shape = tuple(images.shape)
                return f"the {name} images are {images.dtype} {shape}; they must be uint8 (N, {channels}, H, W)"
            if len(images) and 0 in images.shape:
                return f"the {name} images are {images.shape[2]} pixels high and {images.shape[3]} wide; give 1 or more"
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                shape = tuple(labels.shape)
                return f"the {name} labels are {labels.dtype} {shape}; they must be int64 ({len(images)},)"
            if unlike := unusual(labels) or (isinstance(images, Tensor) and unusual(images)):
                return f"the {name} images or labels {unlike}"
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
                return f"the {name} labels go from {labels.min()} to {labels.max()}; there are {num_classes} classes"
        if not len(self.train):
            return "there are no training images"
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if not isinstance(numbers, Tensor):
                return f"{name} is {numbers!r}; it must be a tensor of {channels} numbers"
            if unlike := unusual(numbers):
                return f"the numbers of {name} {unlike}"
            if numbers.shape != (channels,) or not numbers.isfinite().all() or (name == "std" and (numbers <= 0).any()):
                return f"{name} is {numbers.tolist()}; {channels} finite numbers are expected, of std above 0"
        if self.augment not in AUGMENTATIONS:
            return f"augment is {self.augment!r}; choose one of {', '.join(AUGMENTATIONS)}"
        return None

    def prepare(self, images: Tensor) -> Tensor:
        """Stored uint8 (N, C, h, w) -> float32 (N, *in_shape), on the device of ``images``.

        Scales to [0, 1], subtracts the mean and divides by the standard deviation of each channel if
        ``normalize``, and resizes bilinearly to another size: the aspect ratio is kept, the rest is black.
        """
        scale, offset = self._scale.to(images.device), self._offset.to(images.device)
        x = images.to(torch.float32).mul_(scale).add_(offset)
        height, width = self.in_shape[1:]
        if x.shape[2:] == (height, width):
            return x
        ratio = min(height / x.shape[2], width / x.shape[3])
        inner = (max(1, round(x.shape[2] * ratio)), max(1, round(x.shape[3] * ratio)))
        # Both maps are affine, so normalizing first gives the same values and works on the smaller image.
        x = interpolate(x, size=inner, mode="bilinear", antialias=ratio < 1)
        if inner == (height, width):
            return x
        canvas = offset.expand(len(x), *self.in_shape).contiguous()  # the normalized value of black
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        canvas[:, :, top : top + inner[0], left : left + inner[1]] = x
        return canvas


def unusual(tensor: Tensor) -> str:
    """Why no run can compute with ``tensor``; empty if one can."""
    if tensor.is_meta:
        return "lie on the meta device, without contents; give tensors that hold numbers"
    if tensor.layout != torch.strided:
        return f"are stored as {tensor.layout}; give dense ones, .to_dense()"
    return "need a gradient; give .detach() of them" if tensor.requires_grad else ""


def fingerprint_of(class_names: tuple[str, ...], *splits: Split) -> str:
    """:attr:`Dataset.fingerprint` of these splits."""
    found = hashlib.sha256(repr(class_names).encode())
    for split in splits:
        for tensor in (split.images, split.labels):
            found.update(repr(tuple(tensor.shape)).encode())
            for block in tensor.split(block_of(tensor.shape)):
                found.update(block.cpu().contiguous().numpy())
    return found.hexdigest()[:12]


@dataclass(frozen=True)
class Options:
    """The checked settings that all sources share; ``conf/data/*.yaml`` explains them."""

    valid: float | int
    limit: int | None
    augment: str
    normalize: bool
    test: float | int = 0
    resident: bool | str = True
    corrupt: str = "none"
    strength: float | None = None

    def __post_init__(self):
        words = {"true": True, "false": False}  # the command line reads a text, as the default is one
        object.__setattr__(self, "resident", words.get(self.resident, self.resident))
        if self.resident not in ("auto", True, False):
            raise UserError(
                f"data.resident={self.resident}: choose true (all images on the device), false (read from a file in "
                "the cache folder when a batch needs them) or auto (by the free memory)"
            )
        for split, part in (("valid", self.valid), ("test", self.test)):
            upper = {int: float("inf"), float: 1}.get(type(part), 0)
            if not upper or not 0 <= part < upper:
                raise UserError(
                    f"data.{split}={part}: neither a part nor a number of the training images; "
                    f"give a fraction below 1 (data.{split}=0.1), a count (data.{split}=5000) or 0 for none"
                )
        if self.limit is not None and not (type(self.limit) is int and self.limit > 0):
            raise UserError(f"data.limit={self.limit}: not a whole number of images; give 1 or more, null for all")
        if self.augment not in AUGMENTATIONS:
            choices = ", ".join(AUGMENTATIONS)
            raise UserError(f"data.augment={self.augment}: not known; choose one of {choices}")
        if type(self.normalize) is not bool:
            raise UserError(f"data.normalize={self.normalize}: neither true nor false; give one of the two")
        check_corruption(self.corrupt, self.strength)


def check_size(size: int | None, default: int) -> int:
    """The side of the square image that the model sees, ``default`` when None."""
    if size is None:
        return default
    if type(size) is not int or size < 1:
        raise UserError(f"data.size={size}: not a whole number of pixels; give 1 or more, {default} for example")
    return size


def find_root(root) -> Path:
    """The folder of the files: ``root``, else $BNEXP_DATA, else ``bnexp`` in the user's cache folder."""
    given = f"data.root={root}"
    if root == "":
        raise UserError("data.root=: names no folder; give one, or leave it out for the usual one")
    if root is None and (root := os.environ.get("BNEXP_DATA")):
        given = f"BNEXP_DATA={root}"
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "bnexp")
        given = f"data.root={root}"
    path = home_path(str(root), given.partition("=")[0] + "=")
    if path.exists() and not path.is_dir():
        raise UserError(f"{given}: a file; give the folder of the data")
    return path


def set_aside(train: Split, split: str, part: float | int, seed: int = 0) -> tuple[Split, Split]:
    """The images that ``data.<split>=part`` takes from ``train`` at random, the same ones by one seed, and the others.

    Raises :class:`UserError` if no others are left.
    """
    num_images = len(train)
    count = part if isinstance(part, int) else max(1, round(part * num_images)) if part else 0
    if count >= num_images:
        raise UserError(
            f"data.{split}={part}: takes {count} of {num_images} training images and leaves none; "
            f"give a fraction such as data.{split}=0.1 or a count below {num_images}"
        )
    order = _shuffled(num_images, seed)
    return train.take(order[:count]), train.take(order[count:])


def assemble(source, train: Split, test: Split | None = None, valid: Split | None = None) -> Dataset:
    """A source's :class:`Dataset`: with missing splits set aside, every split limited, and channels measured.

    ``source`` has ``name``, ``class_names``, ``in_shape`` and ``options``. If ``test`` is None, it gets the part
    ``options.test`` of the training images; if ``valid`` is None, it gets ``options.valid`` of the others. The choice
    of images, also by ``options.limit``, depends on nothing but their number; that of ``valid`` also on
    ``source.split_seed``, if it is set.
    """
    options = source.options
    if test is None:
        test, train = set_aside(train, "test", options.test)
    seed = getattr(source, "split_seed", None)
    is_drawn = seed is not None and valid is None and options.valid
    origin = noted("origin", source, fingerprint_of, train, test) if is_drawn else ""
    if valid is None:
        valid, train = set_aside(train, "valid", options.valid, seed or 0)
    if options.limit is not None:
        train, valid, test = (
            split if len(split) <= options.limit else split.take(_shuffled(len(split))[: options.limit])
            for split in (train, valid, test)
        )
    if options.corrupt != "none":
        if not len(test):
            raise UserError(f"data.corrupt={options.corrupt}: there are no test images to change; leave it out")
        test = Split(corrupt(test.images.to("cpu"), options.corrupt, options.strength), test.labels)
    mean, std = noted("moments", source, lambda *_: [each.tolist() for each in channel_moments(train.images)], train)
    dataset = Dataset(
        source.name, train, valid, test, source.class_names, source.in_shape,
        torch.tensor(mean), torch.tensor(std), resident=options.resident,
        augment=options.augment, normalize=options.normalize, origin=origin,
        place=f"data.root={source.root}" if hasattr(source, "root") else "data.root",
    )  # fmt: skip
    if not dataset.is_resident:
        dataset.__dict__["fingerprint"] = noted("fingerprint", source, fingerprint_of, train, valid, test)
    return dataset.to("cpu")


def noted(name: str, source, compute: Callable[..., Any], *splits: Split) -> Any:
    """``compute(class names, *splits)``; of stored images it is kept beside their file, by their places in it."""
    if not isinstance(splits[0].images, Stored):
        return compute(source.class_names, *splits)
    places = hashlib.sha256(repr((name, source.class_names)).encode())
    for split in splits:
        places.update(split.images.places.numpy())
        places.update(b"|")
    return splits[0].images.rows.noted(places.hexdigest()[:20], lambda: compute(source.class_names, *splits))


def channel_moments(images: Tensor | Stored) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of uint8 (N, C, H, W) over N, H, W, in units of [0, 1].

    Counts how often each of the 256 values occurs, which is exact and needs no float copy of the images. The smallest
    std is one grey level, 1/255, because images are divided by it.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for chunk in images.split(block_of(images.shape)):
        for channel in range(images.shape[1]):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    share = counts / counts.sum(1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)
    return mean.float(), std.float()


def _shuffled(num_images: int, seed: int = 0) -> Tensor:
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(SPLIT_SEED + seed))
