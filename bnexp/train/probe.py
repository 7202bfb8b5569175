"""What a probe is: it looks at a run on its own schedule, yields readings, and never changes the run."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from bnexp.errors import UserError
from bnexp.store.readings import Reading
from bnexp.train.run import Run


class Probe(ABC):
    """Looks at a run after every ``every``-th step and after the last one.

    A probe keeps nothing from one look to the next, so a run that continues from a checkpoint yields the same readings.
    It draws nothing from the generators that a run draws from and computes on a copy of the model
    (:func:`bnexp.probes.population.shadow`), so weights, running statistics and gradients keep every bit. Of weights
    that are infinite or NaN the readings are not finite either.
    """

    def __init__(self, every: int) -> None:
        self.every = self.at_least("every", every, 1, "steps between looks")

    def at_least(self, option: str, value: int, least: int, what: str) -> int:
        """Return ``value`` if it is a whole number, ``least`` or more; else raise :class:`UserError`."""
        if type(value) is not int or value < least:
            raise self.refusal(option, value, f"{what}; give a whole number, {least} or more")
        return value

    def refusal(self, option: str, value: object, why: str) -> UserError:
        """The error ``probe.NAME.option=value: why``."""
        return UserError(f"probe.{type(self).__name__.lower()}.{option}={value}: {why}")

    def check_layers(self, wanted: Sequence[str], known: Collection[str], kind: str) -> None:
        """Raise :class:`UserError` for names of layers that are not among ``known``."""
        for name in wanted:
            if name not in known:
                there = f"there are {', '.join(known)}" if known else "there are none"
                raise self.refusal("layers", list(wanted), f"{name} is no {kind} of this model; {there}")

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether the run is looked at after ``step`` steps."""
        return step % self.every == 0 or step == total_steps

    def check(self, model: nn.Module) -> None:  # noqa: B027 (most probes find what they look at in every model)
        """Raise :class:`UserError` if ``model``, perhaps on torch's meta device, lacks what the probe looks at."""

    def before(self, run: Run) -> object:
        """Called before the step that is looked at; the result is passed to :meth:`look`."""
        return None

    @abstractmethod
    def look(self, run: Run, before: object) -> Iterable[Reading]:
        """The readings after the step."""


@contextmanager
def same_chance(run: Run) -> Iterator[None]:
    """Put torch's own generators back after the block, so that its draws (dropout, say) change no later ones."""
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        yield
