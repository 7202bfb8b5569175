"""What does bnexp's comfort cost? Its training loop beside hand-written loops, its start beside a bare script's.

    BNEXP_DATA=... python tests/bench/loop.py [setting=value] ...

``--help`` lists the settings.
"""

import shlex
import sys
from collections.abc import Sequence

from loop_settings import CHOICES, USAGE, read_loop_settings

from bnexp import startup
from bnexp.cli.main import complain
from bnexp.config.choices import choices
from bnexp.errors import UserError

COMMAND = "python tests/bench/loop.py"


def main(words: Sequence[str]) -> int:
    """Measure; returns the exit code: 0, 2 for settings that cannot be, 130 when interrupted."""
    if {"-h", "--help"} & {*words}:
        print(USAGE.format(**{key: " | ".join(values) for key, values in CHOICES.items()}))
        return 0
    try:
        settings = read_loop_settings(words)
        startup.settle()  # before torch is imported
        from loop_session import measure_loop, run_maker

        from bnexp.config import parts

        command = f"{COMMAND} {shlex.join(words)}".strip()
        measure_loop(run_maker(), settings, parts.find_device(settings.device), choices("probe"), command)
    except UserError as error:
        complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
