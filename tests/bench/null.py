"""How often does a report claim a difference where there is none, and how wide are its intervals really?

    BNEXP_DATA=... python tests/bench/null.py [runs=60] [draws=1000] [setting=value] ...

Trains one variant with many seeds. Of these runs, groups are drawn that play the baseline and the variants: a norm
against itself. The shares of reports with a false verdict, of false speed-ups, and the mean speed-up are printed.
Then numbers of a normal distribution show how often the printed intervals cover what is true.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from bnexp.cli.main import main as bnexp
from bnexp.report import inference, stats
from bnexp.report.plan import seeds_needed
from bnexp.report.records import RunRecord, read_runs
from bnexp.report.verdict import compare_records

USUAL = ("model=mlp", "norm=library", "epochs=4", "eval_every=10", "threads=1", "quiet=true")
VERDICTS = ("better", "worse", "better where both finish", "worse where both finish")


def trained(folder: Path, runs: int, words: Sequence[str] = ()) -> list[RunRecord]:
    """Runs of one variant, which differ in the seed."""
    assert bnexp(["train", "-m", *USUAL, *words, f"seed=range({runs})", f"out={folder}"]) == 0
    return read_runs([folder])[0]


def null_reports(
    records: Sequence[RunRecord], n: int, num_variants: int, draws: int, seed: int = 0
) -> dict[str, float]:
    """Shares of ``draws`` reports on ``num_variants`` variants of ``n`` seeds that are all the baseline."""
    rng, found, ratios = np.random.default_rng(seed), Counter(), []
    for _ in range(draws):
        chosen = iter(rng.permutation(len(records))[: n * (num_variants + 1)])
        played = []
        for variant in range(num_variants + 1):
            for i in range(n):
                run = records[next(chosen)]
                norm = run.config["norm"] | {"eps": 1e-5 * (variant + 1)}  # a name; what was trained is the same
                played.append(replace(run, config=run.config | {"seed": i, "norm": norm}, started=float(variant)))
        comparison = compare_records(played)
        words = [evidence.word for evidence in comparison.evidence.values()]
        found["false"] += any(word in VERDICTS for word in words)
        found["equivalent"] += words.count("equivalent") / num_variants
        for speed in comparison.speedups.values():
            found[speed.evidence] += 1 / num_variants
            ratios += [math.log(speed.ratio)] if speed.ratio else []
    shares = {key: found[key] / draws for key in ("false", "equivalent", "faster", "slower")}
    return shares | {"ratio": math.exp(fmean(ratios)) if ratios else math.nan}


def coverage(n: int, num_variants: int, draws: int, seed: int = 0) -> dict[str, float]:
    """Shares of ``draws`` in which the interval of a mean, of a difference and of all differences cover the truth."""
    rng, found = np.random.default_rng(seed), Counter()
    for _ in range(draws):
        shared = rng.normal(size=n) * 0.3
        base, *others = rng.normal(size=(num_variants + 1, n)) + shared
        mean, first = stats.mean(list(others[0])), stats.paired_difference(list(others[0]), list(base))
        found["mean"] += mean.low <= 0 <= mean.high
        found["difference"] += first.low <= 0 <= first.high
        each = [stats.paired_difference(list(other), list(base)) for other in others]
        ends = [one.interval(1 - inference.ALPHA / num_variants) for one in each]
        found["together"] += all(low <= 0 <= high for low, high in ends)
    return {key: found[key] / draws for key in ("mean", "difference", "together")}


def power(difference: float, draws: int, seed: int = 0) -> tuple[int, float]:
    """The seeds that `bnexp plan` asks for to find a difference of normal gains, and how often they do."""
    n = int(seeds_needed(1.0, difference, inference.ALPHA))
    gains = np.random.default_rng(seed).normal(difference, 1.0, size=(draws, n))
    return n, fmean(stats.paired_difference(list(row), [0.0] * n).p < inference.ALPHA for row in gains)


def main(words: Sequence[str]) -> None:
    """Print the tables."""
    given = dict(word.split("=", 1) for word in words if word.startswith(("runs=", "draws=")))
    runs, draws = int(given.get("runs", 60)), int(given.get("draws", 1000))
    others = [word for word in words if word.partition("=")[0] not in ("runs", "draws")]
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        records = trained(Path(folder) / "null", runs, others)
    print("variants  n  false  equivalent  faster  slower  speed-up")
    for num_variants in (1, 4):
        for n in (3, 5, 10):
            row = null_reports(records, n, num_variants, draws)
            print(
                f"{num_variants:8d} {n:2d} " + " ".join(f"{100 * row[key]:7.1f}%" for key in list(row)[:4]),
                f"{row['ratio']:8.3f}",
            )
    print("variants  n   mean  difference  together")
    for num_variants in (1, 4):
        for n in (3, 5, 10):
            row = coverage(n, num_variants, 4 * draws)
            print(f"{num_variants:8d} {n:2d} " + " ".join(f"{100 * value:7.1f}%" for value in row.values()))
    for difference in (2.0, 1.0, 0.5):
        n, share = power(difference, 4 * draws)
        print(f"difference of {difference:g} standard deviations: {n} seeds find it in {share:.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
