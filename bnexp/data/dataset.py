"""The images that a run trains, validates and tests on, as tensors on its device.

A source (digits, mnist, cifar10, folder) reads its files and gives whole splits to :func:`assemble`. Every dataset
holds uint8 images on the model's device, which become floats batch by batch.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bnexp.data.corrupt import check_corruption, corrupt
from bnexp.errors import UserError, home_path

AUGMENTATIONS = ("none", "flip", "crop_flip")
SPLIT_SEED = 20150211  # runs of all seeds share one split, unless vary=[seed,split] adds the run's seed to it


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 (N, C, H, W) and labels int64 (N,); N = 0 if a dataset has no such split."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        """The images at ``indices``, in the order in which they are stored."""
        indices = indices.sort().values
        return Split(self.images.index_select(0, indices), self.labels.index_select(0, indices))


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

    def __post_init__(self):
        # (u/255 - mean)/std = u*scale + offset, shaped (C, 1, 1) to meet (N, C, H, W)
        scale = 1 / (255 * self.std) if self.normalize else torch.full_like(self.std, 1 / 255)
        offset = -self.mean / self.std if self.normalize else torch.zeros_like(self.mean)
        object.__setattr__(self, "_scale", scale.view(-1, 1, 1))
        object.__setattr__(self, "_offset", offset.view(-1, 1, 1))
        object.__setattr__(self, "device", self.train.images.device)

    def to(self, device) -> "Dataset":
        """The same dataset with every tensor on ``device``."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "valid", "test")}
        return replace(self, **splits, mean=self.mean.to(device), std=self.std.to(device))

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
            if not isinstance(split, Split) or not all(isinstance(each, Tensor) for each in vars(split).values()):
                return f"{name} is no bnexp.data.dataset.Split of two tensors"
            images, labels = split.images, split.labels
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != channels:
                shape = tuple(images.shape)
                return f"the {name} images are {images.dtype} {shape}; they must be uint8 (N, {channels}, H, W)"
            if len(images) and 0 in images.shape:
                return f"the {name} images are {images.shape[2]} pixels high and {images.shape[3]} wide; give 1 or more"
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                shape = tuple(labels.shape)
                return f"the {name} labels are {labels.dtype} {shape}; they must be int64 ({len(images)},)"
            if unlike := unusual(images) or unusual(labels):
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
            found.update(tensor.cpu().contiguous().numpy())
    return found.hexdigest()[:12]


@dataclass(frozen=True)
class Options:
    """The checked settings that all sources share; ``conf/data/*.yaml`` explains them."""

    valid: float | int
    limit: int | None
    augment: str
    normalize: bool
    corrupt: str = "none"
    strength: float | None = None
    test: float | int = 0

    def __post_init__(self):
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
    origin = fingerprint_of(source.class_names, train, test) if is_drawn else ""
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
        test = Split(corrupt(test.images, options.corrupt, options.strength), test.labels)
    mean, std = channel_moments(train.images)
    return Dataset(
        source.name, train, valid, test, source.class_names, source.in_shape, mean, std,
        augment=options.augment, normalize=options.normalize, origin=origin,
        place=f"data.root={source.root}" if hasattr(source, "root") else "data.root",
    )  # fmt: skip


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of uint8 (N, C, H, W) over N, H, W, in units of [0, 1].

    Counts how often each of the 256 values occurs, which is exact and needs no float copy of the images. The smallest
    std is one grey level, 1/255, because images are divided by it.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for chunk in images.split(4096):
        for channel in range(images.shape[1]):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    share = counts / counts.sum(1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)
    return mean.float(), std.float()


def _shuffled(num_images: int, seed: int = 0) -> Tensor:
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(SPLIT_SEED + seed))
