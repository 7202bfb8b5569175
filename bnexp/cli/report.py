"""``bnexp report``: the verdict, tables and figures of finished runs."""

import argparse

from bnexp.errors import UserError


def report(arguments: list[str]) -> int:
    """``bnexp report RUN_OR_SWEEP...``: compare finished runs, sorted into variants by everything but the seed."""
    from bnexp.report.report import REPORT_FORMATS, make_report

    parser = argparse.ArgumentParser("bnexp report", description="Compare finished runs.")
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_SWEEP", help="run folders, or folders of run folders")
    parser.add_argument("--baseline", metavar="NAME", help="the variant to compare with: none, or norm=none")
    parser.add_argument("--best-over", metavar="KEY", help="first pick each variant's best value of this setting")
    parser.add_argument("--out", metavar="DIR", help="write comparison.png, .svg, .json and .md there")
    shape = parser.add_mutually_exclusive_group()
    for name in REPORT_FORMATS:
        shape.add_argument(f"--{name}", dest="format", action="store_const", const=name, help=f"print {name} only")

    def refuse(message: str) -> None:
        raise UserError(f"report: {message}; bnexp report --help shows what it takes")

    parser.error = refuse
    make_report(**vars(parser.parse_args(arguments)))
    return 0
