"""The flags of the commands that compose a config: ``--help``, ``--cfg``, ``--info``, ``--config-dir``, ``-m``, ..."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bnexp.config.choices import SHELVES, choices
from bnexp.config.compose import Source, composed, session
from bnexp.errors import UserError

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
HELP = """\
{about}

usage: bnexp {command} {usage}[group=choice] [setting=value] ...

groups
{groups}

flags
{flags}

settings, as yaml; setting=value exchanges one, group.option=value an option of a group's entry
"""


@dataclass(frozen=True)
class Line:
    """A command line taken apart: ``words`` in Hydra's grammar, and the flags."""

    command: str
    words: list[str]
    source: Source
    multirun: bool
    help: bool
    cfg: str | None
    resolve: bool
    package: str | None
    info: str | None


def make_parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"bnexp {command}", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--help", "-h", action="store_true", help="show this")
    if command == "train":
        many = "train every combination of several values: norm=none,library"
        parser.add_argument("--multirun", "-m", action="store_true", help=many)
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"), help="print the config and do nothing else")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: look interpolations up")
    parser.add_argument("--package", "-p", metavar="KEY", help="with --cfg: this part alone")
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=INFO, help="print how Hydra composes")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder of your own yamls: DIR/norm/mine.yaml")
    parser.add_argument("--config-name", "-cn", metavar="NAME", default="train", help="a main config of your own")
    return parser


def parse_line(command: str, arguments: Sequence[str], many: bool = False) -> Line:
    """Take a command line apart; ``many`` for commands that compose several configs, of which none can be shown."""
    parser = make_parser(command)

    def refuse(message: str) -> None:
        raise UserError(f"{command}: {message}; bnexp {command} --help shows what it takes")

    parser.error = refuse
    if any(word.startswith("--experimental-rerun") for word in arguments):
        raise UserError("--experimental-rerun: reads a file that can hold code; bnexp rerun RUN does without")
    if many and (flags := [word for word in arguments if word in ("-m", "--multirun")]):
        raise UserError(f"{flags[0]}: {command} takes settings only, several values need no flag: norm=none,library")
    given = parser.parse_intermixed_args(list(arguments))
    multirun = getattr(given, "multirun", False)
    if (given.resolve or given.package) and not given.cfg:
        refuse("--resolve and --package belong to --cfg job")
    if (many or multirun) and (given.cfg or given.info):
        raise UserError(f"{command}: composes several configs; bnexp train --cfg job shows one, with one value each")
    folder = None if given.config_dir is None else Path(given.config_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder; give one that holds norm/, model/, ... with yamls")
    if odd := [word for word in given.words if word.startswith("hydra/sweeper=") and word != "hydra/sweeper=basic"]:
        raise UserError(f"{odd[0]}: bnexp makes the jobs of a sweep itself; leave it out")
    return Line(
        command, given.words, Source(folder, given.config_name), multirun,
        given.help, given.cfg, given.resolve, given.package, given.info,
    )  # fmt: skip


def was_shown(line: Line, about: str = "", usage: str = "") -> bool:
    """Print what ``--help``, ``--cfg`` or ``--info`` ask for; False if none of them was given."""
    if not (line.help or line.cfg or line.info):
        return False
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    with session(line.source):
        if line.help:
            groups = "\n".join(f"  {group}: {', '.join(choices(group, line.source.folder))}" for group in SHELVES)
            flags = make_parser(line.command).format_help().partition(":\n")[2].rstrip()
            print(HELP.format(about=about, command=line.command, usage=usage, groups=groups, flags=flags))
            print(OmegaConf.to_yaml(composed(line.words)), end="")
        elif line.cfg:
            composed(line.words)  # which checks the words
            hydra = GlobalHydra.instance().hydra
            hydra.show_cfg(line.source.main, line.words, line.cfg, line.package, line.resolve)
        else:
            GlobalHydra.instance().hydra.show_info(line.info, line.source.main, line.words)
    return True
