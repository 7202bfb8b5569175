"""Makes the parts that a config names: model, norm, source of data, optimizer, probes, device."""

import copy
import itertools
import math
import re
from collections.abc import Callable, Collection
from functools import partial, wraps
from inspect import iscoroutine
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from bnexp.config.choices import GROUPS
from bnexp.config.only import train_only
from bnexp.config.targets import DECAYS, OURS, check_options, find_target, is_unasked
from bnexp.errors import UserError
from bnexp.models.initialize import initialize
from bnexp.optim import make_optimizer, without_compiler
from bnexp.probes.layers import smallest_batch
from bnexp.store.settings import as_typed
from bnexp.train.own import PartFailed, naming
from bnexp.train.probe import Probe

FOREIGN = ("bnexp.models.foreign.", "bnexp.norms.own.")  # parts of libraries, and of the user's own by their path
BY_PATH = tuple(f"{home}own" for home in FOREIGN)


def probes_of(cfg: DictConfig) -> list[Probe]:
    """New instances of the probes that the config names."""
    if not isinstance(cfg.probe, DictConfig):
        raise UserError(f"probe={cfg.probe}: a list of probes is expected, probe=[activations,gradients] say")
    probes = []
    for name, node in cfg.probe.items():
        check_options("probe", node, cfg.allow, label=f"probe.{name}")
        label = f"probe.{name}._target_={node._target_}"
        probe = check_kind(label, filled_in("probe", node, cfg.allow, label=label)(), Probe)
        probe.label = label if is_own(node) else ""
        probes.append(probe)
    return probes


def every_of(value: Any) -> tuple[int | None, float | None]:
    """``checkpoint_every`` as (steps, None) or (None, seconds); (None, None) for null."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value, None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?s", str(value), re.ASCII)
    if found and 0 < float(found[1]) < math.inf:
        return None, float(found[1])
    raise UserError(
        f"checkpoint_every={value}: has to be a whole number of steps, 1 or more, or of seconds, written as 60s"
    )


def find_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is the GPU if there is one. :class:`UserError` for one that is not here."""
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


def part(cfg: DictConfig, group: str, without: Collection[str] = ()) -> Callable[..., Any]:
    """The target of the group's entry with its options filled in, but those ``without``, as a partial."""
    return filled_in(group, cfg[group], cfg.allow, without)


def filled_in(
    group: str, node: DictConfig, allow: Collection[str], without: Collection[str] = (), label: str = ""
) -> Callable[..., Any]:
    """:func:`part` for the entry ``node`` of a group; ``label`` names it in errors."""
    options = OmegaConf.to_container(node, resolve=True)
    target = find_target(group, options.pop("_target_"), allow)
    options.pop("_partial_", None)
    if is_own(node):
        if group == "data":
            options = {key: value for key, value in options.items() if not is_unasked(target, key, value)}
        target = naming(label or label_of(group, node))(target)
    if node._target_ in BY_PATH:
        if options["path"] is None:
            raise UserError(
                f"{group}.path=null: names nothing; give your class or function, {group}.path=mypackage.Name"
            )
        options["path"] = find_target(group, options["path"], allow, "path")
    return partial(target, **{key: value for key, value in options.items() if key not in without})


def is_own(node: DictConfig) -> bool:
    """Whether the entry ``node`` names a part of a package that the user trusts by ``allow=[...]``, or of a library."""
    return node._target_.startswith(FOREIGN) or not node._target_.startswith(("bnexp.", "torch.", "torchvision."))


def own_parts(cfg: DictConfig) -> dict[str, str]:
    """The user's own parts but probes: the name of the code by the label, ``model._target_=mypackage.Net``."""
    found = {target_of(cfg, group): part(cfg, group) for group in GROUPS if is_own(cfg[group])}
    codes = {label: each.keywords.get("path", each.func) for label, each in found.items()}
    return {
        label: f"{code.__module__}.{code.__qualname__}".removeprefix(FOREIGN[0]) for label, code in codes.items()
    }  # fmt: skip


def is_foreign(cfg: DictConfig) -> bool:
    """Whether the model or the norm is a part of the user's own."""
    return is_own(cfg.model) or is_own(cfg.norm)


def plain_model(cfg: DictConfig, source: Any, norm: Callable[..., nn.Module] | None = None) -> nn.Module:
    """The model for images like the source's, with the weights that its layers give themselves."""
    model = part(cfg, "model")(source.in_shape, len(source.class_names), norm or norm_part(cfg))
    check_kind(target_of(cfg, "model"), model, nn.Module)
    if not is_foreign(cfg):
        return model
    label = ", ".join(own_parts(cfg))
    with naming(label), torch.no_grad():
        if find_lazy(model):
            model.eval()(torch.zeros(smallest_batch(model, cfg.batch_size), *source.in_shape))
            model.train()
        if lazy := find_lazy(model):
            raise UserError(f"{label}: {lazy} gets no shape in a forward pass; give it one")
        return copy.deepcopy(model)  # or two runs would train a module that a part keeps


def norm_part(cfg: DictConfig) -> Callable[..., nn.Module]:
    """The norm of the config. One that does not normalize has no shift of its own if the model's layers have biases.

    Then ``+norm.bias=true`` asks for both.
    """
    norm = part(cfg, "norm")
    if is_own(cfg.norm):
        checked = lambda *args, **options: check_kind(target_of(cfg, "norm"), norm(*args, **options), nn.Module)  # noqa: E731
        return wraps(norm)(checked)
    is_second = getattr(norm.func, "normalizes", True) is False and cfg.model.get("bias") is True
    return partial(norm, bias=False) if is_second and "bias" not in cfg.norm else norm


def find_lazy(model: nn.Module) -> str | None:
    """The name of a parameter or buffer that gets its shape in the first forward pass, if there is one."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return next((name for name, tensor in tensors if is_lazy(tensor)), None)


def target_of(cfg: DictConfig, group: str) -> str:
    """``model._target_=mypackage.Net``, as an error names a part."""
    return label_of(group, cfg[group])


def label_of(group: str, node: DictConfig) -> str:
    """:func:`target_of` for an entry; ``model.name=resnet18`` of a library's, ``model.path=mypackage.Net``."""
    keys = [key for key in ("path", "name") if key in node and node._target_.startswith(FOREIGN)]
    return f"{group}.{keys[0]}={node[keys[0]]}" if keys else f"{group}._target_={node._target_}"


def check_kind(target: str, result: Any, kind: Any, method: str = "it") -> Any:
    """Return the ``result`` of the part that ``target`` names if it is a ``kind``, else raise :class:`UserError`."""
    if not isinstance(result, kind):
        expected = f"{kind.__module__}.{kind.__name__}" if isinstance(kind, type) else "number"
        raise UserError(f"{target}: {method} returns {describe_result(result)}; return a {expected}")
    return result


def describe_result(value: Any) -> str:
    """``None``, ``an object of type tuple``, ``a tensor of shape (64, 10) and type float32``."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    if iscoroutine(value):
        value.close()  # or Python warns of it
    return "None" if value is None else f"an object of type {type(value).__name__}"


def make_model(cfg: DictConfig, source: Any) -> nn.Module:
    """The model for images like the source's, with the weights that ``seed`` gives whatever the norm is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # for layers that ``initialize`` does not know
        model = plain_model(cfg, source)
    if any(p.is_meta for p in model.parameters()):
        raise UserError(f"{', '.join(own_parts(cfg))}: keeps a module for the next model; make every module anew")
    initialize(model, torch.Generator().manual_seed(cfg.seed))
    return train_only(model, cfg.optimizer.get("only"))


def meta_model(cfg: DictConfig, source: Any) -> nn.Module:
    """The model on torch's meta device, without weights. Its parts refuse wrong settings as always."""
    with torch.device("meta"):
        return train_only(plain_model(cfg, source), cfg.optimizer.get("only"))


def build_optimizer(cfg: DictConfig, model: nn.Module) -> Optimizer:
    """The optimizer of the config over the parameters of ``model``."""
    decays = {key: cfg.optimizer.get(key, 0.0) for key in DECAYS}
    optimizer = part(cfg, "optimizer", without=OURS)
    if optimizer.func is torch.optim.SparseAdam and not is_foreign(cfg):
        raise UserError(
            f"{target_of(cfg, 'optimizer')}: takes sparse gradients only, and this model has none; choose another"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"{target_of(cfg, 'model')}: has no parameter that takes a gradient, nothing can be trained")
    options = dict(optimizer.keywords)
    for key, value in options.items():
        if isinstance(value, list) and all(isinstance(number, int | float) for number in value):
            options[key] = tuple(map(float, value))  # torch takes betas of 0.0 and 0.9 and refuses 0 and 0.9

    def make(groups: list[dict]) -> Optimizer:
        try:
            made = without_compiler(optimizer.func)(groups, **options)
        except PartFailed:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            numbers = {k: v for k, v in options.items() if type(v) in (int, float, tuple) or v is True}
            names = {key: "learning rate" if key == "lr" else key.rstrip("s") for key in numbers}  # as torch says
            named = [key for key, name in names.items() if re.search(rf"\b{name}", str(error), re.IGNORECASE)]
            numbers = {key: numbers[key] for key in named or numbers}
            given = ", ".join(f"optimizer.{key}={as_typed(value)}" for key, value in numbers.items()) or "optimizer"
            remedy = "; give optimizer.momentum=0.9, say" if "nesterov" in named else ""
            raise UserError(f"{given}: the optimizer refuses its options: {error}{remedy}") from error
        return check_kind(target_of(cfg, "optimizer"), made, Optimizer)

    return make_optimizer(make, model, **decays)
