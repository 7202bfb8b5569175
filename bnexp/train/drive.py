"""Several runs in lockstep: every run takes step k before any takes k + 1, and the differences are seen live."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter

from bnexp.errors import StorageError
from bnexp.train.interrupt import HURRY, Interrupted, OutOfPatience, deferred_signals
from bnexp.train.loop import Plan, follow
from bnexp.train.recorder import Journal
from bnexp.train.run import Run


@dataclass
class Contestant:
    """A run that takes part: which variant with which seed, how far it is, what it last measured."""

    variant: str
    seed: int
    run: Run
    journal: Journal
    plan: Plan
    latest: dict[str, float] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.steps = follow(self.run, self.plan, self.journal, self.ended)

    @property
    def is_running(self) -> bool:
        return not self.ended

    def step(self) -> None:
        """One step; a run that fails ends here, and its journal says why."""
        try:
            self.latest |= next(self.steps, {})
        except StorageError as error:
            print(f"bnexp: error: {error}", file=sys.stderr)
        except Exception:
            assert self.ended["status"] == "failed"


def lockstep(contestants: Sequence[Contestant]) -> Iterator[int]:
    """Advance all of them to their ends; yields the step that all who still run have taken.

    Those that are behind, because they go on from an earlier checkpoint, go first. Ctrl-C ends every run
    with a checkpoint and raises KeyboardInterrupt.
    """
    try:
        with deferred_signals() as asked:
            while running := [each for each in contestants if each.is_running]:
                step = min(each.run.num_steps for each in running)
                with suppress(OutOfPatience):  # which ended the run whose turn it was
                    for each in running:
                        is_late = asked and perf_counter() - asked[0] > HURRY and not each.run.is_ahead
                        if each.run.num_steps == step and not is_late:
                            each.step()
                if asked:
                    interrupt(contestants)
                if any(each.run.num_steps > step for each in running):  # after its last step a run only ends
                    yield step + 1
            if asked:
                raise Interrupted
    finally:
        for each in contestants:
            each.steps.close()


def interrupt(contestants: Sequence[Contestant]) -> None:
    """End every run where it is, with a checkpoint."""
    for each in contestants:
        if each.is_running:
            try:
                each.steps.throw(Interrupted())
            except Interrupted:
                continue
            except StorageError as error:
                print(f"bnexp: error: {error}", file=sys.stderr)
    raise Interrupted



COLUMNS = ("", "runs", "loss/train", "loss/valid", "accuracy/valid", "difference")


def standings(contestants: Sequence[Contestant]) -> list[list[str]]:
    """A row per variant, the first one the baseline: means over its runs of what each last measured, and the
    mean difference in validation accuracy to the baseline's runs of the same seeds."""
    variants = list(dict.fromkeys(each.variant for each in contestants))
    accuracy = {(each.variant, each.seed): each.latest.get("accuracy/valid") for each in contestants}
    rows = []
    for variant in variants:
        own = [each for each in contestants if each.variant == variant]
        cells = [variant, str(len(own))]
        for tag in COLUMNS[2:5]:
            values = [each.latest[tag] for each in own if tag in each.latest]
            mean = sum(values) / len(values) if values else None
            cells.append("" if mean is None else f"{mean:.2%}" if tag.startswith("accuracy") else f"{mean:.4f}")
        pairs = [(accuracy[variant, each.seed], accuracy.get((variants[0], each.seed))) for each in own]
        gaps = [mine - base for mine, base in pairs if mine is not None and base is not None]
        cells.append(f"{100 * sum(gaps) / len(gaps):+.2f} points" if gaps and variant != variants[0] else "")
        rows.append(cells)
    return rows
