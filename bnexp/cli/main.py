"""Finds the command, runs it and prints errors; imports neither torch nor Hydra before a command runs."""

import errno
import os
import re
import sys
from importlib import import_module

from bnexp import startup
from bnexp.cli.help import COMMANDS, USAGE, completion, help_text
from bnexp.errors import UserError, nearest, remedy_of
from bnexp.train.interrupt import raised_signals

HOMES = {"resume": "train", "rerun": "train", "summary": "inspect"}  # the file of a command, if not its own name


@raised_signals()
def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a run that failed, 2 for bad input, 3 (a study
    that does not hold), 130 when interrupted."""
    try:
        return run_command(arguments)
    except KeyboardInterrupt:
        print("bnexp: interrupted", file=sys.stderr)
        return 130


def run_command(arguments: list[str] | None) -> int:
    """:func:`main`, but raise KeyboardInterrupt."""
    startup.prepare_output()
    words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command, *rest = words
    if command in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if command in ("--version", "-V"):
        from bnexp.store.run_folder import bnexp_version  # slow to import

        print(f"bnexp {bnexp_version()}")
        return 0
    if command in USAGE and {"-h", "--help"} & set(rest):
        print(USAGE[command])
        return 0
    from bnexp.store.untrusted import check_name  # --help does without

    try:
        if command == "completion":
            return completion(rest)
        for word in words:
            if re.search("[\0\x80-\x9f\ud800-\udfff]", word):  # other control characters are for the command
                check_name(word)
        if command not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise UserError(f"{command}: not a command{nearest(command, COMMANDS)}; choose one of {known}")
        startup.settle()
        with startup.quick_imports():
            module = import_module(f"bnexp.cli.{HOMES.get(command, command)}")
        return getattr(module, command)(rest)
    except UserError as error:
        complain(error)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            where = f"{error.filename}: " if error.filename else ""
            complain(where + (error.strerror or str(error)) + f"; {remedy_of(error)}")
            return 1
        # The output went to a closed pipe or a full disk; the run folders are not affected.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        complain(f"cannot write the output: {error.strerror}")
        return 1
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if isinstance(error, MemoryError) or re.search("allocate memory|[Oo]verflow", what):
            complain(f"too large for the memory here ({what}); try something smaller")
        else:
            complain(f"{what}; the traceback is in {keep_traceback(error)}")
        return 1


def complain(what: object) -> None:
    """Print an error on stderr."""
    from bnexp.store.untrusted import printable

    print(f"bnexp: error: {printable(what)}", file=sys.stderr)


def keep_traceback(error: Exception) -> str:
    """Write the traceback to a temporary file, for a bug report; returns its name."""
    import tempfile
    import traceback

    options = {"prefix": "bnexp-", "suffix": ".txt", "delete": False, "errors": "backslashreplace"}
    with tempfile.NamedTemporaryFile("w", **options) as file:
        traceback.print_exception(error, file=file)
    return file.name
