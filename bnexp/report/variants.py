"""Sorts runs into variants and names the variants.

Runs of one variant agree in every setting that decides numbers; seed, schedule of looking and place may differ.
If a variant ran a seed twice, the later run counts.
"""

import difflib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bnexp.errors import UserError
from bnexp.report.records import Problem, RunRecord
from bnexp.store.settings import NUMBERS, as_typed, decides, names_code, numbers, short_name, stands_for
from bnexp.store.untrusted import printable

VIEWS = ("data.size", "data.augment", "data.normalize", "data.channels")  # the other settings of data choose the images
LONGEST_LABEL = 200  # characters
DECIDE_BATCHES = ("data", "batch_size", "drop_last", "classes_per_batch", "steps", "epochs", "vary")  # beside the seed


@dataclass(frozen=True)
class Variant:
    """Runs that differ only in the seed.

    ``parts`` are the settings in which it differs from other variants, ``label`` is its name, ``runs`` are the
    finished runs. Each list is in the order of the seeds.
    """

    label: str
    parts: dict
    runs: list[RunRecord]
    diverged: list[RunRecord]

    @property
    def all_runs(self) -> list[RunRecord]:
        return self.runs + self.diverged

    @property
    def first(self) -> RunRecord:
        return self.all_runs[0]

    @property
    def overrides(self) -> list[str]:
        """The overrides of its runs that decide numbers."""
        return [word for word in self.first.overrides if decides(word.lstrip("+").split("=")[0]) & NUMBERS]

    @property
    def evaluations(self) -> list[str]:
        """Sentences on how its runs were evaluated, if not with running statistics."""
        ways = dict.fromkeys(run.evaluation for run in self.all_runs if run.evaluation)
        return [f"{self.label}: evaluated with {way}." for way in ways]


def group_names(run: RunRecord) -> dict[str, str]:
    """Short names of a run's groups, {"norm": "none"}: from the overrides, else from the ``_target_``."""
    names = {}
    for group, options in run.config.items():
        if isinstance(options, dict) and isinstance(options.get("_target_"), str):
            names[group] = short_name(stands_for(options))
    for override in run.overrides:
        key, _, value = override.lstrip("+").partition("=")
        group = key.split("@")[0]
        if group in names and value and stands_for(run.config[group]) == run.config[group]["_target_"]:
            names[group] = value
    return names


def varying(settings: Sequence[Mapping]) -> dict[str, tuple]:
    """{key: its values, None where it is missing} of the keys in which the ``settings`` are not all the same."""
    keys = dict.fromkeys(key for each in settings for key in each)
    columns = {key: tuple(each.get(key) for each in settings) for key in keys}
    return {key: column for key, column in columns.items() if len(set(map(repr, column))) > 1}


def settings_of(run: RunRecord) -> dict:
    """The settings that make the variant; ``device=auto`` is the type of the device that was taken."""
    flat = numbers(run.config)
    return flat | ({"device": run.device_type} if "device" in flat and run.device_type else {})


def batch_settings(run: RunRecord) -> dict:
    """The settings that decide which batches a run sees, given its seed. Only runs that share them can be paired."""
    settings = {key: value for key, value in numbers(run.config).items() if key.split(".")[0] in DECIDE_BATCHES}
    if settings.get("steps") is not None:
        settings.pop("epochs", None)  # it says nothing beside steps
    # The order of the images is drawn on the CPU, but in older versions, whose status says less, on the device.
    # Augmentation is drawn on the device: from one seed, a CPU and a GPU draw other numbers.
    is_drawn_on_cpu = run.data.get("augment") == "none" and "matmul_precision" in run.status
    return settings | {"device": "cpu" if is_drawn_on_cpu else run.device_type}


def identity(run: RunRecord, ignore: str | None = None) -> str:
    """A text that is the same for two runs if and only if they are of one variant, whatever their ``ignore``."""
    flat = {key: value for key, value in settings_of(run).items() if key != ignore}
    return json.dumps(flat, sort_keys=True, default=str)


def into_variants(records: Sequence[RunRecord], ignore: str | None = None) -> tuple[list[Variant], list[Problem]]:
    """Return the variants in order of appearance, and the runs that a later run of the same seed replaces.

    ``ignore`` is a setting in which the runs of one variant may differ: the one whose best value was picked.
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
    runs = [sorted(seeds.values(), key=seed_order) for seeds in groups.values()]
    names = [group_names(each[0]) for each in runs]
    parts = _distinguish([settings_of(each[0]) for each in runs], names, ignore)
    variants = [
        Variant(label, part, [run for run in each if not run.diverged], [run for run in each if run.diverged])
        for label, part, each in zip(_given_or(_labels(parts, names), runs), parts, runs, strict=True)
    ]
    return variants, superseded


def _given_or(labels: list[str], variants: Sequence[Sequence[RunRecord]]) -> list[str]:
    """The names that the runs were given where a name is that of one whole variant, else the labels."""
    names = [{run.name for run in runs} for runs in variants]
    given = [min(each) if len(each) == 1 else "" for each in names]
    return [name if name and given.count(name) == 1 else label for name, label in zip(given, labels, strict=True)]


def seed_order(run: RunRecord) -> tuple:
    """A key that sorts runs by seed: numbers first, then text."""
    return (0, run.seed, "") if isinstance(run.seed, int) else (1, 0, str(run.seed))


def _distinguish(flats: list[dict], names: list[dict], ignore: str | None) -> list[dict]:
    """For each variant the settings by which it is named: the groups that vary, then the other settings that vary.

    An option of a group is compared only among variants with the same name of that group: `none` never has an eps.
    """
    groups = varying(names)
    parts = [{key: own[key] for key in groups if key in own} for own in names]
    for key in dict.fromkeys(key for flat in flats for key in flat if key != ignore):
        peers = [own.get(key.split(".")[0]) for own in names]
        values: dict[str | None, set[str]] = defaultdict(set)
        for flat, peer in zip(flats, peers, strict=True):
            values[peer].add(repr(flat.get(key)))
        for part, flat, peer in zip(parts, flats, peers, strict=True):
            if key in flat and len(values[peer]) > 1:
                part[key] = flat[key]
    return parts


def _labels(parts: list[dict], names: list[dict]) -> list[str]:
    ends = Counter(last_part(key) for key in {key for part in parts for key in part})
    labels: list[str] = []
    for part, groups in zip(parts, names, strict=True):
        code = {key: short_name(str(value)) for key, value in part.items() if names_code(key)}
        own = {key.partition(".")[0] for key in code}  # groups that the name of their code stands for
        words = [
            code[key] if key in code else str(value) if key in groups
            else f"{last_part(key) if ends[last_part(key)] == 1 else key}={as_typed(value)}"
            for key, value in part.items() if key not in own
        ]  # fmt: skip
        label = printable(" ".join(dict.fromkeys(words)) or groups.get("norm", "all runs"), LONGEST_LABEL)
        while label in labels:
            label += "'"
        labels.append(label)
    return labels


def last_part(key: str) -> str:
    """The last part of a dotted key."""
    return key.split(".")[-1]


def find_key(records: Sequence[RunRecord], wanted: str) -> str:
    """Return the dotted key that is ``wanted`` or ends in it; `UserError` unless there is exactly one."""
    keys = dict.fromkeys(key for run in records for key in numbers(run.config))
    fits = [wanted] if wanted in keys else [key for key in keys if last_part(key) == wanted]
    if len(fits) == 1:
        return fits[0]
    close = fits or difflib.get_close_matches(wanted, keys, n=1, cutoff=0.8)
    choices = dict.fromkeys([*close, *tried_settings(records)]) or keys
    what = f"{len(fits)} settings of these runs end in it" if fits else "no setting of these runs"
    raise UserError(f"best over {wanted}: {what}; choose among {', '.join(choices)}")


def tried_settings(records: Sequence[RunRecord]) -> list[str]:
    """The settings that have several values among the runs, and whose values can be ranked."""
    columns = varying([numbers(run.config) for run in records])
    given = {key: {repr(value) for value in column if value is not None} for key, column in columns.items()}
    return [key for key, values in given.items() if len(values) > 1 and can_be_ranked(key)]


def can_be_ranked(key: str) -> bool:
    """Whether one value of the setting can be better than another: all see the same images and as many readings."""
    has_other_images = key == "vary" or (key.startswith("data.") and key not in VIEWS)
    return key != "eval_every" and last_part(key) != "_target_" and not has_other_images
