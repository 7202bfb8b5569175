"""The stream of training batches: which images come when, and how they are augmented, given one seed.

Everything is drawn from generators of its own on the dataset's device, so that no norm, probe or engine can
change what the next batch holds, and a run that is continued sees the batches it would have seen.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from bnexp.data.dataset import Dataset
from bnexp.data.few_classes import check_classes, deal
from bnexp.errors import UserError

# Of prepared images that lie ready. By measurement: MNIST in batches of 16 takes half the time that it takes batch by
# batch, and 16 MiB at a time (or a whole epoch) take longer than that, because they have left the cache when used.
AHEAD_BYTES = 2**20
CROP_MARGIN = 4  # pixels of the stored image on each side, as is usual for CIFAR


class Batches:
    """Endless batches of ``dataset.train``, every image once per epoch in an order drawn anew each epoch.

    ``next()`` gives float32 (B, *in_shape) and int64 (B,). ``drop_last`` leaves out the short batch at an
    epoch's end (batch norm sees other statistics in it); the order of the images is the same either way.

    ``classes_per_batch=k`` makes batches that are not a fair sample: at most k classes each, in parts as even as
    can be, while an epoch keeps its length and every image still comes once. Which classes meet, and with which
    images, is drawn anew each epoch; inside a batch the images are shuffled. See :func:`deal` for what is promised.
    ``drop_last`` then leaves out images of at most k classes, others in every epoch.

    Raises :class:`UserError` if not even one batch can be made, or if so few classes per batch cannot be kept.
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
            raise UserError(f"batch_size={batch_size}: not a number of images; give 1 or more")
        if drop_last and batch_size > num_images:
            raise UserError(
                f"batch_size={batch_size}: only {num_images} training images, which makes no full batch; "
                f"use batch_size={num_images} or less, or drop_last=false"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.classes_per_batch = classes_per_batch
        if classes_per_batch is not None:
            self._counts = torch.bincount(dataset.train.labels).tolist()
            check_classes(classes_per_batch, self._counts, batch_size)
        self.steps_per_epoch = num_images // batch_size if drop_last else -(-num_images // batch_size)
        self.num_images = self.steps_per_epoch * batch_size if drop_last else num_images
        # Two generators, so that the order depends neither on the augmentation nor on drop_last.
        self._orders = torch.Generator(dataset.device).manual_seed(seed)
        augment_seed = torch.randint(2**31, (), generator=self._orders, device=dataset.device)
        self.generator = torch.Generator(dataset.device).manual_seed(int(augment_seed))
        self._num_ahead = self._count_ahead()
        self._start_epoch()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        start, end = self.advance()
        if self._num_ahead <= self.batch_size:
            return self.gather(self.order[start:end])
        if start >= self._ahead_end:
            self._ahead_start, self._ahead_end = start, min(start + self._num_ahead, self.num_images)
            self._ahead = self.gather(self.order[start : self._ahead_end])
        images, labels = self._ahead
        batch = slice(start - self._ahead_start, end - self._ahead_start)
        return images[batch], labels[batch]

    def advance(self) -> tuple[int, int]:
        """Where the next batch begins and ends in ``order``, the epoch's; a new epoch is begun if it is time to."""
        if self._position >= self.num_images:
            self._start_epoch()
        start = self._position
        self._position = min(start + self.batch_size, self.num_images)
        return start, self._position

    def gather(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """The training images at the indices ``picked`` (B,), augmented and prepared, and their labels."""
        train = self.dataset.train
        images = augment(train.images.index_select(0, picked), self.dataset.augment, self.generator)
        return self.dataset.prepare(images), train.labels.index_select(0, picked)

    next = __next__

    def _count_ahead(self) -> int:
        """How many images are gathered at a time on a CPU, whose batches are then views: as many whole batches as
        AHEAD_BYTES hold. Augmented ones come batch by batch, because that is how their numbers are drawn."""
        if self.dataset.device.type != "cpu" or self.dataset.augment != "none":
            return self.batch_size
        return AHEAD_BYTES // (4 * math.prod(self.dataset.in_shape)) // self.batch_size * self.batch_size

    def _start_epoch(self):
        self._epoch_state = self._orders.get_state()
        num_images, device = len(self.dataset.train), self.dataset.device
        self.order = torch.randperm(num_images, generator=self._orders, device=device)
        if self.classes_per_batch is not None:
            self.order = self._by_classes(self.order)
        self._position = self._ahead_end = 0

    def _by_classes(self, shuffled: Tensor) -> Tensor:
        """The images of ``shuffled`` (N,), in another order: few classes to a batch, the short batch last."""
        num_images, size, device = len(shuffled), self.batch_size, shuffled.device
        num_batches, num_last = divmod(num_images, size)
        sizes = [num_last] * (num_last > 0) + [size] * num_batches  # the short one first, while all classes are left
        # The plan is made on the host: a few milliseconds, and the only time in an epoch that it waits for the device.
        luck = torch.rand(len(sizes), len(self._counts), generator=self._orders, device=device).tolist()
        next_of = [sum(self._counts[:c]) for c in range(len(self._counts))]
        starts, lengths = [], []
        for parts in deal(self._counts, sizes, self.classes_per_batch, luck):
            for c, count in parts.items():
                starts.append(next_of[c])
                lengths.append(count)
                next_of[c] += count
        starts, lengths = (torch.tensor(numbers, device=device) for numbers in (starts, lengths))
        jumps = (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths, output_size=num_images)
        grouped = shuffled[self.dataset.train.labels[shuffled].argsort(stable=True)]  # class after class
        dealt = grouped[torch.arange(num_images, device=device) + jumps]
        last, full = dealt[:num_last], dealt[num_last:].view(num_batches, size)
        # Every batch at a random place, every image at a random place of its batch: ghost norms split batches in order.
        full = full[torch.randperm(num_batches, generator=self._orders, device=device)]
        places = torch.rand(full.shape, generator=self._orders, device=device).argsort(stable=True, dim=1)
        last = last[torch.randperm(num_last, generator=self._orders, device=device)]
        return torch.cat([full.gather(1, places).flatten(), last])

    def state_dict(self) -> dict:
        """Tensors and numbers that continue the stream bit for bit, in the middle of an epoch too.

        The order is kept as the state of the generator it was drawn from: a few kilobytes for any dataset.
        """
        return {
            "order": self._epoch_state.clone(),
            "augment": self.generator.get_state(),
            "position": self._position,
            "num_images": len(self.dataset.train),
            "device": self.dataset.device.type,
            "classes_per_batch": self.classes_per_batch,
        }

    def load_state_dict(self, state: dict):
        """Continue where ``state`` was taken; raises :class:`UserError` if this stream cannot."""
        num_images, device = len(self.dataset.train), self.dataset.device.type
        if state["num_images"] != num_images:
            raise UserError(
                f"the checkpoint saw {state['num_images']} training images, this run has {num_images}; "
                "continue with the same data, data.valid and data.limit"
            )
        if state["device"] != device:
            raise UserError(
                f"the checkpoint drew its batches on {state['device']}, {device} would draw others; "
                f"continue with device={state['device']}"
            )
        classes = state.get("classes_per_batch")
        if classes != self.classes_per_batch:
            given, had = ("null" if k is None else k for k in (self.classes_per_batch, classes))
            raise UserError(
                f"classes_per_batch={given}: the checkpoint drew its batches with {had}; "
                f"continue with classes_per_batch={had}"
            )
        self._orders.set_state(state["order"])
        self.generator.set_state(state["augment"])
        self._start_epoch()
        self._position = state["position"]


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Stored images (N, C, H, W), each changed on its own: ``none``, ``flip`` or ``crop_flip``.

    ``flip`` mirrors left and right with probability 1/2. ``crop_flip`` also moves the image by up to 4 stored
    pixels each way: a black margin of 4 around it, and a window of the old size at a random place.
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
