"""The commands that train or look at a model: Hydra composes, ``build`` builds, ``loop`` drives."""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bnexp import config
from bnexp.cli import choices
from bnexp.compose import change, composed, group_name, run_hydra, run_name, settings, stored_config
from bnexp.errors import RunFailed, UserError
from bnexp.process import quick_imports

if TYPE_CHECKING:
    from bnexp.loop import Journal, Plan
    from bnexp.run import Run


def train(arguments: list[str]) -> int:
    """``bnexp train``: one run, from the command line to its folder, whose path is the last line printed."""
    flags = {word for word in arguments if word.startswith("-")}
    if flags and flags <= {"-m", "--multirun"} and not any(word.startswith("hydra/sweeper=") for word in arguments):
        with quick_imports():
            from bnexp import multirun

        return multirun.train([word for word in arguments if word not in flags])
    if any(word.startswith("--experimental-rerun") for word in arguments):
        raise UserError("--experimental-rerun: reads a file that can hold code; bnexp rerun RUN does without")
    caught: list[BaseException] = []

    def task(cfg: DictConfig) -> None:
        try:
            train_one(cfg, list(HydraConfig.get().overrides.task))
        except Exception as error:  # Hydra would print it as its own
            caught.append(error)

    run_hydra(arguments, task)
    if caught:
        raise caught[0]
    return 0


def train_one(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Check, build, claim a folder, train; prints the folder's path last, even when interrupted."""
    with quick_imports():
        from bnexp import build, resuming
        from bnexp.folder import claim, claim_new, in_other_hands, taken

    if cfg.resume and resuming.is_begun(cfg):
        resuming.go_on_as(cfg)
        return
    build.check(cfg)
    run = build.build(cfg)
    text = OmegaConf.to_yaml(cfg, resolve=True)
    day = Path("outputs") / time.strftime("%Y-%m-%d")
    folder = claim_new(day, run_name(cfg), text) if cfg.out is None else claim(Path(cfg.out), text)
    with taken(folder) as mine:
        if not mine:  # whoever goes on with runs may have been quicker
            raise in_other_hands(folder)
        advise(cfg, run)
        finish(cfg, run, open_journal(cfg, run, overrides, folder))


SAID: set[str] = set()  # by this process: a sweep would say the same of every seed


def advise(cfg: DictConfig, run: "Run") -> None:
    """Tell on stderr what somebody should know of these settings before training, once each."""
    from bnexp.advice import advice

    if cfg.quiet:
        return
    for sentence in advice(run.model, num_steps=run.total_steps, batch_size=cfg.batch_size):
        if sentence not in SAID:
            SAID.add(sentence)
            print(f"bnexp: warning: {sentence}", file=sys.stderr)


def finish(cfg: DictConfig, run: "Run", journal: "Journal") -> None:
    """Drive the run to its end; the last line on stdout is its folder."""
    from bnexp import build, loop, progress
    from bnexp.folder import STATUS

    shown = progress.make_progress(run_name(cfg), quiet=cfg.quiet)
    try:
        loop.drive(run, build.plan_of(cfg, run.batches.steps_per_epoch), journal, shown)
    except UserError:
        raise
    except Exception as error:
        what, kept = f"{type(error).__name__}: {error}", journal.folder / STATUS
        raise RunFailed(f"the run failed at step {run.num_steps}: {what}; the traceback is in {kept}") from error
    finally:
        print(journal.folder, flush=True)


def open_journal(cfg: DictConfig, run: "Run", overrides: Sequence[str], folder: Path) -> "Journal":
    """Where the run is recorded; if ``folder`` holds a checkpoint, ``run`` goes on from there."""
    from bnexp import build, checkpoint
    from bnexp.folder import Status
    from bnexp.journal import Journal, merit
    from bnexp.writer import Writer, read_lines

    state = checkpoint.load(folder, run.device, run.model, mend=True)
    if state is not None:
        with fitting(folder / checkpoint.NAME):
            run.load_state_dict(state)
    status = Status(folder, build.device_name(run.device), list(overrides), goes_on=state is not None)
    writer = Writer(folder, step=run.num_steps)
    writer.describe(OmegaConf.to_yaml(cfg, resolve=True), settings(cfg), group_name(cfg))
    earlier = read_lines(folder) if cfg.keep == "best" else []
    best = max((merit(line, len(run.dataset.valid) > 0) for line in earlier), default=-math.inf)
    return Journal(writer, status, folder, cfg.keep, best)


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Have what a checkpoint's contents make fail, in one of many ways, told as :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = f"{path}: not the checkpoint of this run ({type(error).__name__}: {error})"
        raise UserError(f"{what}; put back the run's own") from error


def resume(arguments: list[str]) -> int:
    """``bnexp resume``, see :func:`bnexp.resuming.resume`."""
    from bnexp import resuming

    return resuming.resume(arguments)


def rerun(arguments: list[str]) -> int:
    """``bnexp rerun RUN [overrides]``: the config of a run folder again, in a folder of its own."""
    if not arguments or ("=" in arguments[0] and not Path(arguments[0]).is_dir()):
        raise UserError("rerun: which run? Give its folder first: bnexp rerun outputs/DATE/RUN seed=1")
    cfg, overrides = stored_config(Path(arguments[0])), arguments[1:]
    change(cfg, overrides, "rerun")
    train_one(cfg, overrides)
    return 0


def compare(arguments: list[str]) -> int:
    """``bnexp compare``, see :func:`bnexp.multirun.compare`."""
    if flags := [word for word in arguments if word.startswith("-")]:
        raise UserError(f"{flags[0]}: compare takes settings only, several values need no flag: norm=none,library")
    with quick_imports():
        from bnexp import multirun

    return multirun.compare(arguments)


def study(arguments: list[str]) -> int:
    """``bnexp study``, see :func:`bnexp.studies.study`."""
    from bnexp import studies

    return studies.study(arguments)


def report(arguments: list[str]) -> int:
    """``bnexp report RUN_OR_SWEEP...``: compare finished runs, grouped by everything but the seed."""
    from bnexp.report import FORMATS
    from bnexp.report import report as make_report

    parser = argparse.ArgumentParser("bnexp report", description="Compare finished runs.")
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_SWEEP", help="run folders, or folders of run folders")
    parser.add_argument("--baseline", metavar="NAME", help="the variant to compare with: none, or norm=none")
    parser.add_argument("--best-over", metavar="KEY", help="first pick each variant's best value of this setting")
    parser.add_argument("--out", metavar="DIR", help="write comparison.png, .svg, .json and .md there")
    shape = parser.add_mutually_exclusive_group()
    for name in FORMATS:
        shape.add_argument(f"--{name}", dest="format", action="store_const", const=name, help=f"print {name} only")

    def refuse(message: str) -> None:
        raise UserError(f"report: {message}; bnexp report --help shows what it takes")

    parser.error = refuse
    given = parser.parse_args(arguments)
    make_report(
        given.paths, best_over=given.best_over, baseline=given.baseline, out=given.out, format=given.format
    )  # fmt: skip
    return 0


def summary(arguments: list[str]) -> int:
    """``bnexp summary [overrides]``: the layers of the model that these overrides make; reads no data."""
    from bnexp import build
    from bnexp.summary import show_summary

    cfg = composed(arguments)
    build.check(cfg, runs=False)
    source = build.part(cfg, "data")()
    show_summary(build.make_model(cfg, source), source.in_shape)
    return 0


def inspect(arguments: list[str]) -> int:
    """``bnexp inspect RUN``: a run looked at again, from its last checkpoint; its own files stay as they are."""
    from bnexp import build, checkpoint, inspection
    from bnexp.summary import list_layers

    question = inspection.parse(arguments)
    cfg = stored_config(question.folder)
    change(cfg, question.overrides, "inspect")
    cfg.engine = OmegaConf.structured(config.Train).engine  # nothing is trained: a graph's run can be seen on a CPU
    build.check(cfg, free=False)
    source = build.part(cfg, "data")()
    model = build.meta_model(cfg, source)
    inspection.check_layers(question.layers, [layer.name for layer in list_layers(model, source.in_shape)])
    state = checkpoint.load(question.folder, build.find_device(cfg.device), model)
    run = build.build(cfg)
    with fitting(question.folder / checkpoint.NAME):
        run.model.load_state_dict(state["model"])
    run.num_steps = state["num_steps"]
    inspection.inspect(run, question)
    return 0


def bench(arguments: list[str]) -> int:
    """``bnexp bench norms`` and ``bnexp bench loop``."""
    from bnexp.bench.arguments import kind_of

    return {"norms": bench_norms, "loop": bench_loop}[kind_of(arguments)](arguments)


def bench_norms(arguments: list[str]) -> int:
    """Every implementation of batch norm in ``conf/norm``, parity first, then speed."""
    from bnexp.bench import norms as benchmark

    asked = benchmark.parse(arguments)
    from bnexp import build
    from bnexp.norms.base import BatchNormBase

    norms = {name: build.part(composed([f"norm={name}"]), "norm") for name in choices("norm")}
    ours = {
        name: norm for name, norm in norms.items()
        if isinstance(norm.func, type) and issubclass(norm.func, BatchNormBase) and norm.func.implements_batch_norm
    }  # fmt: skip
    benchmark.run(ours, asked, build.find_device(asked.device))
    return 0


def bench_loop(arguments: list[str]) -> int:
    """What an epoch of ours takes beside loops written by hand, and what a start and a sweep take."""
    from bnexp.bench import loop_settings

    asked = loop_settings.parse(arguments, {group: choices(group) for group in ("model", "engine")})
    from bnexp import build
    from bnexp.bench import loop as benchmark
    from bnexp.data.dataset import Dataset

    datasets: dict[str, Dataset] = {}

    def make(overrides: Sequence[str]) -> tuple["Run", "Plan"]:
        cfg = composed(overrides)
        build.check(cfg)
        run = build.build(cfg, datasets)
        return run, build.plan_of(cfg, run.batches.steps_per_epoch)

    benchmark.run(make, asked, build.find_device(asked.device), choices("probe"))
    return 0


def complete() -> None:
    """Print what Hydra offers where COMP_LINE ends."""
    run_hydra(["--shell-completion", "query=bash"], lambda cfg: None)
