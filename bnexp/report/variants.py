"""Sorts runs into variants, so that seeds can be averaged and paired.

Runs are one variant when their configs agree in everything but what decides no numbers:
the seed, the schedule of looking, the place. Of a seed that ran twice the later run counts.
"""

import difflib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bnexp.errors import UserError
from bnexp.report.records import TARGETS, Problem, RunRecord
from bnexp.store.settings import NUMBERS, decides, numbers, short_name
from bnexp.store.untrusted import printable

LONGEST_LABEL = 200  # characters


@dataclass(frozen=True)
class Variant:
    """Runs that agree in everything but the seed; ``parts`` sets them apart, ``label`` says it short."""

    label: str
    parts: dict
    runs: list[RunRecord]
    diverged: list[RunRecord]

    @property
    def first(self) -> RunRecord:
        return (self.runs + self.diverged)[0]

    @property
    def overrides(self) -> list[str]:
        """Those overrides of its runs that decide numbers."""
        return [each for each in self.first.overrides if decides(each.lstrip("+").split("=")[0]) & NUMBERS]


def group_names(run: RunRecord) -> dict[str, str]:
    """Short names of a run's groups, {"norm": "none"}: as overridden, else as the ``_target_`` is called."""
    names = {}
    for group, options in run.config.items():
        if isinstance(options, dict) and isinstance(options.get("_target_"), str):
            names[group] = short_name(options["_target_"])
    for override in run.overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key.split("@")[0] in names and value:
            names[key.split("@")[0]] = value
    return names


def identity(run: RunRecord, ignore: str | None = None) -> str:
    """What two runs share if and only if they are the same variant."""
    flat = {key: value for key, value in numbers(run.config).items() if key != ignore}
    return json.dumps(flat, sort_keys=True, default=str)


def into_variants(
    records: Sequence[RunRecord], ignore: str | None = None
) -> tuple[list[Variant], list[Problem]]:
    """Variants in order of appearance, and the runs superseded by a later one of the same variant and seed.

    ``ignore`` is a key in which runs of one variant may differ: that of which the best value was picked.
    """
    groups: dict[str, dict[str, RunRecord]] = defaultdict(dict)
    superseded = []
    for run in records:
        seeds = groups[identity(run, ignore)]
        if repr(run.seed) in seeds:
            earlier, run = sorted((seeds[repr(run.seed)], run), key=lambda each: each.started)
            reason = f"seed {run.seed} of the same variant was run again later, in {run.path}"
            superseded.append(Problem(earlier.path, "superseded", reason, tuple(earlier.overrides)))
        seeds[repr(run.seed)] = run
    runs = [sorted(seeds.values(), key=_by_seed) for seeds in groups.values()]
    names = [group_names(each[0]) for each in runs]
    parts = _distinguish([numbers(each[0].config) for each in runs], names, ignore)
    variants = [
        Variant(label, part, [run for run in each if not run.diverged], [run for run in each if run.diverged])
        for label, part, each in zip(_named(runs, _labels(parts, names)), parts, runs, strict=True)
    ]
    return variants, superseded


def named(records: Sequence[RunRecord], names: Mapping[Path, str]) -> list[RunRecord]:
    """The records with the names of their variants, given by folder."""
    return [replace(record, name=names.get(record.path, record.name)) for record in records]


def _named(variants: Sequence[Sequence[RunRecord]], labels: list[str]) -> list[str]:
    """The labels, or the name that all runs of a variant were given, if no other variant has it."""
    names = [{run.name for run in runs} for runs in variants]
    given = [min(each) if len(each) == 1 else "" for each in names]
    return [name if name and given.count(name) == 1 else label for name, label in zip(given, labels, strict=True)]


def _by_seed(run: RunRecord) -> tuple:
    return (0, run.seed, "") if isinstance(run.seed, int) else (1, 0, str(run.seed))


def _distinguish(flats: list[dict], names: list[dict], ignore: str | None) -> list[dict]:
    """What sets each variant apart: the names of groups that change, then the other settings that change.

    An option of a group is held only against variants of the same name: that `none` has no eps is no news.
    """
    groups = dict.fromkeys(key for each in names for key in each)
    changing = [key for key in groups if len({each.get(key) for each in names}) > 1]
    parts = [{key: each[key] for key in changing if key in each} for each in names]
    for key in dict.fromkeys(key for flat in flats for key in flat if key != ignore):
        peers = [each.get(key.split(".")[0]) for each in names]
        values: dict[str | None, set[str]] = defaultdict(set)
        for flat, peer in zip(flats, peers, strict=True):
            values[peer].add(repr(flat.get(key)))
        for part, flat, peer in zip(parts, flats, peers, strict=True):
            if key in flat and len(values[peer]) > 1:
                part[key] = flat[key]
    return parts


def _labels(parts: list[dict], names: list[dict]) -> list[str]:
    ends = Counter(short(key) for key in {key for part in parts for key in part})
    labels: list[str] = []
    for part, groups in zip(parts, names, strict=True):
        words = [
            str(value) if key in groups else f"{short(key) if ends[short(key)] == 1 else key}={plain(value)}"
            for key, value in part.items()
        ]
        label = printable(" ".join(words) or groups.get("norm", "all runs"), LONGEST_LABEL)
        while label in labels:
            label += "'"
        labels.append(label)
    return labels


def short(key: str) -> str:
    """The last part of a dotted key."""
    return key.split(".")[-1]


def plain(value) -> str:
    """A setting's value as one would type it."""
    return printable(value if isinstance(value, str) else json.dumps(value, default=str))


def find_key(records: Sequence[RunRecord], wanted: str) -> str:
    """The dotted key meant by ``wanted``, also by its last part; `UserError` unless exactly one fits."""
    keys = dict.fromkeys(key for run in records for key in numbers(run.config))
    fits = [wanted] if wanted in keys else [key for key in keys if short(key) == wanted]
    if len(fits) != 1:
        close = fits or difflib.get_close_matches(wanted, keys, n=3) or list(keys)
        raise UserError(f"best over {wanted}: not one setting of these runs; choose among {', '.join(close)}")
    return fits[0]


def pick_best(records: Sequence[RunRecord], key: str) -> tuple[list[RunRecord], list[Problem], list[str]]:
    """Keep of each variant-but-for-``key`` the runs at its best value; also superseded runs and notes.

    Best is the highest mean over seeds of the best validation accuracy (the lowest loss where no accuracy was
    read). A value at which a smaller share of the seeds diverged comes first whatever its mean.
    """
    variants, superseded = into_variants(records)
    buckets: dict[str, list[Variant]] = defaultdict(list)
    for variant in variants:
        buckets[identity(variant.first, ignore=key)].append(variant)
    _, accuracy = TARGETS
    has_accuracy = any(accuracy.of(run) is not None for run in records)
    metric = accuracy if has_accuracy else TARGETS[0]

    def rank(variant: Variant) -> tuple[float, float]:
        value = metric.mean(variant.runs).mean
        share = len(variant.diverged) / len(variant.runs + variant.diverged)
        return share, math.inf if value is None else -value if has_accuracy else value

    best = [min(bucket, key=rank) for bucket in buckets.values()]
    kept = [run for variant in best for run in variant.runs + variant.diverged]
    labels = [each.label for each in into_variants(kept, ignore=key)[0]]
    notes = []
    for label, variant, bucket in zip(labels, best, buckets.values(), strict=True):
        value = numbers(variant.first.config).get(key)
        values = [numbers(each.first.config).get(key) for each in bucket]
        among = ", ".join(plain(each) for each in _ordered(values))
        note = f"{label} stands at its best {key}={plain(value)} of {among}, by mean {metric.title}"
        if len(values) > 1 and _numeric(values) and value in (min(values), max(values)):
            end = "smallest" if value == min(values) else "largest"
            note += f"; the {end} tried, so one beyond may be better"
        if len({len(each.runs + each.diverged) for each in bucket}) > 1:
            note += "; the values were not tried with equally many seeds"
        notes.append(note + ".")
    return kept, superseded, notes


def _numeric(values: list) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _ordered(values: list) -> list:
    return sorted(values) if _numeric(values) else values
