"""What a probe is: it looks at a run on its own schedule, yields readings, and never changes the run."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from bnexp.errors import UserError
from bnexp.store.readings import Reading
from bnexp.train.run import Run


class Probe(ABC):
    """Looks at a run after every ``every``-th step and after the last one.

    A probe keeps no state from one look to the next, so that a run that continues from a checkpoint yields the same
    readings. It draws no numbers from the run's generators and computes on a copy of the model
    (:func:`bnexp.probes.population.shadow`), so that weights, running statistics and gradients keep every bit. If
    weights are infinite or NaN, the readings are not finite either.
    """

    label = ""  # how errors name a probe of the user's own

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

    def check_layers(self, given: Sequence[str], known: Collection[str], kind: str) -> None:
        """Raise :class:`UserError` for a name in ``given`` that is not in ``known``, the model's layers of a kind."""
        for name in given:
            if name not in known:
                choices = f"there are {', '.join(known)}" if known else "there are none; leave out this probe"
                raise self.refusal("layers", list(given), f"{name} is no {kind} of this model; {choices}")

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether the probe looks at the run after ``step`` steps."""
        return step % self.every == 0 or step == total_steps

    def check(self, model: nn.Module) -> None:  # noqa: B027 (most probes work on every model)
        """Raise :class:`UserError` if the probe cannot look at ``model``, which may be on torch's meta device."""

    def before(self, run: Run) -> object:
        """Called before a step after which the probe looks; the result is passed to :meth:`look`."""
        return None

    @abstractmethod
    def look(self, run: Run, before: object) -> Iterable[Reading]:
        """The readings after the step."""
