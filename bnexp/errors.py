"""What goes wrong by the user's hand, told apart from what goes wrong by ours."""


class UserError(ValueError):
    """Something the person at the keyboard can mend: what was given, why it cannot be, what to do.

    The command line prints the message without a traceback and exits with code 2.
    """

    exit_code = 2


class StorageError(UserError):
    """A run that had started could not be written down any more, because the disk is full, say."""

    exit_code = 1


class RunFailed(UserError):
    """A run that had started ended by an error that is nobody's input; its ``status.json`` holds the traceback."""

    exit_code = 1


class OutOfMemory(UserError):
    """The device, or the machine, had no memory left for what a run needs."""

    exit_code = 1
