"""The verdict on a variant in words."""

from collections.abc import Mapping

from bnexp.report import stats
from bnexp.report.differences import Against
from bnexp.report.evidence import Evidence, Failures
from bnexp.report.question import Question
from bnexp.report.records import Metric
from bnexp.report.steps import SpeedUp
from bnexp.report.variants import Variant


def sentence_on(variant: Variant, base: Variant, question: Question, against: Against, evidence: Evidence,
              speed: SpeedUp, failures: Mapping[str, Failures], ending: str) -> str:  # fmt: skip
    """The verdict on one variant in words."""
    metric = question.metric
    found = against.differences[metric.key]
    words = _opening(variant, base, against.design, found.n)
    if evidence.word == "nothing was learned":
        words, speed = f"{variant.label} against {base.label}: nothing was learned by either", SpeedUp(0)
    elif found.n:
        words += _difference_words(metric, found, evidence, question.margin)
        words += ending * (evidence.word != "undecided")
    sentences = [words, *([f"It {_speed_words(speed, base.label)}"] if speed.n else [])]
    sentences += [failure_words(each, failures[each.label]) for each in (variant, base) if failures[each.label].k]
    return ". ".join(sentences) + "."


def _opening(variant: Variant, base: Variant, design: str, n: int) -> str:
    if design == "other data":
        return f"{variant.label} and {base.label} saw different images, so they are not compared"
    if n == 0:
        why = "no seed finished in both" if design == "paired" else "no metric was measured in both"
        return f"{variant.label} against {base.label}: no difference can be given, because {why}"
    over = f"unpaired, {len(variant.runs)} against {len(base.runs)} runs"
    if design == "paired":
        over = f"over {n} paired seeds" if n > 1 else "in one seed"
    return f"{variant.label} against {base.label}, {over}{', which is not enough evidence' * (n == 1)}: "


def _difference_words(metric: Metric, found: stats.Difference, evidence: Evidence, margin: float) -> str:
    if found.difference is None:
        return f"{metric.title} is not finite"
    if found.difference == 0 and found.low is None:
        return f"{metric.title} is the same" + (" in every seed" if found.n > 1 else "")
    unit = " points" if metric.is_accuracy else ""
    words = f"{metric.title} is {'higher' if found.difference > 0 else 'lower'} "
    words += f"by {metric.show(abs(found.difference))}{unit}"
    if evidence.low is None or evidence.high is None:
        return words + (" in every seed, so there is no spread for an interval" if found.n > 1 else "")
    is_one_of_many = evidence.low != found.low
    ends = " to ".join(metric.show(end, "+") for end in (evidence.low, evidence.high))
    interval = f"{'simultaneous ' * is_one_of_many}95% interval {ends}{unit}"
    if evidence.word == "equivalent":
        return f"{metric.title} is equivalent within {margin:g}{unit} ({interval})"
    if evidence.word == "undecided":
        seen = f"{metric.show(found.difference, '+')}{unit}"
        words = f"not enough evidence of a difference in {metric.title} ({seen}, {interval}"
        if evidence.detectable is not None:
            words += f"; {found.n} seeds find a difference of {metric.show(evidence.detectable)}{unit} in 4 of 5 cases"
        return f"{words})"
    words += " where both finish" * evidence.word.endswith("finish")
    return f"{words} ({interval}, p {show_p(evidence.p, '= ')}{' after Holm' * is_one_of_many})"


def _speed_words(speed: SpeedUp, base: str) -> str:
    target = f"{speed.target:.1%} validation accuracy"
    if not speed.reached:
        other = f", {base} does in {speed.base_reached}" if speed.base_reached else f", and neither does {base}"
        return f"does not reach {target} in any of {speed.n} seeds{other}"
    seeds = ""
    if min(speed.reached, speed.base_reached) < speed.n:
        seeds = f" in {speed.reached} of {speed.n} seeds ({base} in {speed.base_reached})"
    if speed.ratio is None:
        return f"reaches {target}{seeds}, sooner in {speed.sooner} seeds and later in {speed.later}"
    if speed.ratio == 1 and speed.sooner == speed.later == 0:
        return f"reaches {target}{seeds} at the same step as {base}" + " in every seed" * (not seeds and speed.n > 1)
    if speed.evidence == "undecided" and speed.n > 1:
        ratio = f"{speed.bound} {speed.ratio:.2f}".strip()
        return f"reaches {target}{seeds}, with not enough evidence of fewer or more steps (speed-up {ratio})"
    least = "at least " * bool(speed.bound)
    words = f"reaches {target}{seeds} {least}{_fold(speed.ratio):.2g} times {'sooner' if speed.ratio > 1 else 'later'}"
    if speed.low is None or speed.high is None:
        return words + (f" (p {show_p(speed.p, '= ')}, sign test)" if speed.n > 1 and speed.p is not None else "")
    low, high = sorted(map(_fold, (speed.low, speed.high)))
    return f"{words} (95% interval {low:.2g} to {high:.2g})"


def _fold(ratio: float) -> float:
    return max(ratio, 1 / ratio)


def show_p(p: float, equals: str = "") -> str:
    """A p-value with two digits, never rounded to zero."""
    return "< 0.0001" if p < 1e-4 else f"{equals}{p:.2g}"


def failure_words(variant: Variant, failures: Failures) -> str:
    """``none fails in 2 of 5 seeds, 1 of them diverged``"""
    diverged = f", {len(variant.diverged)} of them diverged" if variant.diverged else ", at chance"
    return f"{variant.label} fails in {failures.k} of {failures.n} seeds{diverged}"
