"""From configuration to objects: the only file that turns a ``_target_`` into a thing.

It also holds the rules that no single key can state.

``check`` looks at everything that can be wrong before anything is built, ``build`` makes the run.
"""

import importlib
import inspect
import math
import os
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from bnexp import folder
from bnexp.config import Train
from bnexp.data.batches import Batches
from bnexp.data.dataset import Dataset
from bnexp.errors import UserError
from bnexp.loop import Plan
from bnexp.models.initialize import initialize
from bnexp.optim import make_optimizer
from bnexp.run import AUTOCAST, Run
from bnexp.summary import list_layers

GROUPS = ("model", "norm", "data", "optimizer", "schedule")
OURS = ("weight_decay", "norm_weight_decay")  # of an optimizer, given per parameter group
WORK_PER_THREAD = 50_000_000  # multiply-adds in a step's forward pass that are worth a thread, by measurement
# Where a group's own entries live, which classes of torch it takes, and what it is called with.
HOMES = {"model": "bnexp.models", "norm": "bnexp.norms", "data": "bnexp.data", "schedule": "bnexp.optim"}
KINDS = {"model": nn.Module, "norm": nn.Module, "optimizer": Optimizer}
CALLS = {
    "model": ((0, 0, 0), {}), "norm": ((0,), {"activation": 0}), "data": ((), {}), "optimizer": ((0,), {}),
    "schedule": ((0, 0), {}),
}  # fmt: skip


def check(cfg: DictConfig, *, free: bool = True, runs: bool = True) -> None:
    """Raise :class:`UserError` for what cannot work, before any work.

    ``free=False`` lets ``out`` hold this run already; ``runs=False`` asks only that the model can be built.
    """
    if unknown := set(cfg) - {field.name for field in fields(Train)}:
        raise UserError(f"{sorted(unknown)[0]}: there is no such setting; bnexp train --help lists them all")
    for key in ("batch_size", "log_every"):
        _at_least_one(key, cfg[key])
    if cfg.steps is None:
        _at_least_one("epochs", cfg.epochs)
    for key in ("steps", "eval_every", "checkpoint_every"):
        if cfg[key] is not None:
            _at_least_one(key, cfg[key])
    if not 0 <= cfg.seed < 2**63:
        raise UserError(f"seed={cfg.seed}: a seed is 0 or more, and below 2**63")
    if cfg.precision not in AUTOCAST:
        raise UserError(f"precision={cfg.precision}: not known; choose one of {', '.join(AUTOCAST)}")
    if cfg.threads != "auto":
        _at_least_one("threads", int(cfg.threads) if cfg.threads.isdigit() else cfg.threads)
    device = find_device(cfg.device)
    for group in GROUPS:
        if OmegaConf.is_missing(cfg, group):
            raise UserError(f"{group}: has to be given, nothing runs without it")
        check_options(group, cfg[group], cfg.allow)
    check_schedule(cfg)
    if runs:
        norm = part(cfg, "norm").func
        require_device = getattr(sys.modules[norm.__module__], "require_device", None)
        if require_device is not None:  # a norm that does not run everywhere says so before any work
            require_device(device)
    if cfg.out == "":
        raise UserError("out=: names no folder; give one, or leave it out for a new one under outputs/")
    if free and cfg.out is not None:
        folder.check_free(Path(cfg.out))


def check_schedule(cfg: DictConfig) -> None:
    """A negative learning rate would climb where it should descend, and nobody would be told."""
    schedule, total_steps = part(cfg, "schedule"), cfg.steps or 100
    for step in (0, total_steps // 2, total_steps - 1):
        if not 0 <= (factor := schedule(step, total_steps)) < math.inf:
            options = {k: v for k, v in cfg.schedule.items() if not k.startswith("_")}
            raise UserError(
                f"schedule={options}: the learning rate would be multiplied by {factor:g} at step {step}; "
                "give numbers that keep this factor at 0 or more"
            )


def _at_least_one(key: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{key}={value}: has to be a whole number, 1 or more")


def find_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise UserError(f"device={name}: not known; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: torch finds no CUDA device here; use device=cpu or device=auto")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The device as a person knows it: ``cpu``, or ``cuda:0 (NVIDIA H100)``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def count_threads(cfg: DictConfig, model: nn.Module, in_shape: Sequence[int], device: torch.device) -> int:
    """As many CPU threads as asked for; ``auto``: as many as a step's work keeps busy, at most the usable cores.

    Small layers are done before a second thread has woken up. The rule counts multiply-adds and never the clock,
    because the number of threads decides how sums are rounded: the same config gives the same bits.
    """
    if cfg.threads != "auto":
        return int(cfg.threads)
    if device.type != "cpu":
        return 1
    layers = list_layers(model, in_shape, batch_size=1, device="cpu")
    work = cfg.batch_size * sum(layer.multiply_adds for layer in layers)
    return max(1, min(len(os.sched_getaffinity(0)), work // WORK_PER_THREAD))


def find_target(group: str, path: str, allow: Collection[str]) -> Callable[..., Any]:
    """The class or function that ``_target_`` names, if it is one that a config may name.

    A run's folder can come from a stranger, so a config reaches bnexp's own parts, the modules and optimizers
    of torch, torchvision's models, and packages that the person at the keyboard names with ``allow=[...]``.
    """
    path, home = str(path), HOMES.get(group, f"bnexp.{group}")
    known = f"{home} or torch's {KINDS[group].__name__}s" if group in KINDS else home
    refused = UserError(f"{group}._target_={path}: nothing that {group}= takes; name one of {known}")
    package = path.partition(".")[0]
    if package not in ("bnexp", "torch", "torchvision", *allow):
        raise UserError(
            f"{group}._target_={path}: configs may name classes of bnexp, torch and torchvision only; "
            f"if you trust {package}, add allow=[{package}]"
        )
    if package == "bnexp" and not path.startswith(home):
        raise refused  # before importing, which may do things
    module_name, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{group}._target_={path}: cannot be found ({error})") from error
    lives = getattr(target, "__module__", None) or ""
    is_ours = (lives + ".").startswith(home + ".") and (group != "data" or isinstance(target, type))
    is_trusted = package in allow and lives.partition(".")[0] == package
    is_part = isinstance(target, type) and issubclass(target, KINDS.get(group, ()))
    is_model = group == "model" and inspect.isfunction(target) and lives.startswith("torchvision.models.")
    if not (callable(target) and (is_ours or is_trusted or is_part or is_model)):
        raise refused
    return target


def check_options(group: str, node: DictConfig, allow: Collection[str]) -> None:
    """Every option of a group's entry must be one that its target takes, and of the type that it takes."""
    if not isinstance(node, DictConfig) or "_target_" not in node.keys():  # noqa: SIM118 (in hides what is missing)
        raise UserError(f"{group}={node}: not an entry of the group, which has a _target_")
    if missing := OmegaConf.missing_keys(node):
        raise UserError(f"{group}.{sorted(missing)[0].rpartition('.')[2]}: has to be given, it has no default")
    options = OmegaConf.to_container(node, resolve=True)
    target = find_target(group, options["_target_"], allow)
    accepted = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for key, value in options.items():
        if key in ("_target_", "_partial_") or (group == "optimizer" and key in OURS):
            continue
        if key.startswith("_") or _mentions_target(value):
            raise UserError(f"{group}.{key}: an entry names one _target_ and plain options, nothing else")
        if key not in accepted and not takes_any:
            known = ", ".join(k for k in accepted if k in options) or "none"
            raise UserError(f"{group}.{key}={value}: {options['_target_']} takes no such option; set here: {known}")
        if not fits(value, hints.get(key, Any)):
            given = f", not {type(value).__name__}" if not isinstance(value, list) else ""
            raise UserError(f"{group}.{key}={value}: {_type_name(hints[key])} expected{given}")
    positional, named = CALLS[group]
    named = named | {key: value for key, value in options.items() if key in accepted}
    try:
        inspect.signature(target).bind(*positional, **named)
    except TypeError as error:
        path = options["_target_"]
        raise UserError(f"{group}._target_={path}: cannot be called as a {group} is ({error})") from error


def _mentions_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_mentions_target, value.values()))
    return isinstance(value, list) and any(map(_mentions_target, value))


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value from a config can stand where ``hint`` is annotated; unknown hints take anything."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        items = get_args(hint)
        if origin is tuple and ... not in items:
            return isinstance(value, list) and len(value) == len(items) and all(map(fits, value, items))
        return isinstance(value, list) and (not items or all(fits(item, items[0]) for item in value))
    return hint is not torch.Tensor


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(hint) if option is not torch.Tensor)
    if inspect.isclass(get_origin(hint)) and issubclass(get_origin(hint), Sequence):
        return "list of " + ", ".join(_type_name(item) for item in get_args(hint) if item is not ...)
    return getattr(hint, "__name__", str(hint)).replace("NoneType", "null")


def part(cfg: DictConfig, group: str, without: Collection[str] = ()) -> Callable[..., Any]:
    """The target of a group's entry with its options filled in, waiting for what only the caller knows."""
    options = OmegaConf.to_container(cfg[group], resolve=True)
    target = find_target(group, options.pop("_target_"), cfg.allow)
    options.pop("_partial_", None)
    return partial(target, **{key: value for key, value in options.items() if key not in without})


def make_model(cfg: DictConfig, source: Any) -> nn.Module:
    """The model for images like the source's, with the weights that ``seed`` gives whatever the norm is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # for layers that ``initialize`` does not know
        model = part(cfg, "model")(source.in_shape, len(source.class_names), part(cfg, "norm"))
    initialize(model, torch.Generator().manual_seed(cfg.seed))
    return model


def check_statistics(cfg: DictConfig, source: Any, num_images: int) -> None:
    """Refuse batches that leave a norm one value per channel, by a dry forward pass that computes nothing."""
    sizes = {cfg.batch_size} if cfg.drop_last else {cfg.batch_size, num_images % cfg.batch_size or cfg.batch_size}
    if 1 not in sizes:
        return
    with torch.device("meta"):
        try:
            part(cfg, "model")(source.in_shape, len(source.class_names), part(cfg, "norm"))(
                torch.empty(1, *source.in_shape)
            )
        except ValueError as error:
            raise UserError(
                f"batch_size={cfg.batch_size}: a batch of one image leaves a norm one value per channel, of which "
                f"there is no variance; use another batch_size{'' if cfg.drop_last else ' or drop_last=true'} ({error})"
            ) from error


def build(cfg: DictConfig, datasets: dict[str, Dataset] | None = None) -> Run:
    """The run that a checked config describes, on its device, at step 0.

    Runs that are given the same ``datasets`` share the data that their configs have in common.
    """
    device = find_device(cfg.device)
    source = part(cfg, "data")()
    model = make_model(cfg, source)
    threads = count_threads(cfg, model, source.in_shape, device)
    torch.set_num_threads(threads)
    datasets = {} if datasets is None else datasets
    key = f"{device} {OmegaConf.to_yaml(cfg.data, resolve=True)}"
    if key not in datasets:
        datasets[key] = source.load().to(device)
    dataset = datasets[key]
    check_statistics(cfg, source, len(dataset.train))
    batches = Batches(dataset, cfg.batch_size, cfg.seed, drop_last=cfg.drop_last)
    model = model.to(device, memory_format=torch.channels_last if cfg.channels_last else torch.preserve_format)
    decays = {key: cfg.optimizer.get(key, 0.0) for key in OURS}
    return Run(
        model,
        make_optimizer(part(cfg, "optimizer", without=OURS), model, **decays),
        batches,
        total_steps=cfg.steps or cfg.epochs * batches.steps_per_epoch,
        schedule=part(cfg, "schedule"),
        precision=cfg.precision,
        channels_last=cfg.channels_last,
        threads=threads,
    )


def plan_of(cfg: DictConfig, steps_per_epoch: int) -> Plan:
    return Plan(
        log_every=cfg.log_every,
        eval_every=cfg.eval_every or steps_per_epoch,
        checkpoint_every=cfg.checkpoint_every or steps_per_epoch,
        eval_train=cfg.eval_train,
    )
