"""What a probe is: it looks at a run on its own schedule, yields readings, and never changes the run."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bnexp.data.dataset import Split
from bnexp.errors import UserError
from bnexp.readings import Reading
from bnexp.run import Run


class Probe(ABC):
    """Looks at a run after every ``every``-th step and after the last one.

    A probe keeps nothing from one look to the next, so that a run that goes on from a checkpoint is seen as it
    would have been. It draws nothing from the generators that a run draws from and computes on a copy of the model
    (:func:`shadow`), so that weights, running statistics and gradients are left alone to the last bit. Weights that
    are infinite or not a number are looked at like all others: the readings are then not finite either.
    """

    def __init__(self, every: int) -> None:
        self.every = self.at_least("every", every, 1, "steps between looks")

    def at_least(self, option: str, value: int, least: int, what: str) -> int:
        """``value`` if it is a whole number, ``least`` or more; else :class:`UserError`."""
        if type(value) is not int or value < least:
            raise self.refusal(option, value, f"{what}; give a whole number, {least} or more")
        return value

    def refusal(self, option: str, value: object, why: str) -> UserError:
        """``probe.NAME.option=value: why``."""
        return UserError(f"probe.{type(self).__name__.lower()}.{option}={value}: {why}")

    def check_layers(self, wanted: Sequence[str], known: Collection[str], kind: str) -> None:
        """Refuse names of layers that are not among ``known``."""
        for name in wanted:
            if name not in known:
                there = f"there are {', '.join(known)}" if known else "there are none"
                raise self.refusal("layers", list(wanted), f"{name} is no {kind} of this model; {there}")

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether the run is looked at after ``step`` steps."""
        return step % self.every == 0 or step == total_steps

    def check(self, model: nn.Module) -> None:  # noqa: B027 (most probes find what they look at in every model)
        """Raise :class:`UserError` for what is not in ``model``, which may be on torch's meta device."""

    def before(self, run: Run) -> object:
        """Called before the step that is looked at; what it returns is handed to :meth:`look`."""
        return None

    @abstractmethod
    def look(self, run: Run, before: object) -> Iterable[Reading]:
        """The readings after the step."""


def shadow(run: Run) -> nn.Module:
    """A copy of the run's model, in training mode: whatever is done with it, the run stays as it is."""
    return copy.deepcopy(run.model).train()


@contextmanager
def same_chance(run: Run) -> Iterator[None]:
    """Whatever is drawn inside from torch's own generators, by dropout say, is drawn again afterwards."""
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        yield


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
            if hasattr(module, "check_batch_size"):
                module.check_batch_size(batch_size)
    except UserError:
        return False
    return True


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers together, on their device; 0 if there are none."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
