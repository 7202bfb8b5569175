"""The statistics that evaluation ought to use: those of many training images under the weights of this moment.

Running statistics are an average over batches of the past, seen under the weights of then.
"""

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from bnexp.data.batches import augment
from bnexp.data.dataset import Split
from bnexp.errors import UserError
from bnexp.norms.base import contract_of
from bnexp.probes.layers import tapped
from bnexp.train.run import Run


def tracking_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms that keep running statistics, by name."""
    return {name: module for name, module in model.named_modules() if contract_of(module).keeps_running_statistics()}


class Moments:
    """Mean and variance of every channel over all batches added, in float64, by Chan's formula."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.m2: Tensor | float = 0.0  # the sum of squared distances to the mean

    def add(self, x: Tensor) -> None:
        """``x`` (N, C) or (N, C, ...)."""
        x = x.detach().float().transpose(0, 1).flatten(1)  # (C, values)
        mean = x.mean(1)
        m2 = (x - mean[:, None]).square().sum(1).double()
        count, gap = x.shape[1], mean.double() - self.mean
        total = self.count + count
        self.mean = self.mean + gap * (count / total)
        self.m2 = self.m2 + m2 + gap.square() * (self.count * count / total)
        self.count = total

    @property
    def var(self) -> Tensor:
        """Unbiased, as running variances are."""
        return self.m2 / (self.count - 1)


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor, nn.Module], object]
) -> None:
    """Replace the running statistics of ``model`` by those of ``batches``, as its norms see them in training mode.

    Batch b brings n_b values per channel with mean_b and biased variance var_b to a norm; over all n = sum(n_b)

        running_mean = sum(n_b mean_b) / n
        running_var  = sum(n_b (var_b + (mean_b - running_mean)^2)) / (n - 1)

    the cumulative averages of Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021 (arXiv:2105.07576). They hold
    for batches of the size that the model is trained with, because deeper layers see what the batch statistics of the
    earlier ones make of them.

    ``forward(images, model)`` is a forward pass, such as :meth:`bnexp.train.run.Run.forward`. Only the running
    means and variances change; without batches nothing does. Norms without them, and models without norms, are fine.
    """
    norms = tracking_norms(model)
    moments = {name: Moments() for name in norms}
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def see(name: str, x: Tensor, _: Tensor) -> None:
        moments[name].add(x)

    try:
        model.train()
        with tapped(norms, see):
            for images in batches:
                forward(images, model)
                for buffer, kept in buffers:  # batch renormalization trains on its running statistics
                    buffer.copy_(kept)
    finally:
        for module, mode in modes.items():
            module.training = mode
    for name, norm in norms.items():
        if moments[name].count > 1:
            norm.running_mean.copy_(moments[name].mean)
            norm.running_var.copy_(moments[name].var)


def training_batches(run: Run, num_images: int) -> Iterator[Tensor]:
    """About ``num_images`` prepared training images in whole batches of the run's size, at least one batch.

    Always the same ones, augmented as the run's are, from all over the training set in every batch.
    """
    train = run.dataset.train
    batch_size = min(run.batches.batch_size, len(train))
    num_batches = max(1, min(num_images, len(train)) // batch_size)
    images = spread(train, num_batches * batch_size).images
    generator = torch.Generator(run.device).manual_seed(0)  # the run's own is not touched
    for i in range(num_batches):
        yield run.dataset.prepare(augment(images[i::num_batches], run.dataset.augment, generator))


def shadow(run: Run) -> nn.Module:
    """A copy of the run's model, in training mode: whatever is done with it, the run stays as it is."""
    return copy.deepcopy(run.model).train()


def spread(split: Split, num_images: int) -> Split:
    """``num_images`` images at equal distances: always the same, and of every class even if classes come in turn."""
    num_images = min(num_images, len(split))
    return split.take(torch.arange(num_images, device=split.labels.device) * len(split) // max(num_images, 1))


def some_images(run: Run, num_images: int, *, of: str = "valid") -> Split:
    """Images for one batch in training mode, always the same: validation images, or those ``of="train"``.

    ``num_images`` of them, or as many as there are. Where a norm refuses a batch of that size, or one image is too
    few for it, as many whole batches of the run as fit. Training images where no validation images will do.
    """
    batch_size = min(run.batches.batch_size, len(run.dataset.train))
    for split in dict.fromkeys((getattr(run.dataset, of), run.dataset.train)):
        for size in (min(num_images, len(split)), num_images // batch_size * batch_size, batch_size):
            if 1 < size <= len(split) and takes(run.model, size):
                return spread(split, size)
    return spread(run.dataset.train, batch_size)


def takes(model: nn.Module, batch_size: int) -> bool:
    """Whether the norms that divide a batch can divide one of this size."""
    try:
        for module in model.modules():
            contract_of(module).check_batch_size(batch_size)
    except UserError:
        return False
    return True


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers together, on their device; 0 if there are none."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
