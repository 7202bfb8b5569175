"""The rich door: what a person sees of a run while it goes on."""

from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from bnexp.run import Run

SPLITS = ("train", "train_eval", "valid", "test")


class NullProgress:
    """Shows nothing."""

    def start(self, run: Run) -> None:
        pass

    def update(self, run: Run, metrics: dict[str, float]) -> None:
        pass

    def end(self, run: Run, status: str) -> None:
        pass


class PlainProgress(NullProgress):
    """One line per epoch, for logs and pipes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.latest: dict[str, float] = {}

    def update(self, run: Run, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        is_epoch_end = run.num_steps % run.batches.steps_per_epoch == 0
        if is_epoch_end or run.num_steps == run.total_steps:
            print(f"{self.name}  {describe(run, self.latest)}", flush=True)

    def end(self, run: Run, status: str) -> None:
        if status != "finished":
            print(f"{self.name}  {status} at step {run.num_steps}", flush=True)


class LiveProgress(NullProgress):
    """A bar that moves and a table at the end, for a terminal."""

    def __init__(self, name: str, console: Console) -> None:
        self.name = name
        self.console = console
        self.latest: dict[str, float] = {}
        self.shown_at = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
            TextColumn("{task.fields[state]}"), TimeRemainingColumn(compact=True),
            console=console, refresh_per_second=5, transient=True,
        )  # fmt: skip

    def start(self, run: Run) -> None:
        self.task = self.bar.add_task(self.name, total=run.total_steps, completed=run.num_steps, state="")
        self.bar.start()

    def update(self, run: Run, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        now = perf_counter()
        if metrics or now - self.shown_at > 0.2:
            self.shown_at = now
            self.bar.update(self.task, completed=run.num_steps, state=describe(run, self.latest))

    def end(self, run: Run, status: str) -> None:
        self.bar.stop()
        table = Table(title=f"{self.name}: {status} after {run.num_steps:,} steps, {run.seconds:.1f} s")
        for column in ("", "loss", "accuracy"):
            table.add_column(column, justify="right" if column else "left")
        for split in SPLITS:
            if (loss := self.latest.get(f"loss/{split}")) is not None:
                table.add_row(split, f"{loss:.4f}", f"{self.latest[f'accuracy/{split}']:.2%}")
        self.console.print(table)


def describe(run: Run, latest: dict[str, float]) -> str:
    """Where the run is, in one line."""
    num_epochs = run.total_steps / run.batches.steps_per_epoch
    parts = [f"epoch {run.epoch:.3g}/{num_epochs:.3g}", f"step {run.num_steps}/{run.total_steps}"]
    if "throughput/images_per_s" in latest:
        parts.append(f"{latest['throughput/images_per_s']:,.0f} images/s")
    for split in ("train", "valid", "test"):
        if f"loss/{split}" in latest:
            parts.append(f"{split} {latest[f'loss/{split}']:.4f} {latest[f'accuracy/{split}']:.2%}")
    return "  ".join(parts)


def make_progress(name: str, *, quiet: bool, console: Console | None = None) -> NullProgress:
    """The progress that suits where stdout goes."""
    console = console or Console()
    if quiet:
        return NullProgress()
    return LiveProgress(name, console) if console.is_terminal else PlainProgress(name)
