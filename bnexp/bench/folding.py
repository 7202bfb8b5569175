"""Many small runs as one (``replicas``) beside the same runs one after the other, both captured."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from bnexp.bench.epochs import Case, Make, training_only
from bnexp.bench.goals import FOLDED, Row, ratio
from bnexp.bench.turns import Stopwatch, in_turns
from bnexp.engines.fold import Fold
from bnexp.engines.graph_fold import CapturedStack
from bnexp.train.run import Run


def fold_rows(
    make: Make, case: Case, rounds: int, device: torch.device, num_runs: int = 32, engine: str = "graph"
) -> list[Row]:
    """Seconds until each of the runs has had an epoch: one after the other with ``engine``, and folded, with it too."""

    def runs(engine: str) -> list[Run]:
        made = (make([*case.overrides, f"engine={engine}", f"seed={seed}"])[0] for seed in range(num_runs))
        return [training_only(run, case.num_steps) for run in made]

    apart, together = runs(engine), runs(engine)
    fold = Fold(CapturedStack if engine == "graph" else None)

    def epoch(groups: Sequence[Sequence[Run]], step: Callable[[Sequence[Run]], None]) -> float:
        """``step(group)`` to the end of an epoch, one group after the other."""
        watch = Stopwatch(device)
        with watch.running():
            for group in groups:
                for run in group:
                    run.num_steps = 0
                for _ in range(case.num_steps):
                    step(group)
                for run in group:
                    run.meter.read()
        return watch.epoch(case.scale).clock

    in_turn = f"in turn, {engine}"
    contestants = {
        in_turn: partial(epoch, [[run] for run in apart], lambda runs: runs[0].step()),
        FOLDED: partial(epoch, [together], fold.step),
    }
    found = in_turns(contestants, rounds)
    fields = {"model": case.model, "batch_size": case.batch_size}
    slow, fast = (Row("fold", name, "s", found[name], **fields) for name in contestants)
    return [slow, fast, ratio(slow, fast)]
