"""Progress on stdout: of one run, and of the runs of a comparison."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from bnexp.train.loop import Loop

SHOWN_SPLITS = ("train", "train_eval", "valid", "test")
SHOW_EVERY = 0.2  # seconds between two changes of a terminal


class NullProgress:
    """Shows nothing; the base of what shows one run."""

    def start(self, loop: Loop) -> None:
        """Called before the first step."""

    def update(self, loop: Loop) -> None:
        """Called after every step but one at which the run ends early, because it diverged or failed."""

    def end(self, loop: Loop) -> None:
        """Called once when the run has ended, however it ended."""


class PlainProgress(NullProgress):
    """One line per epoch, for logs and pipes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def update(self, loop: Loop) -> None:
        run = loop.run
        if run.num_steps % run.batches.steps_per_epoch == 0 or run.num_steps == run.total_steps:
            print(f"{self.name}  {progress_line(loop)}", flush=True)

    def end(self, loop: Loop) -> None:
        if loop.status != "finished":
            print(f"{self.name}  {loop.status} at step {loop.run.num_steps}", flush=True)


class LiveProgress(NullProgress):
    """A progress bar, and at the end a table or, in a sweep, which prints one for all runs, a line."""

    def __init__(self, name: str, console: Console, in_sweep: bool) -> None:
        self.name, self.console, self.in_sweep = name, console, in_sweep
        self.shown_at = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), TaskProgressColumn(),
            TimeRemainingColumn(compact=True), TextColumn("{task.fields[state]}"),
            console=console, refresh_per_second=3, transient=True,
        )  # fmt: skip

    def start(self, loop: Loop) -> None:
        self.task = self.bar.add_task(self.name, total=loop.run.total_steps, completed=loop.run.num_steps, state="")
        self.bar.start()

    def update(self, loop: Loop) -> None:
        if perf_counter() - self.shown_at > SHOW_EVERY:
            self.shown_at = perf_counter()
            self._draw(loop)

    def _draw(self, loop: Loop) -> None:
        self.bar.update(self.task, completed=loop.run.num_steps, state=progress_line(loop))

    def end(self, loop: Loop) -> None:
        self._draw(loop)
        self.bar.stop()
        run, latest = loop.run, loop.latest
        if self.in_sweep:
            self.console.print(f"{self.name}  {loop.status}  {progress_line(loop)}", highlight=False)
            return
        told = f"{self.name}: {loop.status} after {run.num_steps:,} steps, {run.seconds:.1f} s"
        self.console.print(told, highlight=False)
        splits = [split for split in SHOWN_SPLITS if f"loss/{split}" in latest]
        rows = [[split, f"{latest[f'loss/{split}']:.4f}", f"{latest[f'accuracy/{split}']:.2%}"] for split in splits]
        self.console.print(table_of(("", "loss", "accuracy"), rows))


class LiveTable:
    """A table that is redrawn on a terminal; elsewhere it is printed as a line at every milestone."""

    def __init__(self, columns: Sequence[str], *, quiet: bool) -> None:
        self.columns, self.quiet = columns, quiet
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
        """Show ``rows()`` at ``step`` of ``total``: at a milestone and, on a terminal, every ``SHOW_EVERY`` seconds."""
        now = perf_counter()
        self.first_step = step if self.first_step is None else self.first_step
        if self.quiet or not (is_milestone or (self.is_drawn and now - self.shown_at > SHOW_EVERY)):
            return
        self.shown_at = now
        speed = (step - self.first_step) / (now - self.began)
        left = f", {(total - step) / speed:,.0f} s left" if speed and step < total else ""
        title = f"step {step:,}/{total:,}{left}"
        if self.is_drawn:
            self.live.update(table_of(self.columns, rows(), title))
        else:
            shown = ";  ".join(" ".join(cell for cell in row if cell) for row in rows())
            print(f"{title}:  {shown}", flush=True)


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table of ``rows`` for a terminal; every column that has a heading is one of numbers."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return table


def progress_line(loop: Loop) -> str:
    """Epoch, step, speed, and the last losses and accuracies, in one line."""
    run, latest = loop.run, loop.latest
    num_epochs = run.total_steps / run.batches.steps_per_epoch
    parts = [f"epoch {run.epoch:.3g}/{num_epochs:.3g}", f"step {run.num_steps}/{run.total_steps}"]
    if "throughput/images_per_s" in latest:
        parts.append(f"{latest['throughput/images_per_s']:,.0f} images/s")
    for split in ("train", "valid", "test"):
        if f"loss/{split}" in latest:
            parts.append(f"{split} {latest[f'loss/{split}']:.4f} {latest[f'accuracy/{split}']:.2%}")
    return "  ".join(parts)


@contextmanager
def counted(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield ``show(done, total)``, which draws a bar on a terminal, and elsewhere prints a line when all is done."""
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), transient=True)
    task, began = bar.add_task(title), perf_counter()

    def show(done: int, total: int) -> None:
        if bar.console.is_terminal and not quiet:
            bar.start()
            bar.update(task, completed=done, total=total)
        elif done == total and not quiet:
            print(f"{title}: {total:,} in {perf_counter() - began:.1f} s", flush=True)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


def make_progress(name: str, *, quiet: bool, in_sweep: bool = False) -> NullProgress:
    """The progress for stdout: a bar on a terminal, lines elsewhere, nothing if ``quiet``."""
    if quiet:
        return NullProgress()
    console = Console()
    return LiveProgress(name, console, in_sweep) if console.is_terminal else PlainProgress(name)
