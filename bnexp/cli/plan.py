"""``bnexp plan``: how many seeds a comparison needs."""

from pathlib import Path

from bnexp.cli.report import read_path
from bnexp.errors import UserError, nearest

TAKEN = ("difference", "baseline", "primary")


def plan(arguments: list[str]) -> int:
    """``bnexp plan RUN_OR_SWEEP... difference=X``: seeds with which a difference is found."""
    from bnexp.report.plan import print_plan
    from bnexp.report.question import Question

    given, paths = {}, []
    for word in arguments:
        key, equals, value = word.partition("=")
        if equals and not Path(word).exists():
            if key not in TAKEN:
                raise UserError(f"plan: {word}: takes {', '.join(TAKEN)}{nearest(key, TAKEN)}")
            given[key] = value
        else:
            paths.append(read_path(word))
    if not paths:
        raise UserError("plan: of which runs? Give their folders, as in bnexp plan outputs/... difference=0.5")
    text = given.pop("difference", "0.5")
    try:
        difference = float(text)
    except ValueError:
        raise UserError(f"difference={text}: a number is expected, in points of accuracy") from None
    print_plan(paths, Question(**given), difference)
    return 0
