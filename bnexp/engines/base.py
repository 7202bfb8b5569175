"""What an engine is: a function ``engine(run, **options)`` that returns the function which takes a step of ``run``.

That is all an engine has to be. What else it may say of itself stands in :class:`Traits`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def runs_anywhere(device: torch.device) -> None:
    """Accept every device."""


@dataclass(frozen=True)
class Traits:
    """What an engine says of itself, with the defaults for one that says nothing.

    ``require_device(device)`` raises :class:`UserError`, before any work, where the engine cannot run.
    ``make_stack(runs, **options)`` makes the :class:`bnexp.engines.fold.Stack` that takes the common step of runs
    computed as one (``replicas``); without it runs of this engine cannot be.
    """

    require_device: Callable[[torch.device], None] = runs_anywhere
    make_stack: Callable | None = None


TRAITS: dict[Callable, Traits] = {}


def says(**traits: Callable) -> Callable[[Function], Function]:
    """Decorate an engine's function with its :class:`Traits`."""

    def note(function: Function) -> Function:
        TRAITS[function] = Traits(**traits)
        return function

    return note


def traits_of(engine: Callable) -> Traits:
    """What ``engine``, the function itself, says of itself."""
    return TRAITS.get(engine, Traits())
