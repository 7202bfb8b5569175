"""The two hand-written loops that ours is measured against: the bare floor and a tutorial's.

Both take the same model and the same images as ours. They know neither runs nor configs, so that a script of a few
lines can use them too.
"""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain

import torch
import torch.nn.functional as F
from loop_stopwatch import Stopwatch
from torch import Tensor, nn

from bnexp.data.dataset import Dataset, Split

Turn = Callable[[Stopwatch], None]  # one turn of a loop, timed
NUM_WORKERS = 2  # of the tutorial's DataLoader


def prepare_images(dataset: Dataset, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """All training images, normalized and ready for a model: (N, *in_shape)."""
    train, shape = dataset.train.images, dataset.in_shape
    images = torch.empty((len(train), *shape), dtype=dtype, device=train.device, memory_format=memory_format)
    for piece, place in zip(train.split(4096), images.split(4096), strict=True):
        place.copy_(dataset.prepare(piece))
    return images


def bare_loop(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    num_steps: int,
    draw: Callable[[], Tensor],
    threads: int,
    autocast: torch.dtype | None = None,
) -> Turn:
    """The bare floor: images that are ready as floats, gathered once for all steps, and no metric read.

    ``draw()`` gives the order of an epoch, a permutation of the images (N,). With ``autocast`` the forward pass
    runs in that type.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    context = nullcontext() if autocast is None else torch.autocast(images.device.type, autocast)

    def turn(watch: Stopwatch) -> None:
        torch.set_num_threads(threads)
        with watch.running():
            with watch.once():
                order = draw()
            picked = order[: num_steps * batch_size]
            shuffled, targets = images.index_select(0, picked), labels.index_select(0, picked)
            for x, y in zip(shuffled.split(batch_size), targets.split(batch_size), strict=True):
                with context:
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

    return turn


def as_torchvision(split: Split, size: tuple[int, int]) -> torch.utils.data.Dataset:
    """The grey images of ``split`` as torchvision's MNIST gives them: PIL images, made tensors by ToTensor."""
    from torchvision import datasets, transforms

    class Pictures(datasets.MNIST):
        def __init__(self, transform: Callable) -> None:
            datasets.VisionDataset.__init__(self, "", transform=transform)
            self.data, self.targets = split.images[:, 0].cpu(), split.labels.cpu()

    resize = [] if split.images.shape[2:] == size else [transforms.Resize(size)]
    return Pictures(transforms.Compose([*resize, transforms.ToTensor()]))


def tutorial_loop(model: nn.Module, dataset: Dataset, batch_size: int, num_steps: int, threads: int) -> Turn:
    """A tutorial's loop: a DataLoader with two workers, shuffled; loss and accuracy read at every step.

    An epoch has the start of the workers and their first batch once.
    """
    from torch.utils.data import DataLoader, RandomSampler

    images = as_torchvision(dataset.train, dataset.in_shape[1:])
    some = RandomSampler(images, num_samples=num_steps * batch_size)  # shuffle=True, ended early
    # By fork, the default on Linux up to Python 3.13: other kinds of workers take seconds to start.
    loader = DataLoader(images, batch_size, sampler=some, num_workers=NUM_WORKERS, multiprocessing_context="fork")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def turn(watch: Stopwatch) -> None:
        torch.set_num_threads(threads)
        with watch.running():
            with watch.once():
                batches = iter(loader)
                first = next(batches)
            total_loss = num_right = num_seen = 0
            for x, y in chain([first], batches):
                x, y = x.to(dataset.device), y.to(dataset.device)
                optimizer.zero_grad()
                logits = model(x)
                loss = F.cross_entropy(logits, y)
                loss.backward()
                optimizer.step()
                total_loss += loss.item() * len(y)
                num_right += (logits.argmax(1) == y).sum().item()
                num_seen += len(y)

    return turn
