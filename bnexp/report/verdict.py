"""The verdict: variants compared with a baseline, in numbers, in sentences, and with notes on how to read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bnexp.errors import UserError
from bnexp.report import stats
from bnexp.report.differences import Against, SpeedUp, measure_against
from bnexp.report.records import BY_KEY, METRICS, TARGETS, Metric, Problem, RunRecord
from bnexp.report.variants import Variant, find_key, group_names, into_variants, last_part, pick_best
from bnexp.store.settings import as_typed, numbers


@dataclass(frozen=True)
class Comparison:
    """Variants compared with the first of them, the baseline.

    ``means`` is {label: {metric key: mean}}, ``against`` {label: Against} of the other variants. ``sentences`` are
    the verdict, ``notes`` say how to read it. ``chosen`` is {label: value} of the setting ``best_over``.
    """

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


def compare_records(
    records: Sequence[RunRecord],
    problems: Sequence[Problem] = (),
    *,
    baseline: str | None = None,
    best_over: str | None = None,
) -> Comparison:
    """Compare the variants among ``records`` with a baseline.

    The baseline is the variant named ("norm=none", or a label), else the first whose norm is none, else the first.
    ``best_over`` is a setting: of each variant only the runs at its best value count, see `pick_best`.
    """
    if not records:
        left = "; ".join(f"{each.path} {each.status}: {each.reason}" for each in problems)
        raise UserError(f"no finished run to compare{left and f', only {left}'}; let a run finish first")
    notes: list[str] = []
    repeated: list[Problem] = []
    if best_over is not None:
        best_over = find_key(records, best_over)
        records, repeated, notes = pick_best(records, best_over)
    variants, superseded = into_variants(records, ignore=best_over)
    first = _find_baseline(variants, baseline, notes)
    variants = [first, *(variant for variant in variants if variant is not first)]
    chosen: dict[str, object] = {}
    if best_over is not None:
        values = [numbers(variant.first.config).get(best_over) for variant in variants]
        labels = [f"{v.label} {last_part(best_over)}={as_typed(x)}" for v, x in zip(variants, values, strict=True)]
        variants = [replace(variant, label=label) for variant, label in zip(variants, labels, strict=True)]
        chosen = dict(zip(labels, values, strict=True))
    base, *others = variants
    against = {variant.label: measure_against(variant, base) for variant in others}
    notes += [note for variant in variants for note in _notes_on_runs(variant, is_base=variant is base)]
    notes += [note for variant in others for note in _notes_on_pairs(variant, base, against[variant.label])]
    if len(others) > 1:
        notes.append(
            f"The p-values are not corrected for multiple comparisons: {len(others)} variants against {base.label}."
        )
    sentences = [_sentence(variant, base, against[variant.label]) for variant in others]
    sentences = sentences or [f"One variant only, {base.label}: nothing to compare it with."]
    means = {variant.label: {metric.key: metric.mean(variant.runs) for metric in METRICS} for variant in variants}
    left_out = [*problems, *repeated, *superseded]
    return Comparison(variants, means, against, sentences, notes, left_out, best_over, chosen)


def _find_baseline(variants: list[Variant], wanted: str | None, notes: list[str]) -> Variant:
    if wanted is None:
        without_norm = [variant for variant in variants if group_names(variant.first).get("norm") == "none"]
        return (without_norm or variants)[0]
    words = wanted.replace(",", " ").split()
    fits = [variant for variant in variants if variant.label == wanted]
    fits = fits or [variant for variant in variants if words and all(_fits(variant.first, word) for word in words)]
    if not fits:
        known = ", ".join(f"`{variant.label}`" for variant in variants)
        raise UserError(f"baseline={wanted}: not among the variants, which are {known}; name one of them")
    if len(fits) > 1:
        notes.append(f"baseline {wanted} fits {len(fits)} variants; the first, {fits[0].label}, is taken.")
    return fits[0]


def _fits(run: RunRecord, override: str) -> bool:
    """Whether ``override`` (``norm=none``, ``lr=1e-1``, ``none``) is true of the run."""
    key, equals, value = override.lstrip("+").partition("=")
    if not equals:
        return key in group_names(run).values()
    flat = numbers(run.config)
    settings = [group_names(run).get(key), *(flat[each] for each in flat if key in (each, last_part(each)))]
    return override in run.overrides or any(_equal(each, value) for each in settings if each is not None)


def _equal(setting, text: str) -> bool:
    try:
        return as_typed(setting) == text or (not isinstance(setting, bool) and float(setting) == float(text))
    except (TypeError, ValueError):
        return False


def _notes_on_runs(variant: Variant, is_base: bool) -> list[str]:
    """Notes on a variant's means."""
    notes = variant.evaluations
    if variant.diverged:
        role = "sets no best value to reach" if is_base else "counts as not reaching the baseline's best"
        others = f"Means and differences leave diverged runs out; in the steps to the best, a diverged run {role}"
        notes.append(f"{_diverged_words(variant)}. {others}.")
    if len(variant.all_runs) == 1:
        notes.append(f"{variant.label}: one seed, so no interval and no p.")
    return notes


def _diverged_words(variant: Variant) -> str:
    return f"{variant.label}: {len(variant.diverged)} of {len(variant.all_runs)} runs diverged"


def _notes_on_pairs(variant: Variant, base: Variant, against: Against) -> list[str]:
    """Notes on the differences between a variant and the baseline."""
    notes, both, unlike = [], f"{variant.label} and {base.label}", _settings(against.unlike)
    if len(against.differs) > 1:
        settings = _settings(against.differs)
        notes.append(f"{variant.label} differs from {base.label} in more than one setting: {settings}.")
    if against.design == "other data":
        notes.append(f"{both} saw different images ({unlike}): no difference between them is given.")
    if against.design == "unpaired":
        consequence = "the differences are not paired by seed, and steps to a best are not compared"
        notes.append(f"{both} saw different batches ({unlike}): {consequence}.")
    partners = {repr(run.seed) for run in base.all_runs}
    alone = ", ".join(str(run.seed) for run in variant.all_runs if repr(run.seed) not in partners)
    if alone and against.design == "paired":
        notes.append(f"{variant.label}: {base.label} has no run of seed {alone}, which counts in means only.")
    return notes


def _settings(pairs: Mapping[str, tuple]) -> str:
    """``norm (none, library), optimizer.lr (0.1, 0.5)``"""
    words = {key: ["-" if value is None else as_typed(value) for value in pair] for key, pair in pairs.items()}
    return ", ".join(f"{key} ({', '.join(pair)})" for key, pair in words.items())


def _sentence(variant: Variant, base: Variant, against: Against) -> str:
    """The verdict on one variant in words."""
    counts = {key: difference.n for key, difference in against.differences.items()}
    metrics = [BY_KEY[key] for key in ("accuracy/test", "loss/test") if counts[key]]
    metrics = metrics or [metric for metric in reversed(TARGETS) if counts[metric.key]]
    words = _opening(variant, base, against.design, max((counts[metric.key] for metric in metrics), default=0))
    words += "; ".join(_difference_words(metric, against.differences[metric.key]) for metric in metrics)
    speeds = [(metric, against.speedups[metric.tag]) for metric in TARGETS]
    reached = "; it ".join(_speed_words(metric, speed, base.label) for metric, speed in speeds if speed.n)
    words += f". It {reached}" if reached else ""
    return ". ".join([words, *(_diverged_words(each) for each in (variant, base) if each.diverged)]) + "."


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


def _difference_words(metric: Metric, found: stats.Difference) -> str:
    if found.difference is None:
        return f"{metric.title} is not finite"
    if found.difference == 0 and found.low is None:
        return f"{metric.title} is the same" + (" in every seed" if found.n > 1 else "")
    unit = " points" if metric.is_accuracy else ""
    direction = "higher" if found.difference > 0 else "lower"
    words = f"{metric.title} is {direction} by {metric.show(abs(found.difference))}{unit}"
    if found.low is None:
        return words + (" in every seed, so there is no spread for an interval" if found.n > 1 else "")
    interval = f"95% interval {metric.show(found.low, '+')} to {metric.show(found.high, '+')}{unit}"
    if not found.excludes_zero:
        return f"not enough evidence of a difference in {metric.title} ({interval})"
    return f"{words} ({interval}, p {show_p(found.p, '= ')})"


def _speed_words(metric: Metric, speed: SpeedUp, base: str) -> str:
    target = f"{base}'s {metric.title}"
    if not speed.reached:
        return f"does not reach {target}" + (f" in any of {speed.n} seeds" if speed.n > 1 else "")
    seeds = f" in {speed.reached} of {speed.n} seeds" if speed.n > 1 else ""
    if speed.ratio is None or speed.is_same_step:
        return f"reaches {target}{' at the same step' * speed.is_same_step}{seeds}"
    times = f"{', there' * bool(seeds)} {_fold(speed.ratio):.2g} times {'sooner' if speed.ratio > 1 else 'later'}"
    if speed.low is None:
        return f"reaches {target}{seeds}{times}" + (" in each" if speed.reached > 1 else "")
    if speed.low <= 1 <= speed.high:
        return f"reaches {target}{seeds}, with not enough evidence of fewer or more steps (speed-up {speed.ratio:.2f})"
    low, high = sorted(map(_fold, (speed.low, speed.high)))
    return f"reaches {target}{seeds}{times} (95% interval {low:.2g} to {high:.2g})"


def _fold(ratio: float) -> float:
    return max(ratio, 1 / ratio)


def show_p(p: float, equals: str = "") -> str:
    """A p-value with two digits, never rounded to zero."""
    return "< 0.0001" if p < 1e-4 else f"{equals}{p:.2g}"
