"""Compares variants with a baseline, paired by seed: differences, steps to its best, and a verdict in words.

A diverged run has no final values: means and pairs leave it out and say so, and it never reaches anything.
Steps to the baseline's best: for every seed, the step at which the baseline was at its own best validation
value, over the first step at which the variant is as good; Ioffe & Szegedy (2015, fig. 2) count so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bnexp.errors import UserError
from bnexp.report import stats
from bnexp.report.records import BY_KEY, METRICS, TARGETS, Metric, Pair, Problem, RunRecord
from bnexp.report.variants import Variant, find_key, group_names, into_variants, pick_best, plain, short
from bnexp.store.settings import numbers


@dataclass(frozen=True)
class SpeedUp:
    """The baseline's steps to its best over the variant's steps to the same value; above 1 is faster.

    ``n`` seeds had a target and ``reached`` of them reached it; ``ratio`` is the geometric mean over those.
    """

    n: int
    reached: int
    ratio: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Against:
    """A variant against the baseline; ``differs`` is {setting: (baseline's, variant's)}."""

    paired: dict[str, stats.Paired]
    speedups: dict[str, SpeedUp]
    differs: dict[str, tuple]

    def evidence(self, metric: Metric) -> str:
        """``better``, ``worse`` or ``not enough evidence``, which is what an interval across zero means."""
        paired = self.paired[metric.key]
        if not paired.excludes_zero:
            return "not enough evidence"
        return "better" if (paired.difference > 0) == metric.is_accuracy else "worse"


@dataclass(frozen=True)
class Comparison:
    """Variants, the baseline first; every other one ``against`` it by label; what must be said beside."""

    variants: list[Variant]
    means: dict[str, dict[str, stats.Mean]]
    against: dict[str, Against]
    sentences: list[str]
    notes: list[str]
    left_out: list[Problem]
    best_over: str | None = None
    chosen: dict[str, object] = field(default_factory=dict)

    @property
    def baseline(self) -> Variant:
        return self.variants[0]


def compare(
    records: Sequence[RunRecord],
    problems: Sequence[Problem] = (),
    *,
    baseline: str | None = None,
    best_over: str | None = None,
) -> Comparison:
    """Compare the variants among ``records`` with one of them.

    That is the one named ("norm=none", or a label), else the first whose norm is none, else the first.
    ``best_over`` is a key: each variant is first put at its best value of it, by `pick_best`.
    """
    if not records:
        left = "; ".join(f"{each.path} {each.status}: {each.reason}" for each in problems)
        raise UserError(f"no finished run to compare{left and ', only ' + left}; let a run finish first")
    notes: list[str] = []
    repeated: list[Problem] = []
    if best_over is not None:
        best_over = find_key(records, best_over)
        records, repeated, notes = pick_best(records, best_over)
    variants, superseded = into_variants(records, ignore=best_over)
    base = _find_baseline(variants, baseline, notes)
    variants = [base, *(each for each in variants if each is not base)]
    chosen: dict[str, object] = {}
    if best_over is not None:
        values = [numbers(each.first.config).get(best_over) for each in variants]
        names = [f"{short(best_over)}={plain(value)}" for value in values]
        variants = [replace(each, label=f"{each.label} {n}") for each, n in zip(variants, names, strict=True)]
        chosen = {each.label: value for each, value in zip(variants, values, strict=True)}
        base = variants[0]
    against = {each.label: _against(each, base) for each in variants[1:]}
    notes += [note for each in variants for note in _notes(each, base, against.get(each.label))]
    if len(variants) > 2:
        notes.append(f"The p-values are not corrected for comparing {len(variants) - 1} variants at once.")
    sentences = [_sentence(each, base, against[each.label]) for each in variants[1:]]
    means = {each.label: {metric.key: metric.mean(each.runs) for metric in METRICS} for each in variants}
    left_out = [*problems, *repeated, *superseded]
    sentences = sentences or [f"One variant only, {base.label}: nothing to compare it with."]
    return Comparison(variants, means, against, sentences, notes, left_out, best_over, chosen)


def _find_baseline(variants: list[Variant], wanted: str | None, notes: list[str]) -> Variant:
    if wanted is None:
        plain_ones = [each for each in variants if group_names(each.first).get("norm") == "none"]
        return (plain_ones or variants)[0]
    words = wanted.replace(",", " ").split()
    fits = [each for each in variants if each.label == wanted]
    fits = fits or [each for each in variants if words and all(_fits(each.first, word) for word in words)]
    if not fits:
        known = ", ".join(f"`{each.label}`" for each in variants)
        raise UserError(f"baseline={wanted}: not among the variants, which are {known}; name one of them")
    if len(fits) > 1:
        notes.append(f"baseline {wanted} fits {len(fits)} variants; {fits[0].label} is taken, the first.")
    return fits[0]


def _fits(run: RunRecord, override: str) -> bool:
    key, equals, value = override.lstrip("+").partition("=")
    if not equals:
        return key in group_names(run).values()
    flat = numbers(run.config)
    settings = [group_names(run).get(key), *(flat[each] for each in flat if key in (each, short(each)))]
    return override in run.overrides or any(_equal(each, value) for each in settings if each is not None)


def _equal(setting, text: str) -> bool:
    try:
        return plain(setting) == text or (not isinstance(setting, bool) and float(setting) == float(text))
    except (TypeError, ValueError):
        return False


def _against(variant: Variant, base: Variant) -> Against:
    partner = {repr(run.seed): run for run in base.runs}
    pairs = [(run, partner[repr(run.seed)]) for run in variant.runs if repr(run.seed) in partner]
    lost = [(run, partner[repr(run.seed)]) for run in variant.diverged if repr(run.seed) in partner]
    paired = {metric.key: metric.paired(pairs) for metric in METRICS}
    speedups = {metric.tag: _speed_up(metric, pairs + lost) for metric in TARGETS}
    keys = dict.fromkeys([*base.parts, *variant.parts])
    settings = {key: (base.parts.get(key), variant.parts.get(key)) for key in keys}
    names = group_names(base.first), group_names(variant.first)
    renamed = {key for key in keys if names[0].get(key) != names[1].get(key)}
    differs = {
        key: values
        for key, values in settings.items()
        if values[0] != values[1] and not ("." in key and key.split(".")[0] in renamed)
    }
    return Against(paired, speedups, differs)


def _speed_up(metric: Metric, pairs: Sequence[Pair]) -> SpeedUp:
    ratios, n = [], 0
    for run, base in pairs:
        target = metric.of(base)
        if target is None or not math.isfinite(target):
            continue
        n += 1
        step = None if run.diverged else _first_step(metric, run, target)
        if step is not None:
            ratios.append(max(_first_step(metric, base, target), 1) / max(step, 1))  # step 0: before training
    result = stats.geometric_mean(ratios)
    return SpeedUp(n, len(ratios), result.ratio, result.low, result.high)


def _first_step(metric: Metric, run: RunRecord, target: float) -> int | None:
    steps, values = run.curves.get(metric.tag, ((), ()))
    as_good = target.__le__ if metric.is_accuracy else target.__ge__
    return next((step for step, value in zip(steps, values, strict=True) if as_good(value)), None)


def _notes(variant: Variant, base: Variant, against: Against | None) -> list[str]:
    """What must be known to read this variant's numbers."""
    notes, label = [], variant.label
    total = len(variant.runs) + len(variant.diverged)
    if variant.diverged:
        role = "sets no best to reach" if against is None else "counts as never reaching the baseline's best"
        others = f"means and differences are over the others, and a diverged run {role}"
        notes.append(f"{label}: {len(variant.diverged)} of {total} runs diverged; {others}.")
    if total == 1:
        notes.append(f"{label}: one seed, so no interval and no p.")
    if against is None:
        return notes
    if len(against.differs) > 1:
        settings = [f"{key} ({_said(old)}, {_said(new)})" for key, (old, new) in against.differs.items()]
        notes.append(f"{label} differs from {base.label} in more than one setting: {', '.join(settings)}.")
    partners = {repr(run.seed) for run in base.runs + base.diverged}
    alone = [str(run.seed) for run in variant.runs + variant.diverged if repr(run.seed) not in partners]
    if alone:
        seeds = f"seed {', '.join(alone)}"
        notes.append(f"{label}: {seeds} without partner in {base.label}; in means, not in differences.")
    return notes


def _said(value) -> str:
    return "-" if value is None else plain(value)


def _sentence(variant: Variant, base: Variant, against: Against) -> str:
    """The verdict on one variant in words."""
    metrics = [BY_KEY[key] for key in ("accuracy/test", "loss/test") if against.paired[key].n]
    metrics = metrics or [metric for metric in reversed(TARGETS) if against.paired[metric.key].n]
    if not metrics:
        words = f"{variant.label} and {base.label} share no finished seed, so nothing can be paired"
    else:
        n = max(against.paired[metric.key].n for metric in metrics)
        over = f"over {n} paired seeds" if n > 1 else "in one seed, which is not enough evidence"
        words = f"{variant.label} against {base.label}, {over}: "
        words += "; ".join(_difference(metric, against) for metric in metrics)
    speeds = [(metric, against.speedups[metric.tag]) for metric in TARGETS]
    reached = "; it ".join(_speed(metric, speed, base.label) for metric, speed in speeds if speed.n)
    words += f". It {reached}" if reached else ""
    if variant.diverged:
        words += f". {len(variant.diverged)} of its {len(variant.runs + variant.diverged)} runs diverged"
    return words + "."


def _difference(metric: Metric, against: Against) -> str:
    paired = against.paired[metric.key]
    unit = " points" if metric.is_accuracy else ""
    if paired.difference is None:
        return f"{metric.title} is not finite"
    if paired.difference == 0 and paired.low is None:
        return f"{metric.title} is the same" + (" in every seed" if paired.n > 1 else "")
    by = f"{metric.show(abs(paired.difference))}{unit}"
    words = f"{metric.title} is {'higher' if paired.difference > 0 else 'lower'} by {by}"
    if paired.low is None:
        return words + (" in every seed, without any spread to judge it by" if paired.n > 1 else "")
    interval = f"95% interval {metric.show(paired.low, '+')} to {metric.show(paired.high, '+')}"
    if not paired.excludes_zero:
        return f"not enough evidence of a difference in {metric.title} ({interval})"
    return f"{words} ({interval}, p {show_p(paired.p, '= ')})"


def _speed(metric: Metric, speed: SpeedUp, base: str) -> str:
    target = f"{base}'s best validation {'accuracy' if metric.is_accuracy else 'loss'}"
    if not speed.reached:
        return f"never reaches {target}" + (f" in {speed.n} seeds" if speed.n > 1 else "")
    words = f"reaches {target} in {speed.reached} of {speed.n} seeds"
    if speed.ratio is None:
        return words
    times = f", there {_fold(speed.ratio):.2g} times {'sooner' if speed.ratio > 1 else 'later'}"
    if speed.low is None:
        return words + (times if speed.ratio != 1 else "") + (" in each" if speed.reached > 1 else "")
    if speed.low <= 1 <= speed.high:
        return f"{words}, but not evidently sooner or later (speed-up {speed.ratio:.2f}, not enough evidence)"
    low, high = sorted(map(_fold, (speed.low, speed.high)))
    return f"{words}{times} (95% interval {low:.2g} to {high:.2g})"


def _fold(ratio: float) -> float:
    return max(ratio, 1 / ratio)


def show_p(p: float, equals: str = "") -> str:
    """A p-value with two digits, never rounded to zero."""
    return "< 0.0001" if p < 1e-4 else f"{equals}{p:.2g}"
