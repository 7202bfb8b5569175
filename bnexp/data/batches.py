"""The stream of training batches: which images come when, and how they are augmented, given one seed.

Everything is drawn from generators of its own on the dataset's device, so that no norm, probe or engine can
change what the next batch holds, and a run that is continued sees the batches it would have seen.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from bnexp.data.dataset import Dataset
from bnexp.errors import UserError

CROP_MARGIN = 4  # pixels of the stored image on each side, as is usual for CIFAR


class Batches:
    """Endless batches of ``dataset.train``, every image once per epoch in an order drawn anew each epoch.

    ``next()`` gives float32 (B, *in_shape) and int64 (B,). ``drop_last`` leaves out the short batch at an
    epoch's end (batch norm sees other statistics in it); the order of the images is the same either way.
    Raises :class:`UserError` if not even one batch can be made.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, *, drop_last: bool = True):
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
        self.steps_per_epoch = num_images // batch_size if drop_last else -(-num_images // batch_size)
        self.num_images = self.steps_per_epoch * batch_size if drop_last else num_images
        # Two generators, so that the order depends neither on the augmentation nor on drop_last.
        self._order = torch.Generator(dataset.device).manual_seed(seed)
        augment_seed = torch.randint(2**31, (), generator=self._order, device=dataset.device)
        self._augment = torch.Generator(dataset.device).manual_seed(int(augment_seed))
        self._start_epoch()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._position >= self.num_images:
            self._start_epoch()
        end = min(self._position + self.batch_size, self.num_images)
        picked = self._permutation[self._position : end]
        self._position = end
        train = self.dataset.train
        images = augment(train.images.index_select(0, picked), self.dataset.augment, self._augment)
        return self.dataset.prepare(images), train.labels.index_select(0, picked)

    next = __next__

    def _start_epoch(self):
        self._epoch_state = self._order.get_state()
        num_images, device = len(self.dataset.train), self.dataset.device
        self._permutation = torch.randperm(num_images, generator=self._order, device=device)
        self._position = 0

    def state_dict(self) -> dict:
        """Tensors and numbers that continue the stream bit for bit, in the middle of an epoch too.

        The order is kept as the state of the generator it was drawn from: a few kilobytes for any dataset.
        """
        return {
            "order": self._epoch_state.clone(),
            "augment": self._augment.get_state(),
            "position": self._position,
            "num_images": len(self.dataset.train),
            "device": self.dataset.device.type,
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
        self._order.set_state(state["order"])
        self._augment.set_state(state["augment"])
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
