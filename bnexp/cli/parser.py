"""The parser of the commands that take flags."""

import argparse
from typing import NoReturn

from bnexp.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are :class:`UserError`."""

    def error(self, message: str) -> NoReturn:
        if "--config-" in message:
            message += " (the config of a run is complete)"
        raise UserError(f"{self.prog.removeprefix('bnexp ')}: {message}; {self.prog} --help shows what it takes")
