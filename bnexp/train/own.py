"""Parts of the user's own, from packages named by ``allow=[...]``: errors that name the part, whatever it raises."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from types import FrameType

import torch

from bnexp.errors import UserError, first_line

FAILURES = (Exception, SystemExit)  # sys.exit() in a part must not end the command as if all were well


class PartFailed(UserError):
    """A part of the user's own raised ``error``; ``label`` names the part, ``model._target_=mypackage.Net``.

    The message ends with the last line of the part's package that the error passed.
    """

    def __init__(self, label: str, error: BaseException, when: str = "") -> None:
        package = label.partition("=")[2].partition(".")[0]
        lines = [
            (frame, line) for frame, line in walk_tb(error.__traceback__) if code_of(frame).startswith(f"{package}.")
        ]
        where = "".join(f" ({frame.f_code.co_filename}:{line})" for frame, line in lines[-1:])
        super().__init__(f"{label}: failed{when}: {first_line(error)}{where}")
        self.label, self.__cause__ = label, error


def code_of(frame: FrameType) -> str:
    """``mypackage.Net.forward``, the name of the code that ``frame`` runs."""
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Raise errors inside, or of a decorated function, as :class:`PartFailed`.

    Errors for the user and of the memory stay as they are, and with an empty ``label`` all do.
    """
    try:
        yield
    except FAILURES as error:
        if not label or isinstance(error, UserError | MemoryError | torch.OutOfMemoryError):
            raise
        raise PartFailed(label, error) from error


def culprit(error: BaseException, own_parts: Mapping[str, str]) -> str:
    """The label of the part of the user's own whose code raised ``error``, else of all that can be the reason for it.

    ``own_parts`` are the names of their code by label. What a model or an engine returns can be the reason for an error
    in other code.
    """
    codes = [code_of(frame) + "." for frame, _ in walk_tb(error.__traceback__)][::-1]
    for code in codes:
        if found := [label for label, name in own_parts.items() if code.startswith(f"{name}.")]:
            return found[0]
    packages = {code.partition(".")[0] for code in codes}
    found = [label for label, name in own_parts.items() if name.partition(".")[0] in packages]
    if not found and not isinstance(error, OSError):
        found = [label for label in own_parts if not label.startswith(("data", "schedule"))]
    return ", ".join(found)
