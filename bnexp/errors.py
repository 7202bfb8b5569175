"""Errors that the person at the keyboard can act on, and suggestions for their texts."""

from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input. The message says what was given, why it cannot be, and what to do.

    The command line prints the message without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class StorageError(UserError):
    """A run that had started could not be written any more, because the disk is full for example."""

    exit_code = 1


class RunFailed(UserError):
    """A run that had started ended with an error that is not about its input. ``status.json`` holds the traceback."""

    exit_code = 1


class OutOfMemory(UserError):
    """The device or the machine has no memory left for a run."""

    exit_code = 1


def nearest(word: str, known: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """`` (did you mean X?)`` if a known word looks like ``word``, else nothing; ``spell`` says how X is written."""
    from difflib import get_close_matches

    found = get_close_matches(word, list(known), n=1)
    return f" (did you mean {spell(found[0])}?)" if found else ""
