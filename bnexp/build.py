"""From configuration to objects: the only file that turns a config into things.

It also holds the rules that no single key can state.

``check`` looks at everything that can be wrong before anything is built, ``build`` makes the run.
"""

import math
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bnexp import folder
from bnexp.config import Train
from bnexp.data.batches import Batches
from bnexp.data.dataset import Dataset
from bnexp.device import memory_explained
from bnexp.errors import UserError
from bnexp.loop import KEEP, Plan
from bnexp.models.initialize import initialize
from bnexp.optim import keep_rates_on, make_optimizer, without_compiler
from bnexp.probes.base import Probe
from bnexp.run import AUTOCAST, Run
from bnexp.targets import OURS, check_options, find_target
from bnexp.threads import count_threads

GROUPS = ("model", "norm", "data", "optimizer", "schedule", "engine")
MOST_THREADS = 1024  # beyond, the library of threads ends the process


def check(cfg: DictConfig, *, free: bool = True, runs: bool = True, many: bool = False) -> None:
    """Raise :class:`UserError` for what cannot work, before any work.

    ``free=False`` lets ``out`` hold this run already; ``runs=False`` asks only that the model can be built; ``many``
    says that it is one run of many.
    """
    if unknown := set(cfg) - {field.name for field in fields(Train)}:
        raise UserError(f"{sorted(unknown)[0]}: there is no such setting; bnexp train --help lists them all")
    for key in ("batch_size", "log_every", "replicas"):
        _at_least_one(key, cfg[key])
    if cfg.steps is None:
        _at_least_one("epochs", cfg.epochs)
    every_of(cfg.checkpoint_every)
    if cfg.keep not in KEEP:
        raise UserError(f"keep={cfg.keep}: not known; choose one of {', '.join(KEEP)}")
    for key in ("steps", "eval_every", "classes_per_batch"):
        if cfg[key] is not None:
            _at_least_one(key, cfg[key])
    if cfg.replicas > 1 and not many:
        raise UserError(
            f"replicas={cfg.replicas}: one run has none to be computed with; give several values, "
            f"bnexp train -m seed=0,1 replicas={cfg.replicas} say, or use compare"
        )
    if not 0 <= cfg.seed < 2**63:
        raise UserError(f"seed={cfg.seed}: a seed is 0 or more, and below 2**63")
    if cfg.precision not in AUTOCAST:
        raise UserError(f"precision={cfg.precision}: not known; choose one of {', '.join(AUTOCAST)}")
    is_number = re.fullmatch("[0-9]{1,4}", cfg.threads)
    if cfg.threads != "auto" and not (is_number and 1 <= int(cfg.threads) <= MOST_THREADS):
        raise UserError(f"threads={cfg.threads}: has to be auto or a whole number from 1 to {MOST_THREADS}")
    device = find_device(cfg.device)
    for group in GROUPS:
        if OmegaConf.is_missing(cfg, group):
            raise UserError(f"{group}: has to be given, nothing runs without it")
        check_options(group, cfg[group], cfg.allow)
    check_schedule(cfg)
    check_model(cfg, runs)
    if runs:
        for group in ("norm", "engine"):  # one that does not run everywhere says so before any work
            require_device = getattr(sys.modules[part(cfg, group).func.__module__], "require_device", None)
            if require_device is not None:
                require_device(device)
    if free and cfg.out is not None:
        folder.check_free(cfg.out)


def check_model(cfg: DictConfig, runs: bool) -> None:
    """Build the model where tensors have no contents: what its parts refuse is heard of before any work."""
    source = part(cfg, "data")()
    model = meta_model(cfg, source)
    if runs:
        check_batch(cfg, source, model, cfg.batch_size)
    for probe in probes_of(cfg):
        probe.check(model)


def probes_of(cfg: DictConfig) -> list[Probe]:
    """The probes that the config names, new ones: every run has its own."""
    if not isinstance(cfg.probe, DictConfig):
        raise UserError(f"probe={cfg.probe}: a list of probes is expected, probe=[activations,gradients] say")
    for name, node in cfg.probe.items():
        check_options("probe", node, cfg.allow, label=f"probe.{name}")
    return [filled_in("probe", node, cfg.allow)() for node in cfg.probe.values()]


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


def every_of(value: Any) -> tuple[int | None, float | None]:
    """What ``checkpoint_every`` means: so many steps, or so many seconds."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value, None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?s", str(value), re.ASCII)
    if found and 0 < float(found[1]) < math.inf:
        return None, float(found[1])
    raise UserError(
        f"checkpoint_every={value}: has to be a whole number of steps, 1 or more, or of seconds, written as 60s"
    )


def find_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not re.fullmatch("[0-9]{1,4}", index))):
        raise UserError(f"device={name}: not known; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: torch finds no CUDA device here; use device=cpu or device=auto")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The device as a person knows it: ``cpu``, or ``cuda:0 (NVIDIA H100)``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def part(cfg: DictConfig, group: str, without: Collection[str] = ()) -> Callable[..., Any]:
    """The target of a group's entry with its options filled in, waiting for what only the caller knows."""
    return filled_in(group, cfg[group], cfg.allow, without)


def filled_in(
    group: str, node: DictConfig, allow: Collection[str], without: Collection[str] = ()
) -> Callable[..., Any]:
    options = OmegaConf.to_container(node, resolve=True)
    target = find_target(group, options.pop("_target_"), allow)
    options.pop("_partial_", None)
    return partial(target, **{key: value for key, value in options.items() if key not in without})


def make_model(cfg: DictConfig, source: Any) -> nn.Module:
    """The model for images like the source's, with the weights that ``seed`` gives whatever the norm is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # for layers that ``initialize`` does not know
        model = part(cfg, "model")(source.in_shape, len(source.class_names), part(cfg, "norm"))
    initialize(model, torch.Generator().manual_seed(cfg.seed))
    return model


def check_last_batch(cfg: DictConfig, source: Any, num_images: int) -> None:
    """Refuse a short last batch that a norm cannot divide, or that leaves it one value per channel."""
    last = cfg.batch_size if cfg.drop_last else num_images % cfg.batch_size or cfg.batch_size
    if last == cfg.batch_size:
        return
    check_batch(cfg, source, meta_model(cfg, source), last)


def check_batch(cfg: DictConfig, source: Any, model: nn.Module, size: int) -> None:
    """Refuse batches of ``size`` images that a norm cannot divide, or that leave it one value to take a variance of.

    ``model`` is on torch's meta device. Norms that may refuse what batch norm takes are shown a batch in training mode.
    """
    for module in model.modules():
        if hasattr(module, "check_batch_size"):
            try:
                module.check_batch_size(size)
            except UserError as error:
                raise error if size == cfg.batch_size else UserError(f"{error}; or use drop_last=true") from None
    norms = [module for module in model.modules() if hasattr(module, "reduces_over")]
    norms = [norm for norm in norms if not getattr(norm, "implements_batch_norm", False)]
    known = all(type(module).__module__.startswith(("bnexp.", "torch.", "torchvision.")) for module in model.modules())
    if size > 1 and not norms and (known or size == cfg.batch_size):
        return
    images = torch.empty(size, *source.in_shape, device="meta")
    if norms and known:
        # To these a few images say as much as many, and few may have contents: what knows shapes without takes torch
        # a second to import.
        model = part(cfg, "model")(source.in_shape, len(source.class_names), part(cfg, "norm"))
        few = max(getattr(norm, "virtual_batch", None) or 2 for norm in norms)
        images = torch.zeros(min(size, few), *source.in_shape)
    check_forward(cfg, model, images, size)


def check_forward(cfg: DictConfig, model: nn.Module, images: torch.Tensor, size: int) -> None:
    """Let ``images`` pass ``model`` in training mode; they stand for a batch of ``size``."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(images)
    except UserError:
        raise
    except ValueError as error:
        if size > 1:
            raise UserError(f"batch_size={size}: the model cannot take it ({error})") from error
        raise UserError(
            f"batch_size={cfg.batch_size}: a batch of one image leaves a norm one value per channel, of which "
            f"there is no variance; use another batch_size{'' if cfg.drop_last else ' or drop_last=true'} ({error})"
        ) from error


def meta_model(cfg: DictConfig, source: Any) -> nn.Module:
    """The model where tensors have no contents: costs nothing, and its parts refuse what they refuse."""
    with torch.device("meta"):
        return part(cfg, "model")(source.in_shape, len(source.class_names), part(cfg, "norm"))


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
    key = data_key(cfg, device)
    layout = torch.channels_last if cfg.channels_last else torch.preserve_format
    with memory_explained(device, "the data and the model", cfg.batch_size):
        if key not in datasets:
            datasets[key] = source.load().to(device)
        model = model.to(device, memory_format=layout)
    dataset = datasets[key]
    check_last_batch(cfg, source, len(dataset.train))
    batches = Batches(
        dataset, cfg.batch_size, cfg.seed, drop_last=cfg.drop_last, classes_per_batch=cfg.classes_per_batch
    )
    decays = {key: cfg.optimizer.get(key, 0.0) for key in OURS}
    asked = part(cfg, "optimizer", without=OURS)
    optimizer = make_optimizer(partial(without_compiler(asked.func), **asked.keywords), model, **decays)
    if device.type == "cuda":
        keep_rates_on(optimizer, device)
    return Run(
        model,
        optimizer,
        batches,
        total_steps=cfg.steps or cfg.epochs * batches.steps_per_epoch,
        schedule=part(cfg, "schedule"),
        precision=cfg.precision,
        channels_last=cfg.channels_last,
        threads=threads,
        deterministic=cfg.deterministic,
        engine=part(cfg, "engine"),
    )


def data_key(cfg: DictConfig, device: torch.device) -> str:
    """The same for configs that have their data in common."""
    return f"{device} {OmegaConf.to_yaml(cfg.data, resolve=True)}"


def plan_of(cfg: DictConfig, steps_per_epoch: int) -> Plan:
    steps, seconds = every_of(cfg.checkpoint_every)
    return Plan(
        log_every=cfg.log_every,
        eval_every=cfg.eval_every or steps_per_epoch,
        checkpoint_every=steps if steps or seconds else steps_per_epoch,
        checkpoint_seconds=seconds,
        eval_train=cfg.eval_train,
        eval_test=cfg.eval_test,
        probes=probes_of(cfg),
    )
