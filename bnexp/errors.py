"""Errors that the person at the keyboard can act on, and suggestions for their texts."""

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from shlex import quote

NETWORK = (  # errors of a server that does not answer, or of a device that is gone
    errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN,
    errno.ECONNRESET, errno.EREMOTEIO, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETUNREACH, errno.ENETDOWN,
    errno.ESHUTDOWN, errno.EPROTO, errno.ECOMM, errno.ENONET, errno.ENOLINK,
)  # fmt: skip
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or ask for a larger quota",
    errno.EFBIG: "the file system takes no files of this size; choose another",
    errno.EIO: "check its disk",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable again"),
    **dict.fromkeys(NETWORK, "check that the file system is mounted and its server answers"),
    **dict.fromkeys((errno.EKEYEXPIRED, errno.ENOKEY, errno.EKEYREVOKED), "log in to the file server again (kinit)"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "close other programs, or raise the limit of open files (ulimit -n)"),
}


class UserError(ValueError):
    """Bad input. The message says what was given, why it cannot be, and what to do.

    The command line prints the message without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class StorageError(UserError):
    """A run that had started could not be written, for example because the disk is full."""

    exit_code = 1


class RunFailed(UserError):
    """A run ended with an error that is not about its input. ``status.json`` holds the traceback."""

    exit_code = 1


class OutOfMemory(UserError):
    """A run does not fit the memory of the device or the machine."""

    exit_code = 1


def remedy_of(error: OSError) -> str:
    """What to do about an error of reading."""
    is_refused = error.errno in (errno.EACCES, errno.EPERM)
    return "check its permissions" if is_refused else REMEDIES.get(error.errno, "try again")


def unread(error: OSError, path: Path, kind: type[UserError] = UserError) -> UserError:
    """The error for a file or folder that the system does not let us read, which may well be whole."""
    return kind(f"{path}: cannot be read ({error.strerror or error}); {remedy_of(error)}")


def home_path(text: str, setting: str = "") -> Path:
    """The path in ``text``, with the home folder for ``~`` or ``~user`` at its beginning.

    ``setting`` is what the user typed before ``text``. The path never begins with ``~``, so it can be read again.
    """
    path = Path(text)
    if text.isspace():
        raise UserError(f"{setting}'{text}': names no folder; give one")
    if not path.is_absolute() and "~" in path.parts[1:]:
        what = "~ is the home folder at the beginning only"
        raise UserError(f"{setting}{text}: {what}; leave out what is before it, or write the whole path")
    if not text.startswith("~"):
        return path.absolute() if str(path).startswith("~") else path  # ./~/x
    user = text.partition("/")[0][1:]
    if not user and not os.path.isabs(os.environ.get("HOME", "")):
        raise UserError(f"{setting}{text}: there is no home folder, HOME is no absolute path; write the whole path")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"{setting}{text}: there is no user {user}; write {quote(f'./{text}')} for a folder of this name"
        )
    return Path(expanded)


def first_line(error: BaseException) -> str:
    """The first line of the error's text, after the name of its type unless it is a :class:`UserError`."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0]


def nearest(word: str, known: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """`` (did you mean X?)`` if a known word looks like ``word``, else nothing; ``spell`` turns the word into X."""
    from difflib import get_close_matches

    found = get_close_matches(word, list(known), n=1)
    return f" (did you mean {spell(found[0])}?)" if found else ""
