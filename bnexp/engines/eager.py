"""The eager engine: every operation is sent to the device on its own."""

from collections.abc import Callable

from bnexp.engines.base import with_traits
from bnexp.engines.fold import Stack
from bnexp.train.run import Run


@with_traits(make_stack=Stack)
def eager(run: Run) -> Callable[[], None]:
    """Return :meth:`Run.eager_step`."""
    return run.eager_step
