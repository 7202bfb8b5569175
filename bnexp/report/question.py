"""What a comparison of runs asks: against which baseline, by which metric, within which margin, up to which target."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bnexp.errors import UserError, nearest
from bnexp.report.records import BY_KEY, METRICS, PRIMARY, Metric, RunRecord

JUDGED = [metric for metric in METRICS if not metric.best]
IN_PLACE = ("accuracy/valid/final", "loss/train/final")  # judged where nothing was tested
MARGIN = 0.5  # points of accuracy, or nats, that do not matter


@dataclass(frozen=True)
class Question:
    """What a comparison asks; None stands for what the runs' configs say, and then for the default.

    ``baseline`` is the variant named ("norm=none", or a label), by default the first whose norm is none, else the
    first. ``best_over`` is a setting: of each variant only the runs at its best value count, which the first
    ``choose_on`` seeds choose, see `pick_best`. ``primary`` is the key of the metric that is judged, ``margin`` the
    largest difference in it that does not matter, and ``target`` the validation accuracy whose steps are compared, see
    `default_targets`.
    """

    baseline: str | None = None
    best_over: str | None = None
    primary: str | None = None
    margin: float | None = None
    target: float | None = None
    choose_on: int | None = None

    @property
    def metric(self) -> Metric:
        """The metric that is judged."""
        return BY_KEY[self.primary]

    def settled(self, records: Sequence[RunRecord]) -> "Question":
        """With what the configs of the runs agree on in place of None; `UserError` for what they cannot answer."""
        stated = {}
        for key, default in (("primary", PRIMARY.key), ("margin", MARGIN), ("target", None)):
            found = [run.config.get(key) for run in records]
            agreed = found[0] if found.count(found[0]) == len(found) else None
            stated[key] = next((each for each in (getattr(self, key), agreed) if each is not None), default)
        question = replace(self, **stated)
        question.check()
        finished = [run for run in records if not run.diverged]
        known = [metric.key for metric in JUDGED if metric.values(finished)]
        if question.primary in known or not known:
            return question
        if question.primary != PRIMARY.key:
            raise UserError(
                f"primary={question.primary}: no finished run has measured it; choose one of {', '.join(known)}"
            )
        return replace(question, primary=next((each for each in IN_PLACE if each in known), known[0]))

    def check(self) -> None:
        """Raise `UserError` for a metric, a margin or a target that means nothing."""
        known = [metric.key for metric in JUDGED]
        if self.primary not in known:
            close = nearest(str(self.primary), known)
            raise UserError(f"primary={self.primary}: cannot be judged{close}; choose one of {', '.join(known)}")
        if not (isinstance(self.margin, int | float) and 0 < self.margin < math.inf):
            raise UserError(f"margin={self.margin}: no difference lies within it; give a number above 0")
        if self.target is not None and not (isinstance(self.target, int | float) and 0 < self.target <= 1):
            raise UserError(f"target={self.target}: an accuracy above 0 and up to 1 is expected, such as 0.95")
