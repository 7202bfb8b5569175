"""The commands that train or look at a model: Hydra composes, ``build`` builds, ``loop`` drives."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from bnexp import config
from bnexp.cli import GROUPS, conf_dir
from bnexp.errors import UserError
from bnexp.explain import explained


def train(arguments: list[str]) -> int:
    """``bnexp train``: one run, from the command line to its folder, whose path is the last line printed."""
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


def train_one(cfg: DictConfig, overrides: Sequence[str]) -> Path:
    """Check, build, claim a folder, train; prints the folder's path last, even when interrupted."""
    from bnexp import build, loop, progress
    from bnexp.folder import Status, claim, claim_new
    from bnexp.writer import Writer

    build.check(cfg)
    run = build.build(cfg)
    text = OmegaConf.to_yaml(cfg, resolve=True)
    name = run_name(cfg)
    day = Path("outputs") / time.strftime("%Y-%m-%d")
    folder = claim_new(day, name, text) if cfg.out is None else claim(Path(cfg.out), text)
    writer = Writer(folder)
    writer.describe(text, settings(cfg), group_name(cfg))
    journal = loop.Journal(writer, Status(folder, build.device_name(run.device), list(overrides)), folder)
    shown = progress.make_progress(name, quiet=cfg.quiet)
    try:
        loop.drive(run, build.plan_of(cfg, run.batches.steps_per_epoch), journal, shown)
    finally:
        print(folder, flush=True)
    return folder


def rerun(arguments: list[str]) -> int:
    """``bnexp rerun RUN [overrides]``: the config of a run folder again, in a folder of its own."""
    from bnexp.folder import CONFIG

    if not arguments or "=" in arguments[0]:
        raise UserError("rerun: which run? Give its folder first: bnexp rerun outputs/DATE/RUN seed=1")
    path, overrides = Path(arguments[0]), arguments[1:]
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: holds no run, there is no {CONFIG} in it; give the folder of one")
    with explained(overrides):
        stored = OmegaConf.load(path / CONFIG)
        # Where the old run wrote, and whom its author trusted, are no business of this one.
        stored = OmegaConf.masked_copy(stored, [key for key in stored if key not in ("out", "quiet", "allow")])
        cfg = OmegaConf.merge(OmegaConf.structured(config.Train), stored)
        OmegaConf.set_struct(cfg, True)
        for override in OverridesParser.create().parse_overrides(overrides):
            key, value = override.key_or_group, override.value()
            if override.is_sweep_override():
                raise UserError(f"{override.input_line}: rerun runs one config; give one value")
            if key in GROUPS:
                cfg[key] = composed([f"{key}={value}"])[key]
            else:
                OmegaConf.update(cfg, key, value, force_add=override.is_add())
    train_one(cfg, overrides)
    return 0


def summary(arguments: list[str]) -> int:
    """``bnexp summary [overrides]``: the layers of the model that these overrides make; reads no data."""
    from rich.console import Console

    from bnexp import build
    from bnexp.summary import summary_table

    cfg = composed(arguments)
    build.check(cfg)
    source = build.part(cfg, "data")()
    Console().print(summary_table(build.make_model(cfg, source), source.in_shape, cfg.batch_size))
    return 0


def complete() -> None:
    """Print what Hydra offers where COMP_LINE ends."""
    run_hydra(["--shell-completion", "query=bash"], lambda cfg: None)


def run_hydra(arguments: list[str], task: Callable[[DictConfig], None]) -> None:
    """Give the command line to Hydra: overrides, -m, --cfg, --help and whatever else it knows."""
    sys.argv = ["bnexp train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions on instead of printing them and exiting with 1
    decorate = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
    with explained(arguments):
        decorate(task)()


def composed(overrides: Sequence[str]) -> DictConfig:
    """The config that these overrides make."""
    with explained(overrides), initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="bnexp"):
        return compose("train", list(overrides))


def short_name(node: DictConfig) -> str:
    """What a group's entry is called: the module of its target, ``bnexp.norms.none.Shift`` is ``none``."""
    *_, module, name = ["", *node["_target_"].split(".")]
    return module if node["_target_"].startswith("bnexp.") and name[:1].isupper() else name.lower()


def run_name(cfg: DictConfig) -> str:
    return f"{short_name(cfg.model)}-{short_name(cfg.norm)}-s{cfg.seed}"


def settings(cfg: DictConfig) -> dict[str, bool | int | float | str]:
    """Everything that makes the variant, flat, as HParams takes it."""
    from bnexp.variants import flatten

    flat = flatten(OmegaConf.to_container(cfg, resolve=True))
    named = {group: short_name(cfg[group]) for group in GROUPS}
    plain = {key: value for key, value in flat.items() if not key.endswith("._target_")}
    return named | {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in plain.items()}


def group_name(cfg: DictConfig) -> str:
    """The same for all seeds of a variant and for nothing else."""
    text = json.dumps(settings(cfg), sort_keys=True)
    return f"{short_name(cfg.model)}-{short_name(cfg.norm)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
