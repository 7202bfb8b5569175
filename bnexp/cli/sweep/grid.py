"""Expands a command line with lists of values into the jobs of a sweep.

A sweep is a folder with one run folder per job and ``sweep.json``, which lists the jobs. A process that is started on
it, for the first time, again or beside others, learns from the folder alone what is left: a job is done when its
``status.json`` says so, and taken while a living process holds its lock.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import RangeSweep

from bnexp.config.choices import GROUPS
from bnexp.config.compose import plain_value, typed, values_of
from bnexp.config.explain import check_words, parse_words
from bnexp.errors import UserError

MOST_JOBS, LONGEST_NAME = 10_000, 150  # bytes of a folder's name


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its name, its variant (the name without the seed), its overrides, its folder."""

    name: str
    variant: str
    overrides: tuple[str, ...]
    folder: Path

    @property
    def arguments(self) -> list[str]:
        """The overrides and the folder, as Hydra's grammar wants them."""
        return [*self.overrides, f"out='{self.folder}'"]


@dataclass(frozen=True)
class Grid:
    """The jobs of a command line: the ``swept`` keys in order, and each job's overrides (``points``) and name."""

    swept: tuple[str, ...]
    points: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    variants: tuple[str, ...]
    out: str | None
    hydra: tuple[str, ...]

    def jobs(self, folder: Path) -> list[Job]:
        rows = zip(self.names, self.variants, self.points, strict=True)
        return [Job(name, variant, point, folder / name) for name, variant, point in rows]


def expand(arguments: Sequence[str], config_loader: object = None) -> Grid:
    """Read overrides in Hydra's grammar (``a,b``, ``range(5)``, ``choice(...)``, ``glob(*)``) into jobs.

    ``sweep_order=product`` crosses all lists, ``sweep_order=zip`` pairs them by position; seeds are crossed with
    everything either way.
    """
    fixed: list[str] = []
    lists: dict[str, list[str]] = {}
    out, order, ours = None, "product", []
    for override in parse_words(arguments, config_loader):
        key = override.get_key_element()
        if key.startswith("hydra"):
            ours.append(override.input_line)
        elif override.is_sweep_override():
            if key in ("out", "sweep_order"):
                raise UserError(f"{override.input_line}: belongs to the sweep as a whole; give one value")
            if not override.is_discrete_sweep():
                raise UserError(f"{override.input_line}: not a list of values; write {key}=a,b or {key}=range(0,5)")
            value = override.value()
            if isinstance(value, RangeSweep) and abs(value.stop - value.start) > MOST_JOBS * abs(value.step):
                raise UserError(f"{override.input_line}: more than {MOST_JOBS:,} values; give fewer")
            lists[key] = values_of(override)
            if not lists[key]:
                raise UserError(f"{override.input_line}: an empty list, so there is nothing to do; give values")
        elif key == "out":
            out = plain_value(override)
            if out and re.search(r"['\"\\]|\$\{", out):  # Hydra's launchers would read them differently
                raise UserError(f"{override.input_line}: quotes, \\ and ${{}} cannot be in a sweep's folder name")
        elif key == "sweep_order":
            order = str(override.value())
        else:
            fixed.append(typed(override))
            lists.pop(key, None)  # as in Hydra, the last word counts
    if (count := math.prod(map(len, lists.values()))) > MOST_JOBS and order == "product":
        raise UserError(f"these lists make {count:,} runs together, more than {MOST_JOBS:,}; give fewer values")
    check_words(ours)
    combinations = _combine(lists, order)
    points = tuple((*fixed, *(f"{key}={value}" for key, value in each.items())) for each in combinations)
    names: list[str] = []
    for values in combinations:
        name = _name(values)
        others = (f"{name}-{n}" for n in itertools.count(1))
        names.append(next(each for each in itertools.chain([name], others) if each not in names))
    variants = tuple(_name({k: v for k, v in values.items() if k != "seed"}) for values in combinations)
    out = out and str(Path(out).expanduser())
    return Grid(tuple(lists), points, tuple(names), variants, out, tuple(ours))


def _combine(lists: dict[str, list[str]], order: str) -> list[dict[str, str]]:
    if order == "product":
        return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    if order != "zip":
        raise UserError(f"sweep_order={order}: not known; choose product or zip")
    paired = {key: values for key, values in lists.items() if key != "seed"}
    lengths = {key: len(values) for key, values in paired.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise UserError(f"sweep_order=zip: lists of the same length are paired, but {found}; give as many of each")
    rows = [dict(zip(paired, values, strict=True)) for values in zip(*paired.values(), strict=True)] or [{}]
    return [row | {"seed": seed} for row in rows for seed in lists["seed"]] if "seed" in lists else rows


def _name(values: dict[str, str]) -> str:
    """``none-s0``: the values that vary, after the last part of their key where the value alone is not clear."""
    parts = []
    for key, value in values.items():
        prefix = "" if key.lstrip("+") in GROUPS else "s" if key == "seed" else key.rpartition(".")[2]
        parts.append(prefix + re.sub(r"[^\w.+-]+", "_", value).strip("_"))
    name = "-".join(parts).strip(".") or "run"
    if len(name.encode()) > LONGEST_NAME:  # what sets it apart may stand at its end
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
    return name


def read_grid(words: Sequence[str]) -> Grid:
    """:func:`expand` the words of a command line, inside a session."""
    return expand(words, GlobalHydra.instance().config_loader())
