"""A variant against the baseline in numbers: the difference of each metric, and the pairs of runs behind it.

Differences are paired by seed if the runs of a seed saw the same batches, else unpaired. Runs on different images are
not compared. Differences leave diverged runs out, because they have no final values.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bnexp.report import stats
from bnexp.report.records import METRICS, Metric, RunRecord
from bnexp.report.variants import Variant, batch_settings, group_names, varying
from bnexp.store.settings import as_typed

Pair = tuple[RunRecord, RunRecord]  # a variant's run and the baseline's run of the same seed
SOURCE = {"data", "data.root", "data.images"}  # runs that differ in one of these saw different images


@dataclass(frozen=True)
class Against:
    """A variant against the baseline: ``differences`` by metric key.

    ``pairs`` are the runs of one seed on the same batches, diverged ones too; there are none if unpaired. ``differs``
    are the settings that set the two apart, ``unlike`` those because of which a run and its partner saw different
    batches, ``computed`` the versions and the settings of the machine that differ, which change numbers by rounding.
    All three are {setting: (baseline's value, variant's value)}.
    """

    design: str  # paired, unpaired or other data
    differences: dict[str, stats.Difference]
    pairs: list[Pair]
    differs: dict[str, tuple]
    unlike: dict[str, tuple]
    computed: dict[str, tuple]

    def values(self, metric: Metric) -> dict[str, tuple[float, float]]:
        """{seed: (variant's value, baseline's value)} of the pairs in which both finished."""
        both = {repr(run.seed): (metric.of(run), metric.of(base)) for run, base in self.pairs
                if not run.diverged and not base.diverged}  # fmt: skip
        return {seed: values for seed, values in both.items() if None not in values}


def measure_against(variant: Variant, base: Variant) -> Against:
    """Return the differences of ``variant`` from ``base``."""
    partners = {repr(run.seed): run for run in base.all_runs}
    pairs = [(run, partners[repr(run.seed)]) for run in variant.all_runs if repr(run.seed) in partners]
    unlike = _unlike(pairs or [(variant.first, base.first)])
    design = "other data" if unlike.keys() & SOURCE else "unpaired" if unlike else "paired"
    computed = {key: both for key, both in varying([_made_by(base), _made_by(variant)]).items() if None not in both}
    against = Against(design, {}, pairs if design == "paired" else [], _differing(variant, base), unlike, computed)
    for metric in METRICS:
        if design == "unpaired":
            found = stats.unpaired_difference(metric.values(variant.runs), metric.values(base.runs))
        else:
            values = against.values(metric).values()
            found = stats.paired_difference([own for own, _ in values], [other for _, other in values])
        against.differences[metric.key] = replace(found, p=None) if metric.best else found
    return against


def _differing(variant: Variant, base: Variant) -> dict[str, tuple]:
    """The settings that set the two apart, without the options of groups whose name differs."""
    renamed = varying([group_names(base.first), group_names(variant.first)])
    settings = varying([base.parts, variant.parts])
    return {key: pair for key, pair in settings.items() if "." not in key or key.split(".")[0] not in renamed}


def _made_by(variant: Variant) -> dict[str, str]:
    """The versions and the settings of the machine that computed the runs, as far as they are known."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in variant.all_runs:
        given = run.config | run.status
        given |= given["versions"] if isinstance(given.get("versions"), dict) else {}
        for key in ("torch", "bnexp", "git_commit", "threads", "deterministic", "device_type", "device_name"):
            if given.get(key) is not None:
                found[key].add(as_typed(given[key]))
    return {key: " and ".join(sorted(values)) for key, values in found.items()}


def _unlike(pairs: Sequence[Pair]) -> dict[str, tuple]:
    """The settings because of which a run and its partner saw different batches."""
    unlike: dict[str, tuple] = {}
    for run, base in pairs:
        unlike |= varying([batch_settings(base), batch_settings(run)])
        if "data._target_" in unlike:
            return {"data": (group_names(base).get("data"), group_names(run).get("data"))}
        if not unlike and "" not in (run.images, base.images) and run.images != base.images:
            unlike["split"] = (base.images, run.images)
    return unlike
