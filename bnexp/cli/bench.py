"""``bnexp bench``: compares every implementation of batch norm with float64 and times it."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from bnexp.bench.results import check_results_folder
from bnexp.bench.settings import BENCH_CHOICES, BenchSettings
from bnexp.config.choices import choices
from bnexp.errors import UserError, home_path, nearest

BENCH_USAGE = """usage: bnexp bench [setting=value] ...

Compares every implementation of batch norm with float64, then times those that agree with it.

  set=quick       {set}
  dtype=float32   {dtype} (parameters and statistics stay float32)
  layout=nchw     {layout} (channels_last)
  device=auto     auto, cpu, cuda or cuda:N
  rounds=3        timed turns of every implementation, each through all rotating buffers
  contestants=... names of implementations, with commas between them; all by default
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
    settings = read_settings(words)
    if settings.out:
        check_results_folder(Path(settings.out))

    from bnexp.bench.benchmark import run_benchmark
    from bnexp.config import parts
    from bnexp.config.compose import composed
    from bnexp.norms.base import BatchNormBase

    norms = {name: parts.part(composed([f"norm={name}"]), "norm") for name in choices("norm") if name != "own"}
    batch_norms = {
        name: norm for name, norm in norms.items()
        if isinstance(norm.func, type) and issubclass(norm.func, BatchNormBase) and norm.func.implements_batch_norm
    }  # fmt: skip
    run_benchmark(batch_norms, settings, parts.find_device(settings.device), shlex.join(["bnexp", "bench", *arguments]))
    return 0


def read_settings(words: Sequence[str]) -> BenchSettings:
    """The settings in ``words``, each ``setting=value``; the others have their defaults.

    Raises :class:`UserError` for an unknown or repeated setting and for a value that it cannot have.
    """
    names = [field.name for field in fields(BenchSettings)]
    settings: dict[str, str | int | list[str]] = {}
    for word in words:
        key, _, value = word.partition("=")
        allowed = BENCH_CHOICES.get(key, (value,))
        if key not in names:
            raise UserError(f"{word}: no setting of bench{nearest(key, names)}; settings are {', '.join(names)}")
        if not value:
            raise UserError(f"{word}: has no value; give one as {key}=VALUE")
        if key in settings:
            raise UserError(f"{word}: {key} is given twice; give it once")
        if value not in allowed:
            raise UserError(f"{word}: {value} is not known{nearest(value, allowed)}; choose {', '.join(allowed)}")
        if "${" in value:
            raise UserError(f"{word}: ${{...}} is not looked up in settings of bench; write the value itself")
        settings[key] = value.split(",") if key == "contestants" else value
        if key == "rounds":
            settings[key] = read_count(word, value)
    if "out" in settings:
        settings["out"] = str(home_path(settings["out"], "out="))
    return BenchSettings(**settings)


def read_count(word: str, value: str) -> int:
    """The whole number, 1 or more, that ``value`` spells; :class:`UserError` naming ``word`` if it spells none."""
    with suppress(ValueError):
        if (count := int(value)) > 0:
            return count
    raise UserError(f"{word}: has to be a whole number, 1 or more")
