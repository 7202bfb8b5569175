"""The stream of training batches: the order of the images and their augmentation, both drawn from one seed.

The stream draws from two generators of its own, so that no norm, probe or engine can change what the next batch
holds, and a resumed run sees the batches that it would have seen. The order is drawn on the CPU, the same for every
device. Augmentation is drawn on the device, inside captured steps; a CPU and a GPU augment differently.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from bnexp.data.dataset import Dataset
from bnexp.data.few_classes import check_classes, order_by_classes
from bnexp.errors import UserError

# Bytes of images that are prepared at a time. Measured on MNIST in batches of 16: half the time of batch by batch;
# 16 MiB or a whole epoch at a time is slower, because the images have left the cache when they are used.
AHEAD_BYTES = 2**20
CROP_MARGIN = 4  # pixels of the stored image on each side, as is usual for CIFAR


class Batches:
    """An endless stream of batches of ``dataset.train``: every image once per epoch, in a new order every epoch.

    ``drop_last`` leaves out the short batch at an epoch's end, because batch norm sees other statistics in it. The
    order of the images does not depend on ``drop_last``.

    ``classes_per_batch=k`` makes batches of at most k classes, in parts as even as possible; see
    :func:`~bnexp.data.few_classes.deal`. The length of an epoch stays, and every image still comes once. ``drop_last``
    then leaves out images of at most k classes, different ones in every epoch.

    Raises :class:`UserError` if no batch of this size, or of so few classes, can be made.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        *,
        drop_last: bool = True,
        classes_per_batch: int | None = None,
    ):
        num_images = len(dataset.train)
        if type(batch_size) is not int or batch_size < 1:
            raise UserError(f"batch_size={batch_size}: not a whole number of images; give 1 or more")
        if drop_last and batch_size > num_images:
            raise UserError(
                f"batch_size={batch_size}: only {num_images} training images, which makes no full batch; "
                f"use batch_size={num_images} or less, or drop_last=false"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.classes_per_batch = classes_per_batch
        if classes_per_batch is not None:
            self._labels = dataset.train.labels.cpu()
            self._counts = torch.bincount(self._labels).tolist()
            check_classes(classes_per_batch, self._counts, batch_size)
        self.steps_per_epoch = num_images // batch_size if drop_last else -(-num_images // batch_size)
        self.num_images = self.steps_per_epoch * batch_size if drop_last else num_images
        # Two generators, so that the order depends neither on the augmentation nor on drop_last.
        self._orders = torch.Generator().manual_seed(seed)
        augment_seed = torch.randint(2**31, (), generator=self._orders)
        self.generator = torch.Generator(dataset.device).manual_seed(int(augment_seed))
        self._num_ahead = self._count_ahead()
        self._start_epoch()

    def next(self) -> tuple[Tensor, Tensor]:
        """The images float32 (B, *in_shape) and labels int64 (B,) of the next batch."""
        start, end = self.advance()
        if not self._ahead_start <= start < self._ahead_end:
            is_next = start == self._ahead_end  # else an epoch begins, or a fold took steps in between
            self._ahead_start, self._ahead_end = start, min(start + self._num_ahead, self.num_images)
            picked = self.order[start : self._ahead_end]
            if self.dataset.is_resident:
                self._ahead = self.gather(picked)
            else:
                self._stored = self._stored if is_next and self._stored else self._read_from(start)
                self._ahead = self._finish(next(self._stored), picked)
        images, labels = self._ahead
        if end == self._ahead_end:
            self._ahead = None  # the memory is free for the next batches
        batch = slice(start - self._ahead_start, end - self._ahead_start)
        return images[batch], labels[batch]

    def _read_from(self, start: int) -> Iterator[Tensor]:
        """Yield the stored images of the epoch from ``start`` on, as many at a time as are prepared together."""
        order, size = self.order.cpu(), self._num_ahead
        return self.dataset.train.images_in(
            order[i : min(i + size, self.num_images)] for i in range(start, self.num_images, size)
        )

    def advance(self) -> tuple[int, int]:
        """Move to the next batch, in a new epoch if this one is over; returns its start and end in ``order``."""
        if self._position >= self.num_images:
            self._start_epoch()
        start = self._position
        self._position = min(start + self.batch_size, self.num_images)
        return start, self._position

    def gather(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """The training images at the indices ``picked`` (B,), augmented and prepared, and their labels."""
        return self._finish(self.dataset.train.images_at(picked), picked)

    def _finish(self, images: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        images = augment(images, self.dataset.augment, self.generator)
        return self.dataset.prepare(images), self.dataset.train.labels.index_select(0, picked)

    def _count_ahead(self) -> int:
        """How many images are gathered at a time: on a CPU as many whole batches as fit into AHEAD_BYTES.

        Batches are then views. Augmented images are gathered batch by batch, because so are their random numbers.
        """
        if self.dataset.device.type != "cpu" or self.dataset.augment != "none":
            return self.batch_size
        return max(1, AHEAD_BYTES // (4 * math.prod(self.dataset.in_shape)) // self.batch_size) * self.batch_size

    def _start_epoch(self):
        self._epoch_state = self._orders.get_state()
        train, k = self.dataset.train, self.classes_per_batch
        order = torch.randperm(len(train), generator=self._orders)
        if k is not None:
            order = order_by_classes(order, self._labels, self._counts, self.batch_size, k, self._orders)
        self.order = order.to(self.dataset.device, non_blocking=True)
        self._position = self._ahead_start = self._ahead_end = 0
        self._stored = None

    def state_dict(self) -> dict:
        """Tensors and numbers from which the stream continues bit for bit, in the middle of an epoch too.

        The order is stored as the state of its generator before the epoch: a few kilobytes for any dataset.
        """
        return {
            "order": self._epoch_state.clone(),
            "augment": self.generator.get_state(),
            "position": self._position,
            "num_images": len(self.dataset.train),
            "images": self.dataset.fingerprint,
            "device": self.dataset.device.type,
            "classes_per_batch": self.classes_per_batch,
        }

    def load_state_dict(self, state: dict):
        """Continue where ``state`` was taken; raises :class:`UserError` if the stream would not be the same."""
        num_images, device = len(self.dataset.train), self.dataset.device.type
        if state["num_images"] != num_images:
            raise UserError(
                f"the checkpoint saw {state['num_images']} training images, this run has {num_images}; "
                "continue with the same data, data.valid and data.limit"
            )
        if state.get("images", self.dataset.fingerprint) != self.dataset.fingerprint:  # older checkpoints name none
            raise UserError(
                f"the checkpoint saw other images or classes than {self.dataset.place} holds now; "
                "continue with the same files, data.valid and data.limit"
            )
        if state["device"] != device:
            raise UserError(
                f"the checkpoint was computed on {state['device']}, {device} rounds and augments differently; "
                f"continue with device={state['device']}"
            )
        classes = state.get("classes_per_batch")
        if classes != self.classes_per_batch:
            given, had = ("null" if k is None else k for k in (self.classes_per_batch, classes))
            raise UserError(
                f"classes_per_batch={given}: the checkpoint drew its batches with {had}; "
                f"continue with classes_per_batch={had}"
            )
        # A checkpoint is loaded onto the run's device; a generator takes its state from the CPU, whatever it draws on.
        self._orders.set_state(state["order"].cpu())
        self.generator.set_state(state["augment"].cpu())
        self._start_epoch()
        self._position = state["position"]


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Stored images (N, C, H, W), each changed at random: ``kind`` is ``none``, ``flip`` or ``crop_flip``.

    ``flip`` mirrors left and right with probability 1/2. ``crop_flip`` first moves the image by up to 4 stored pixels
    each way: it adds a black margin of 4 and cuts out a window of the old size at a random place.
    """
    if kind == "none":
        return images
    num_images, _, height, width = images.shape
    device = images.device
    if kind == "crop_flip":
        padded = pad(images, (CROP_MARGIN,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view, (N, C, 9, 9, H, W)
        top, left = torch.randint(2 * CROP_MARGIN + 1, (2, num_images), generator=generator, device=device)
        images = windows[torch.arange(num_images, device=device), :, top, left]
    flipped = torch.rand(num_images, generator=generator, device=device) < 0.5
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
