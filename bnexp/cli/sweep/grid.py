"""Expands a command line with lists of values into the jobs of a sweep.

A sweep is a folder with one run folder per job and ``sweep.json``, which lists the jobs. A job is done when its
``status.json`` says so, and taken while a living process holds its lock. Therefore the same command can be repeated
after an interruption, or started in several processes that share the jobs.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import RangeSweep
from omegaconf import DictConfig

from bnexp.config.choices import GROUPS, entries
from bnexp.config.compose import composed, typed, values_of
from bnexp.config.explain import check_words, is_hydras, parse_words
from bnexp.errors import UserError
from bnexp.store.settings import names_code, short_name

MOST_JOBS, LONGEST_NAME = 10_000, 150  # bytes of a folder's name


class Point(NamedTuple):
    """One combination of a sweep's values: its name, its variant (the name without the seed) and its overrides."""

    name: str
    variant: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a sweep: a :class:`Point`, the run's folder and its composed config."""

    name: str
    variant: str
    overrides: tuple[str, ...]
    folder: Path
    cfg: DictConfig

    @property
    def arguments(self) -> list[str]:
        """The overrides and the folder in Hydra's grammar."""
        return [*self.overrides, f"out='{self.folder}'"]


@dataclass(frozen=True)
class Grid:
    """What a command line asks for: the keys with several values, all combinations of these, ``out``, Hydra's words."""

    swept: tuple[str, ...]
    points: tuple[Point, ...]
    out: str | None
    hydra: tuple[str, ...]


def read_grid(words: Sequence[str]) -> Grid:
    """Expand overrides in Hydra's grammar (``a,b``, ``range(5)``, ``choice(...)``, ``glob(*)``), inside a session.

    ``sweep_order=product`` crosses all lists, ``sweep_order=zip`` pairs them by position. Both cross the seeds with
    everything else.
    """
    fixed: list[str] = []
    lists: dict[str, list[str]] = {}
    written: dict[str, str] = {}  # the keys of the lists with their prefixes
    once, hydra = [], []
    for override in parse_words(words, GlobalHydra.instance().config_loader()):
        key, word = override.key_or_group, override.input_line
        if is_hydras(key):
            hydra.append(word)
        elif override.is_sweep_override():
            if key in ("out", "sweep_order"):
                raise UserError(f"{word}: belongs to the sweep as a whole; give one value")
            if not override.is_discrete_sweep():
                raise UserError(f"{word}: not a list of values; write {key}=a,b or {key}=range(0,5)")
            value = override.value()
            if isinstance(value, RangeSweep) and abs(value.stop - value.start) > MOST_JOBS * abs(value.step):
                raise UserError(f"{word}: more than {MOST_JOBS:,} values; give fewer")
            lists[key], written[key] = values_of(override), override.get_key_element()
            if not lists[key]:
                raise UserError(f"{word}: an empty list makes no runs; give values")
        elif key in ("out", "sweep_order"):
            once.append(override)
        else:
            fixed.append(typed(override))
            lists.pop(key, None)  # as in Hydra, the last word counts
    firsts = [f"{written[key]}={values[0]}" for key, values in lists.items()]
    groups = [word for word in (*fixed, *firsts) if word.lstrip("+~").partition("=")[0] in GROUPS]
    cfg = composed([*groups, *(each.input_line for each in once)])  # a main config can give both
    out, order = cfg.get("out"), cfg.get("sweep_order", "product")
    for text in [out or "", *(str(each.value()) for each in once)]:
        if re.search(r"['\"\\]|\$\{", text):  # Hydra's launchers would read them differently
            raise UserError(f"out={text}: a sweep's folder cannot have quotes, \\ or ${{}} in its name; choose another")
    sizes = [len(values) for key, values in lists.items() if key != "seed"]
    per_seed = math.prod(sizes) if order == "product" else max(sizes, default=1)
    if (count := per_seed * len(lists.get("seed", [""]))) > MOST_JOBS:
        raise UserError(f"these lists make {count:,} runs together, more than {MOST_JOBS:,}; give fewer values")
    check_words(hydra)
    points: dict[str, Point] = {}
    codes = {key.partition(".")[0]: value for key, value in (word.split("=", 1) for word in fixed if "=" in word)
             if names_code(key)}  # fmt: skip
    for values in _combine(lists, order):
        shown = {key: short_name(codes[key]) if concerns_code(key, value) and key in codes else value
                 for key, value in values.items()}  # fmt: skip
        name = _name(shown)
        names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(1)))
        name = next(each for each in names if each not in points)
        variant = _name({key: value for key, value in shown.items() if key != "seed"})
        own = [word for word in fixed if concerns(word, values)]
        points[name] = Point(name, variant, (*own, *(f"{written[key]}={value}" for key, value in values.items())))
    return Grid(tuple(lists), tuple(points.values()), out, tuple(hydra))


def concerns(word: str, values: dict[str, str]) -> bool:
    """Whether the word is for a job with these ``values``: ``norm.path=...`` is not for the job of ``norm=library``.

    That is so for options that name the code of an entry, where several entries are given.
    """
    group, option, *_ = *word.lstrip("+").partition("=")[0].split("."), ""
    return option not in ("path", "name", "args") or group not in values or concerns_code(group, values[group], option)


def concerns_code(group: str, entry: str, option: str = "args") -> bool:
    """Whether the entry of a group stands for code that another option names: ``norm=own``, ``model=torchvision``."""
    return option in entries(group).get(entry, {}) if group in GROUPS else False


def _combine(lists: dict[str, list[str]], order: str) -> list[dict[str, str]]:
    """The combinations of the lists' values, in the order ``product`` or ``zip``."""
    if order == "product":
        return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    paired = {key: values for key, values in lists.items() if key != "seed"}
    lengths = {key: len(values) for key, values in paired.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise UserError(f"sweep_order=zip: lists of the same length are paired, but {found}; give as many of each")
    rows = [dict(zip(paired, values, strict=True)) for values in zip(*paired.values(), strict=True)] or [{}]
    return [row | {"seed": seed} for row in rows for seed in lists["seed"]] if "seed" in lists else rows


def _name(values: dict[str, str]) -> str:
    """``none-s0``: the values that vary, each after the last part of its key unless the key is a group."""
    parts = []
    for key, value in values.items():
        prefix = "" if key.lstrip("+") in GROUPS else "s" if key == "seed" else key.rpartition(".")[2]
        if names_code(key):
            prefix, value = "", short_name(value)
        parts.append(prefix + re.sub(r"[^\w.+-]+", "_", value).strip("_"))
    name = "-".join(parts).strip(".") or "run"
    if len(name.encode()) > LONGEST_NAME:  # two long names may differ only in the part that is cut off
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
    return name
