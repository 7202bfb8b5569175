"""Configs: composed by Hydra from the words of a command line, or read back from a run's folder; and their names."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from bnexp.config import schema
from bnexp.config.choices import GROUPS, conf_dir
from bnexp.config.explain import explained
from bnexp.errors import UserError
from bnexp.store.untrusted import read_yaml


def run_hydra(arguments: list[str], task: Callable[[DictConfig], None]) -> None:
    """Give the command line to Hydra: overrides, -m, --cfg, --help and whatever else it knows."""
    flags = get_args_parser()

    def refuse(message: str) -> None:
        raise UserError(f"train: {message}; bnexp train --help shows what it takes")

    flags.error = refuse
    flags.parse_args(arguments)  # Hydra does it again, and would print all that it knows
    sys.argv = ["bnexp train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions on instead of printing them and exiting with 1
    decorate = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
    with explained(arguments):
        decorate(task)()


@contextmanager
def session() -> Iterator[None]:
    """Hydra, ready to compose from ``conf/``; the innermost of nested sessions does nothing."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="bnexp"):
            yield


def composed(overrides: Sequence[str]) -> DictConfig:
    """The config that these overrides make."""
    with explained(overrides), session():
        return compose("train", list(overrides))


def stored_config(folder: Path) -> DictConfig:
    """The config of a run folder, as typed and as strict as one from the command line."""
    from bnexp.store.run_folder import CONFIG

    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give that of a run")
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder}: holds no run, there is no {CONFIG} in it; give the folder of one")
    try:
        stored = read_yaml(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a run's settings, {error}; put back the {CONFIG} that was written") from error
    # Where the run wrote and whom its author trusted are no business of whoever takes it up.
    kept = {key: value for key, value in stored.items() if key not in ("out", "quiet", "allow", "resume", "replicas")}
    with explained([str(folder / CONFIG)]):
        cfg = OmegaConf.merge(OmegaConf.structured(schema.Train), kept)
    OmegaConf.set_struct(cfg, True)
    return cfg


def change(cfg: DictConfig, overrides: Sequence[str], command: str) -> None:
    """Put other values into the config of a run folder."""
    with explained(overrides):
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key, value = override.key_or_group, override.value()
            if override.is_sweep_override():
                raise UserError(f"{override.input_line}: {command} takes one config; give one value")
            if key in (*GROUPS, "probe"):
                cfg[key] = composed([override.input_line]).get(key, {})
            else:
                OmegaConf.update(cfg, key, value, force_add=override.is_add())


def short_name(node: DictConfig) -> str:
    """What a group's entry is called: the module of its target, ``bnexp.norms.none.Shift`` is ``none``."""
    *_, module, name = ["", *node["_target_"].split(".")]
    return module if node["_target_"].startswith("bnexp.") and name[:1].isupper() else name.lower()


def run_name(cfg: DictConfig) -> str:
    return f"{short_name(cfg.model)}-{short_name(cfg.norm)}-s{cfg.seed}"


def settings(cfg: DictConfig) -> dict[str, bool | int | float | str]:
    """Everything that makes the variant, flat, as HParams takes it."""
    from bnexp.store.settings import flatten

    flat = flatten(OmegaConf.to_container(cfg, resolve=True))
    named = {group: short_name(cfg[group]) for group in GROUPS}
    plain = {key: value for key, value in flat.items() if not key.endswith("._target_")}
    return named | {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in plain.items()}


def group_name(cfg: DictConfig) -> str:
    """The same for all seeds of a variant and for nothing else."""
    text = json.dumps(settings(cfg), sort_keys=True)
    return f"{short_name(cfg.model)}-{short_name(cfg.norm)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
