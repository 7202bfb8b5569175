"""Population statistics: those of many training images under the present weights; and images for probes.

Running statistics are averages over past batches, under the weights that the model had then.
"""

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from bnexp.data.batches import augment
from bnexp.data.dataset import Split
from bnexp.probes.layers import is_own_module, takes_batch, tapped, tracking_norms
from bnexp.train.run import Run, shuffled


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor, nn.Module], object]
) -> None:
    """Replace the running statistics of ``model`` by those of ``batches``, as its norms see them in training mode.

    Batch b brings n_b values per channel with mean_b and biased variance var_b to a norm; over all n = sum(n_b)

        running_mean = sum(n_b mean_b) / n
        running_var  = sum(n_b (var_b + (mean_b - running_mean)^2)) / (n - 1)

    the cumulative averages of Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021 (arXiv:2105.07576). They hold
    for batches of the size that the model is trained with, because earlier layers normalize the inputs of deeper ones
    by batch statistics.

    ``forward(images, model)`` is a forward pass, such as :meth:`bnexp.train.run.Run.forward`. Nothing else of the
    model changes.
    """
    norms = tracking_norms(model)
    if not norms:
        return
    sums: dict[str, Tensor] = {}  # sums of 1, x and x^2 over the values of a channel, (3, C) in float64
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def see(name: str, x: Tensor, _: Tensor) -> None:
        x = x.detach().float().transpose(0, 1).flatten(1)  # (C, values)
        var, mean = (each.double() for each in torch.var_mean(x, 1, correction=0))
        batch = x.shape[1] * torch.stack([torch.ones_like(mean), mean, var + mean.square()])
        sums[name] = sums.get(name, 0.0) + batch

    try:
        model.train()
        with tapped(norms, see):
            for images in batches:
                forward(images, model)
                for buffer, kept in buffers:  # batch renormalization uses its running statistics in training
                    buffer.copy_(kept)
    finally:
        for module, mode in modes.items():
            module.training = mode
    for name, (count, total, squares) in sums.items():
        if count[0] > 1:
            mean = total / count
            norms[name].running_mean.copy_(mean)
            norms[name].running_var.copy_((squares - count * mean.square()).clamp(min=0) / (count - 1))


def whole_batch(run: Run) -> int:
    """The number of images of a whole training batch: the run's batch size, at most all training images."""
    return min(run.batches.batch_size, len(run.dataset.train))


def population_size(run: Run, num_images: int) -> int:
    """``num_images``, at most all training images, rounded down to whole batches of the run's size; one at least."""
    batch_size = whole_batch(run)
    return max(1, min(num_images, len(run.dataset.train)) // batch_size) * batch_size


def training_batches(run: Run, num_images: int) -> Iterator[Tensor]:
    """:func:`population_size` prepared training images in batches of the run's size, augmented as in training.

    The images and their batches are the same every time.
    """
    images = some_of(run.dataset.train, population_size(run, num_images)).images
    generator = torch.Generator(run.device).manual_seed(0)  # the run's own is not touched
    for batch in images.split(whole_batch(run)):
        yield run.dataset.prepare(augment(batch, run.dataset.augment, generator))


def shadow(run: Run) -> nn.Module:
    """A copy of the run's model, in training mode."""
    return copy.deepcopy(run.model).train()


def some_of(split: Split, num_images: int) -> Split:
    """``num_images`` images in a random order that is always the same, so that no order of the files decides which."""
    order = shuffled(len(split), split.labels.device)[:num_images]
    return Split(split.images_at(order), split.labels[order])


def some_images(run: Run, num_images: int, *, of: str = "valid") -> Split:
    """Images of the split ``of`` for one batch in training mode, always the same.

    ``num_images`` of them, at most all; if a norm refuses a batch of that size, or it is one image, whole batches of
    the run's size; with modules of the user's own one such batch. Training images if the split has too few.
    """
    batch_size, has_own = whole_batch(run), any(map(is_own_module, run.model.modules()))
    for split in dict.fromkeys((getattr(run.dataset, of), run.dataset.train)):
        sizes = (min(num_images, len(split)), num_images // batch_size * batch_size, batch_size)
        for size in sizes[2 * has_own :]:
            if 1 < size <= len(split) and takes_batch(run.model.modules(), size):
                return some_of(split, size)
    return some_of(run.dataset.train, batch_size)
