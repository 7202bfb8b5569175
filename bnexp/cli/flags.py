"""The flags of the commands that compose a config: ``--help``, ``--cfg``, ``--info``, ``--config-dir``, ``-m``, ..."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from bnexp.cli.parser import Parser
from bnexp.config.choices import SHELVES, choices
from bnexp.config.compose import Source, composed, session
from bnexp.errors import UserError, home_path
from bnexp.store.untrusted import read_yaml

HERE = Path("bnexp.yaml")  # in the current folder
TRAIN_HELP = """\
bnexp train: train one model and log it to TensorBoard.

usage: bnexp train [-m] [group=choice] [setting=value] ...

groups
{groups}
  (probe takes a list: probe=[activations,gradients])

flags
{flags}

settings (yaml)
setting=value changes one of these; group.option=value changes an option of the chosen entry of a group.
bnexp train norm=ghost --help shows the options of norm=ghost.

"""


def make_parser(command: str) -> Parser:
    parser = Parser(f"bnexp {command}", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--help", "-h", action="store_true", help="show this help")
    if command == "train":
        many = "train every combination of several values: norm=none,library seed=0,1"
        parser.add_argument("--multirun", "-m", action="store_true", help=many)
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"), help="print the config and do nothing else")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: replace interpolations by their values")
    parser.add_argument("--package", "-p", metavar="KEY", help="with --cfg: print this part of the config only")
    info = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=info, help="print how Hydra composes configs")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder with your own entries: DIR/norm/mine.yaml")
    parser.add_argument("--config-name", "-cn", metavar="NAME", default="train", help="the main config, if your own")
    return parser


def parse_line(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags; ``words`` is left to Hydra's grammar, ``source`` says where configs are composed from.

    ``multirun`` is False for all commands but ``train``. Raises :class:`UserError` for flags that ``command`` lacks.
    """
    makes_sweep = command in ("compare", "study")
    if any(word.startswith("--experimental-rerun") for word in arguments):
        raise UserError("--experimental-rerun: the file it reads can hold code; use bnexp rerun RUN")
    if makes_sweep and (flags := [word for word in arguments if word in ("-m", "--multirun")]):
        raise UserError(f"{flags[0]}: {command} takes settings only, several values need no flag: norm=none,library")
    parser = make_parser(command)
    parser.set_defaults(multirun=False)
    line = parser.parse_intermixed_args(list(arguments))
    line.words = trusting(line.words)
    if (line.resolve or line.package) and not line.cfg:
        parser.error("--resolve and --package belong to --cfg job")
    if (line.cfg or line.info) and (makes_sweep or line.multirun or command in ("rerun", "resume")):
        raise UserError(f"{command}: --cfg and --info show one config; use them with bnexp train, without -m")
    line.source = Source(own_entries(line.config_dir), line.config_name)
    return line


def own_entries(given: str | None) -> Path | None:
    """The folder of the user's own entries: ``given`` or, if that is None, the one that ``bnexp.yaml`` here names."""
    told = f"--config-dir {given}"
    if given is None:
        if not HERE.is_file():
            return None
        try:
            found = read_yaml(HERE, lambda key: key == "config_dir")
        except (OSError, ValueError) as error:
            raise UserError(f"{HERE}: cannot be read ({error}); write config_dir: FOLDER into it") from error
        if set(found) != {"config_dir"} or not isinstance(given := found["config_dir"], str):
            raise UserError(
                f"{HERE}: holds {', '.join(map(str, found)) or 'nothing'}; one line is expected, config_dir: FOLDER"
            )
        told = f"{HERE}: config_dir: {given}"
    folder = home_path(given, told.removesuffix(given))
    if not folder.is_dir():
        raise UserError(f"{told}: no such folder; give one that holds norm/, model/, ... with yamls")
    return folder


def trusting(words: Sequence[str]) -> list[str]:
    """The words and, unless they say ``allow``, one that allows the packages of ``model.path=`` and ``norm.path=``."""
    given = [word.partition("=")[2] for word in words if word.startswith(("model.path=", "norm.path="))]
    named = [value for values in given for value in values.split(",")]
    packages = dict.fromkeys(each.partition(".")[0] for each in named if each.isascii())
    is_said = any(word.startswith("allow=") for word in words)
    return [*words, *[f"allow=[{','.join(packages)}]"] * (bool(packages) and not is_said)]


def was_shown(line: argparse.Namespace) -> bool:
    """Print what ``--help``, ``--cfg`` or ``--info`` ask for; False if the line has none of them."""
    if not (line.help or line.cfg or line.info):
        return False
    from hydra.core.global_hydra import GlobalHydra

    with session(line.source):
        if line.help:
            groups = "\n".join(f"  {group}: {', '.join(choices(group, line.source.folder))}" for group in SHELVES)
            flags = make_parser("train").format_help().partition(":\n")[2].rstrip()
            print(TRAIN_HELP.format(groups=groups, flags=flags) + OmegaConf.to_yaml(composed(line.words)), end="")
            return True
        composed(line.words)  # which checks the words
        hydra = GlobalHydra.instance().hydra
        if line.cfg:
            hydra.show_cfg(line.source.main, line.words, line.cfg, line.package, line.resolve)
        else:
            hydra.show_info(line.info, line.source.main, line.words)
    return True
