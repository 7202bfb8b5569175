"""The eager engine: every operation is sent to the device on its own, as :meth:`Run.eager_step` writes it."""

from collections.abc import Callable

from bnexp.engines.base import says
from bnexp.engines.fold import Stack
from bnexp.train.run import Run


@says(make_stack=Stack)
def eager(run: Run) -> Callable[[], None]:
    """Return the step as it is written."""
    return run.eager_step
