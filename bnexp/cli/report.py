"""``bnexp report``: the verdict, tables and figures of finished runs."""

import argparse
from pathlib import Path

from bnexp.cli.parser import Parser
from bnexp.errors import UserError, home_path


def report(arguments: list[str]) -> int:
    """``bnexp report RUN_OR_SWEEP...``: compare finished runs; runs that differ only in the seed are one variant."""
    from bnexp.report.report import REPORT_FORMATS, make_report

    parser = Parser("bnexp report", description="Compare finished runs: print tables and the verdict.")
    paths = "folders of runs, or folders that hold runs"
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_SWEEP", type=read_path, help=paths)
    baseline = "the variant to compare the others with, such as norm=none, which is the default if there is one"
    parser.add_argument("--baseline", metavar="NAME", help=baseline)
    best_over = "compare each variant at its best value of this setting, such as optimizer.lr"
    parser.add_argument("--best-over", metavar="KEY", help=best_over)
    out = "write comparison.png, .svg, .json and .md into this folder"
    parser.add_argument("--out", metavar="DIR", type=read_path, help=out)
    shape = parser.add_mutually_exclusive_group()
    for name in REPORT_FORMATS:
        help = f"print {name} instead of tables"
        shape.add_argument(f"--{name}", dest="format", action="store_const", const=name, help=help)
    make_report(**vars(parser.parse_args(arguments)))
    return 0


def read_path(text: str) -> Path:
    """``text`` as a path for argparse; ``~`` is the home folder."""
    try:
        return home_path(text)
    except UserError as error:  # of which argparse would show no text
        raise argparse.ArgumentTypeError(str(error)) from error
