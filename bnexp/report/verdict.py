"""The verdict: variants compared with a baseline, in numbers, in sentences, and with notes on how to read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bnexp.errors import UserError
from bnexp.report import stats
from bnexp.report.differences import Against, measure_against
from bnexp.report.evidence import ENOUGH, Evidence, Failures, failures_of, judge_variants
from bnexp.report.inference import FEWEST_SEEDS, bound_of_looks
from bnexp.report.question import Question
from bnexp.report.records import METRICS, Metric, Problem, RunRecord
from bnexp.report.sentences import failure_words, sentence_on, show_p
from bnexp.report.steps import SpeedUp, default_targets, speed_up
from bnexp.report.tuning import Tried, Tuning, check_choose_on, pick_best
from bnexp.report.variants import Variant, find_key, group_names, identity, into_variants, last_part
from bnexp.store.settings import as_typed, numbers


@dataclass(frozen=True)
class Comparison:
    """Variants compared with the first of them, the baseline.

    ``means`` is {label: {metric key: mean}}; ``failures`` is by label too, and ``against``, ``evidence`` and
    ``speedups`` are by the labels of the other variants. ``sentences`` are the verdict, ``notes`` say how to read it.
    ``chosen`` is {label: value} of the setting ``best_over``, and ``tuning`` says how they were chosen.
    """

    question: Question
    variants: list[Variant]
    means: dict[str, dict[str, stats.Mean]]
    failures: dict[str, Failures]
    against: dict[str, Against]
    evidence: dict[str, Evidence]
    speedups: dict[str, SpeedUp]
    sentences: list[str]
    notes: list[str]
    left_out: list[Problem]
    chosen: dict[str, object] = field(default_factory=dict)
    tuning: Tuning | None = None
    looks: list[int] = field(default_factory=list)

    @property
    def baseline(self) -> Variant:
        return self.variants[0]

    def tried(self, variant: Variant) -> Tried | None:
        """What the value of a variant was chosen among; None if no variant has two values."""
        return self.tuning and self.tuning.tried.get(identity(variant.first, self.question.best_over))


def compare_records(
    records: Sequence[RunRecord],
    problems: Sequence[Problem] = (),
    question: Question = Question(),  # noqa: B008
) -> Comparison:
    """Compare the variants among ``records`` with a baseline."""
    if not records:
        left = "; ".join(f"{each.path} {each.status}: {each.reason}" for each in problems)
        raise UserError(f"no finished run to compare{left and f', only {left}'}; let a run finish first")
    question = question.settled(records)
    metric, best_over = question.metric, question.best_over
    check_choose_on(question.choose_on, best_over, len({repr(run.seed) for run in records}))
    rates = {repr(numbers(run.config).get("optimizer.lr")) for run in records}
    notes: list[str] = []
    repeated: list[Problem] = []
    tuning: Tuning | None = None
    if best_over is not None:
        best_over = find_key(records, best_over)
        tuning = pick_best(records, best_over, metric, question.choose_on)
        records, repeated, notes = tuning.records, tuning.superseded, tuning.notes
    variants, superseded = into_variants(records, ignore=best_over)
    first = _find_baseline(variants, question.baseline, notes)
    variants = [first, *(variant for variant in variants if variant is not first)]
    chosen: dict[str, object] = {}
    if tuning is not None:
        variants, chosen = _named_by_value(variants, best_over)
    base, *rest = variants
    others = {variant.label: variant for variant in rest}
    against = {label: measure_against(variant, base) for label, variant in others.items()}
    evidence = judge_variants(others, base, against, metric, question.margin, tuning is None or not tuning.is_unequal)
    failures = {base.label: failures_of(base)}
    failures |= {label: failures_of(variant, against[label].pairs) for label, variant in others.items()}
    targets = default_targets(base.all_runs)
    if question.target is not None:
        targets = {repr(run.seed): question.target for run in base.all_runs}
    speedups = {label: speed_up(each.pairs, targets, len(others)) for label, each in against.items()}
    notes += [note for variant in variants for note in _notes_on_runs(variant, failures[variant.label], base)]
    notes += [note for label, variant in others.items() for note in _notes_on_pairs(variant, base, against[label])]
    notes += _notes_on_evidence(metric, [against[label].differences[metric.key] for label in others])
    ending = ", at one learning rate, tuned for neither" if best_over is None and len(rates) == 1 else ""
    sentences = [
        sentence_on(variant, base, question, against[label], evidence[label], speedups[label], failures, ending)
        for label, variant in others.items()
    ]
    sentences = sentences or [f"One variant only, {base.label}: nothing to compare it with."]
    means = {variant.label: {each.key: each.mean(variant.runs) for each in METRICS} for variant in variants}
    left_out = [*problems, *repeated, *superseded]
    question = replace(question, best_over=best_over)
    return Comparison(
        question, variants, means, failures, against, evidence, speedups, sentences, notes, left_out, chosen, tuning
    )


def _named_by_value(variants: Sequence[Variant], key: str) -> tuple[list[Variant], dict[str, object]]:
    """The variants with the value of ``key`` in their labels, and {label: value}."""
    values = [numbers(variant.first.config).get(key) for variant in variants]
    labels = [f"{v.label} {last_part(key)}={as_typed(x)}" for v, x in zip(variants, values, strict=True)]
    named = [replace(variant, label=label) for variant, label in zip(variants, labels, strict=True)]
    return named, dict(zip(labels, values, strict=True))


def looked_at(comparison: Comparison, before: Sequence[int]) -> Comparison:
    """The comparison with its ``looks``: the seeds at each look at these runs, earlier ones and this one.

    From the second look on, a note names the p that keeps false positives at 5% over all looks.
    """
    counts = [each.differences[comparison.question.primary].n for each in comparison.against.values()]
    if not counts or min(counts) < 2:
        return replace(comparison, looks=list(before))
    looks = [*before, min(counts)]
    if len(set(looks)) == 1:
        return replace(comparison, looks=looks[:1])
    looks = list(dict.fromkeys(looks))
    words = f"Look {len(looks)} at these variants, after {', '.join(map(str, looks[:-1]))} seeds: stopping once a p is "
    words += "small finds differences that are not there. Over all looks, "
    words += f"p < {bound_of_looks(looks):.2g} keeps false positives at 5%."
    return replace(comparison, looks=looks, notes=[*comparison.notes, words])


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


def _notes_on_runs(variant: Variant, failures: Failures, base: Variant) -> list[str]:
    """Notes on a variant's runs."""
    notes = variant.evaluations
    if failures.k:
        words = f"{failure_words(variant, failures)} (95% Clopper-Pearson interval {failures.low:.0%} to "
        words += f"{failures.high:.0%}"
        words += f"; McNemar's exact p {show_p(failures.p, '= ')} against {base.label}" if failures.p else ""
        notes.append(f"{words}).")
    if len(variant.all_runs) == 1:
        notes.append(f"{variant.label}: one seed, so no interval and no p.")
    return notes


def _notes_on_evidence(metric: Metric, found: Sequence[stats.Difference]) -> list[str]:
    """Notes on how the verdict was reached."""
    tested = [each for each in found if each.p is not None]
    notes = []
    if len(tested) > 1:
        notes.append(
            f"{metric.title}: the p of {len(tested)} variants are corrected together (Holm), and their intervals hold "
            "together (Bonferroni), which asks for more: one may include 0 where p < 0.05. No other metric is judged."
        )
    fewest = min((each.n for each in tested), default=ENOUGH)
    if fewest < FEWEST_SEEDS:
        notes.append(f"Fewer than {FEWEST_SEEDS} seeds: nothing is called better or worse.")
    elif fewest < ENOUGH:
        notes.append(
            f"Fewer than {ENOUGH} seeds: only a large difference can be found; bnexp plan says how many to run."
        )
    return notes


def _notes_on_pairs(variant: Variant, base: Variant, against: Against) -> list[str]:
    """Notes on the differences between a variant and the baseline."""
    notes, both, unlike = [], f"{variant.label} and {base.label}", _settings(against.unlike)
    if len(against.differs) > 1:
        settings = _settings(against.differs)
        notes.append(f"{variant.label} differs from {base.label} in more than one setting: {settings}.")
    if against.design == "other data":
        notes.append(f"{both} saw different images ({unlike}): no difference between them is given.")
    if against.design == "unpaired":
        notes.append(f"{both}: same seeds, other batches ({unlike}): not paired, and steps are not compared.")
    if against.computed:
        notes.append(f"{both} were not computed alike ({_settings(against.computed)}), which can change numbers too.")
    partners = {repr(run.seed) for run in base.all_runs}
    alone = ", ".join(str(run.seed) for run in variant.all_runs if repr(run.seed) not in partners)
    if alone and against.design == "paired":
        notes.append(f"{variant.label}: {base.label} has no run of seed {alone}, which counts in means only.")
    return notes


def _settings(pairs: Mapping[str, tuple]) -> str:
    """``norm (none, library), optimizer.lr (0.1, 0.5)``"""
    words = {key: ["-" if value is None else as_typed(value) for value in pair] for key, pair in pairs.items()}
    return ", ".join(f"{key} ({', '.join(pair)})" for key, pair in words.items())
