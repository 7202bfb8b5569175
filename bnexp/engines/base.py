"""What an engine is: a function ``engine(run, **options)`` that returns the function which takes a step of ``run``.

An engine that needs a certain device, or that can compute many runs as one, states it by :func:`with_traits`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


@dataclass(frozen=True)
class Traits:
    """The traits of an engine, with the defaults for one that states none.

    ``require_device(device)`` raises :class:`UserError`, before any work, if the engine cannot run on ``device``.
    ``make_stack(runs, **options)`` returns the :class:`bnexp.engines.fold.Stack` that takes the common step of runs
    computed as one (``replicas``). Runs of an engine without it cannot be computed as one.
    """

    require_device: Callable[[torch.device], None] = lambda device: None
    make_stack: Callable | None = None


TRAITS: dict[Callable, Traits] = {}


def with_traits(**traits: Callable) -> Callable[[Function], Function]:
    """Decorate an engine with its :class:`Traits`."""

    def register(engine: Function) -> Function:
        TRAITS[engine] = Traits(**traits)
        return engine

    return register


def traits_of(engine: Callable) -> Traits:
    """The traits of ``engine``, the function itself."""
    return TRAITS.get(inspect.unwrap(engine), Traits())
