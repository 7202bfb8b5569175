"""The parts that a config names, made one by one: model, norm, data, device, probes."""

import math
import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from bnexp.config.targets import OURS, check_options, find_target
from bnexp.errors import UserError
from bnexp.models.initialize import initialize
from bnexp.optim import make_optimizer, without_compiler
from bnexp.train.probe import Probe


def probes_of(cfg: DictConfig) -> list[Probe]:
    """The probes that the config names, new ones: every run has its own."""
    if not isinstance(cfg.probe, DictConfig):
        raise UserError(f"probe={cfg.probe}: a list of probes is expected, probe=[activations,gradients] say")
    for name, node in cfg.probe.items():
        check_options("probe", node, cfg.allow, label=f"probe.{name}")
    return [filled_in("probe", node, cfg.allow)() for node in cfg.probe.values()]


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


def build_optimizer(cfg: DictConfig, model: nn.Module) -> Optimizer:
    """The optimizer of the config over the parameters of ``model``."""
    decays = {key: cfg.optimizer.get(key, 0.0) for key in OURS}
    optimizer = part(cfg, "optimizer", without=OURS)
    options = {key: _as_floats(value) for key, value in optimizer.keywords.items()}
    return make_optimizer(partial(without_compiler(optimizer.func), **options), model, **decays)


def _as_floats(value: Any) -> Any:
    """A list with its whole numbers as floats, any other value as it is: torch refuses ``betas=[0,0.999]``."""
    return [float(n) if type(n) is int else n for n in value] if isinstance(value, list) else value


def meta_model(cfg: DictConfig, source: Any) -> nn.Module:
    """The model where tensors have no contents: costs nothing, and its parts refuse what they refuse."""
    with torch.device("meta"):
        return part(cfg, "model")(source.in_shape, len(source.class_names), part(cfg, "norm"))
