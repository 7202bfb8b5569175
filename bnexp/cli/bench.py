"""``bnexp bench``: compares every implementation of batch norm with float64 and times it."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from bnexp.bench.results import check_results_folder
from bnexp.bench.settings import BENCH_CHOICES, BenchSettings
from bnexp.config.choices import choices
from bnexp.errors import UserError, nearest

Schema = TypeVar("Schema")
BENCH_USAGE = """usage: bnexp bench [setting=value] ...

Compares every implementation of batch norm with float64, then times those that agree with it.

  set=quick       {set}
  dtype=float32   {dtype} (parameters and statistics stay float32)
  layout=nchw     {layout} (channels_last)
  device=auto     auto, cpu, cuda or cuda:N
  rounds=3        timed turns of every implementation, each through all rotating buffers
  out=DIR         for bench.csv and bench.json; a new folder under outputs/ by default"""


def bench(arguments: list[str]) -> int:
    """Compare every implementation of batch norm in ``conf/norm`` with float64, and time those that agree."""
    if arguments[:1] == ["loop"]:
        raise UserError(
            "bench loop: the training loop is measured by a script of the repository; "
            "run python tests/bench/loop.py [setting=value] ... there"
        )
    if {"-h", "--help"} & set(arguments):
        print(BENCH_USAGE.format(**{key: " | ".join(values) for key, values in BENCH_CHOICES.items()}))
        return 0
    words = arguments[1:] if arguments[:1] == ["norms"] else arguments
    settings = read_settings("bench", words, BenchSettings, BENCH_CHOICES)
    if settings.out:
        check_results_folder(Path(settings.out))

    from bnexp.bench.benchmark import run_benchmark
    from bnexp.config import parts
    from bnexp.config.compose import composed
    from bnexp.norms.base import BatchNormBase

    norms = {name: parts.part(composed([f"norm={name}"]), "norm") for name in choices("norm")}
    batch_norms = {
        name: norm for name, norm in norms.items()
        if isinstance(norm.func, type) and issubclass(norm.func, BatchNormBase) and norm.func.implements_batch_norm
    }  # fmt: skip
    run_benchmark(batch_norms, settings, parts.find_device(settings.device), shlex.join(["bnexp", "bench", *arguments]))
    return 0


def read_settings(
    command: str, words: Sequence[str], schema: type[Schema], allowed: Mapping[str, Collection[str]]
) -> Schema:
    """Return ``schema`` with the values of ``words``, each ``setting=value``; other settings keep their defaults.

    ``schema`` is a dataclass with fields of str, int (a count, 1 or more), or a list of these, whose values are
    separated by commas. ``allowed`` holds the allowed values by setting. Raises :class:`UserError` for bad words.
    """
    settings = OmegaConf.structured(schema)
    given: set[str] = set()
    for word in words:
        key, _, value = word.partition("=")
        if key not in settings:
            near = nearest(key, settings)
            raise UserError(f"{word}: no setting of {command}{near}; settings are {', '.join(settings)}")
        if not value:
            raise UserError(f"{word}: has no value; give one as {key}=VALUE")
        if key in given:
            raise UserError(f"{word}: {key} is given twice; give it once")
        given.add(key)
        is_list = OmegaConf.is_list(settings[key])
        values = value.split(",") if is_list else [value]
        check_values(word, values, allowed.get(key, values))
        try:
            settings = OmegaConf.merge(settings, {key: values if is_list else value})
            counts = [count for count in (settings[key] if is_list else [settings[key]]) if isinstance(count, int)]
        except ValidationError:
            counts = [0]
        if any(count < 1 for count in counts):
            what = "whole numbers, with commas between them," if is_list else "a whole number,"
            raise UserError(f"{word}: has to be {what} 1 or more")
    return OmegaConf.to_object(settings)


def check_values(word: str, values: Sequence[str], allowed: Collection[str]) -> None:
    """Raise :class:`UserError` for a value of ``word`` that is not allowed, is repeated, or is OmegaConf's syntax."""
    for value in values:
        if value not in allowed:
            raise UserError(f"{word}: {value} is not known{nearest(value, allowed)}; choose {', '.join(allowed)}")
        if "${" in value or value == "???":
            raise UserError(f"{word}: ${{...}} and ??? have a meaning of their own in settings; give another value")
    if len(set(values)) < len(values):
        raise UserError(f"{word}: holds a value twice; give each once")
