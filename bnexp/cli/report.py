"""``bnexp report``: the verdict, tables and figures of finished runs."""

import argparse
from dataclasses import fields
from pathlib import Path

from bnexp.cli.parser import Parser
from bnexp.errors import UserError, home_path


def report(arguments: list[str]) -> int:
    """``bnexp report RUN_OR_SWEEP...``: compare finished runs; runs that differ only in the seed are one variant."""
    from bnexp.report.question import Question
    from bnexp.report.report import REPORT_FORMATS, make_report

    parser = Parser("bnexp report", description="Compare finished runs: print tables and the verdict.")
    paths = "folders of runs, or folders that hold runs"
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_SWEEP", type=read_path, help=paths)
    baseline = "the variant to compare the others with, such as norm=none, which is the default if there is one"
    parser.add_argument("--baseline", metavar="NAME", help=baseline)
    best_over = "compare each variant at its best value of this setting, such as optimizer.lr"
    parser.add_argument("--best-over", metavar="KEY", help=best_over)
    choose_on = "choose these values on the first N seeds and judge them on the others"
    parser.add_argument("--choose-on", metavar="N", type=int, help=choose_on)
    primary = "the metric that is judged, such as loss/test; by default what the runs' configs say: accuracy/test"
    parser.add_argument("--primary", metavar="METRIC", help=primary)
    margin = "the largest difference in it that does not matter, in points or nats; 0.5 by default"
    parser.add_argument("--margin", metavar="X", type=float, help=margin)
    target = "the validation accuracy whose steps are compared, such as 0.95; by default what the baseline ends at"
    parser.add_argument("--target", metavar="X", type=float, help=target)
    out = "write comparison.png, .svg, .json and .md into this folder"
    parser.add_argument("--out", metavar="DIR", type=read_path, help=out)
    shape = parser.add_mutually_exclusive_group()
    for name in REPORT_FORMATS:
        help = f"print {name} instead of tables"
        shape.add_argument(f"--{name}", dest="format", action="store_const", const=name, help=help)
    given = vars(parser.parse_args(arguments))
    make_report(question=Question(**{each.name: given.pop(each.name) for each in fields(Question)}), **given)
    return 0


def read_path(text: str) -> Path:
    """``text`` as a path for argparse; ``~`` is the home folder."""
    try:
        return home_path(text)
    except UserError as error:  # of which argparse would show no text
        raise argparse.ArgumentTypeError(str(error)) from error
