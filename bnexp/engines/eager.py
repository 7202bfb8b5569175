"""The eager engine: every operation is sent on its own, as it is written in :meth:`bnexp.train.run.Run.eager_step`."""

from collections.abc import Callable

from bnexp.train.run import Run


def eager(run: Run) -> Callable[[], None]:
    """The step as it is written."""
    return run.eager_step
