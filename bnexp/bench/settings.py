"""The settings of ``bnexp bench`` and the values that they can have; imports neither torch nor OmegaConf."""

from collections.abc import Sequence
from dataclasses import dataclass

from bnexp.bench.cases import SETS

BENCH_CHOICES = {"set": tuple(SETS), "dtype": ("float32", "bfloat16", "float16"), "layout": ("nchw", "nhwc")}


@dataclass(frozen=True)
class BenchSettings:
    """What ``bnexp bench`` measures, and where it writes; ``rounds`` is the number of turns that are timed.

    ``contestants`` are the names of the implementations to measure; all by default.
    """

    set: str = "quick"
    dtype: str = "float32"
    layout: str = "nchw"
    device: str = "auto"
    rounds: int = 3
    contestants: Sequence[str] = ()
    out: str | None = None
