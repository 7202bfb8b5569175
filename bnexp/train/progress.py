"""What a person sees of a run, or of a comparison, while it trains."""

from collections.abc import Callable, Sequence
from time import perf_counter

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from bnexp.train.run import Run

SHOWN_SPLITS = ("train", "train_eval", "valid", "test")


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
            print(f"{self.name}  {progress_line(run, self.latest)}", flush=True)

    def end(self, run: Run, status: str) -> None:
        if status != "finished":
            print(f"{self.name}  {status} at step {run.num_steps}", flush=True)


class LiveProgress(NullProgress):
    """A bar that moves and a table at the end, for a terminal."""

    def __init__(self, name: str, console: Console, in_sweep: bool) -> None:
        self.name = name
        self.in_sweep = in_sweep
        self.console = console
        self.latest: dict[str, float] = {}
        self.shown_at = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), TaskProgressColumn(),
            TimeRemainingColumn(compact=True), TextColumn("{task.fields[state]}"),
            console=console, refresh_per_second=3, transient=True,
        )  # fmt: skip

    def start(self, run: Run) -> None:
        self.task = self.bar.add_task(self.name, total=run.total_steps, completed=run.num_steps, state="")
        self.bar.start()

    def update(self, run: Run, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        now = perf_counter()
        if metrics or now - self.shown_at > 0.2:
            self.shown_at = now
            self.bar.update(self.task, completed=run.num_steps, state=progress_line(run, self.latest))

    def end(self, run: Run, status: str) -> None:
        self.bar.stop()
        if self.in_sweep:  # a sweep prints one table at its end
            self.console.print(f"{self.name}  {status}  {progress_line(run, self.latest)}", highlight=False)
            return
        self.console.print(f"{self.name}: {status} after {run.num_steps:,} steps, {run.seconds:.1f} s", highlight=False)
        table = Table()
        for column in ("", "loss", "accuracy"):
            table.add_column(column, justify="right" if column else "left")
        for split in SHOWN_SPLITS:
            if (loss := self.latest.get(f"loss/{split}")) is not None:
                table.add_row(split, f"{loss:.4f}", f"{self.latest[f'accuracy/{split}']:.2%}")
        self.console.print(table)


class LiveTable:
    """A table that is redrawn on a terminal; elsewhere it is printed as a line at every milestone."""

    def __init__(self, columns: Sequence[str], *, quiet: bool) -> None:
        self.columns = columns
        self.quiet = quiet
        self.live = Live(refresh_per_second=5, transient=True)
        self.is_drawn = self.live.console.is_terminal and not quiet
        self.began = self.shown_at = perf_counter()
        self.first_step: int | None = None

    def __enter__(self) -> "LiveTable":
        if self.is_drawn:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def update(self, step: int, total: int, is_milestone: bool, rows: Callable[[], list[list[str]]]) -> None:
        """Show ``rows()`` at ``step`` of ``total``: at a milestone and, on a terminal, every 0.2 s."""
        now = perf_counter()
        self.first_step = step if self.first_step is None else self.first_step
        if self.quiet or not (is_milestone or (self.is_drawn and now - self.shown_at > 0.2)):
            return
        self.shown_at = now
        speed = (step - self.first_step) / (now - self.began)
        left = f", {(total - step) / speed:,.0f} s left" if speed and step < total else ""
        title = f"step {step:,}/{total:,}{left}"
        if not self.is_drawn:
            shown = ";  ".join(" ".join(cell for cell in row if cell) for row in rows())
            print(f"{title}:  {shown}", flush=True)
            return
        table = Table(title=title, title_justify="left")
        for column in self.columns:
            table.add_column(column, justify="right" if column else "left")
        for row in rows():
            table.add_row(*row)
        self.live.update(table)


def progress_line(run: Run, latest: dict[str, float]) -> str:
    """Where the run is, in one line."""
    num_epochs = run.total_steps / run.batches.steps_per_epoch
    parts = [f"epoch {run.epoch:.3g}/{num_epochs:.3g}", f"step {run.num_steps}/{run.total_steps}"]
    if "throughput/images_per_s" in latest:
        parts.append(f"{latest['throughput/images_per_s']:,.0f} images/s")
    for split in ("train", "valid", "test"):
        if f"loss/{split}" in latest:
            parts.append(f"{split} {latest[f'loss/{split}']:.4f} {latest[f'accuracy/{split}']:.2%}")
    return "  ".join(parts)


def make_progress(name: str, *, quiet: bool, in_sweep: bool = False) -> NullProgress:
    """The progress for stdout: a bar on a terminal, lines elsewhere, nothing if ``quiet``."""
    console = Console()
    if quiet:
        return NullProgress()
    return LiveProgress(name, console, in_sweep) if console.is_terminal else PlainProgress(name)
