"""Which classes and functions a ``_target_`` in a config may name, and whether its options fit.

A run's folder can come from a stranger. A config therefore reaches bnexp's own parts, the modules and optimizers of
torch, torchvision's models, and packages that the person at the keyboard names with ``allow=[...]``.
"""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from bnexp.config.choices import choices
from bnexp.config.explain import is_readable, parse_words
from bnexp.config.schema import fits, in_words
from bnexp.errors import UserError
from bnexp.store.settings import as_typed

DECAYS = ("weight_decay", "norm_weight_decay")  # options of an optimizer that bnexp gives per parameter group
OURS = {**dict.fromkeys(DECAYS, float), "only": str | None}  # what bnexp reads itself, and its type
HOMES = {  # where the parts of a group live in bnexp
    "model": "bnexp.models", "norm": "bnexp.norms", "data": "bnexp.data", "schedule": "bnexp.optim",
    "engine": "bnexp.engines", "probe": "bnexp.probes",
}  # fmt: skip
# Classes of torch that a group takes too.
KINDS = {"model": nn.Module, "norm": nn.Module, "optimizer": Optimizer}
CALLS = {  # the arguments that a target is called with, besides its options; their values do not matter
    "model": ((0, 0, 0), {}), "norm": ((0,), {"activation": 0}), "data": ((), {}), "optimizer": ((0,), {}),
    "schedule": ((0, 0), {}), "engine": ((0,), {}), "probe": ((), {}),
}  # fmt: skip


def check_allow(allow: Collection[str]) -> None:
    """Raise :class:`UserError` for a name in ``allow=[...]`` that is no package here; imports none.

    With ``allow`` the current folder is searched too, last.
    """
    if allow and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in allow:
        try:
            is_here = name.isidentifier() and (name in sys.modules or importlib.util.find_spec(name) is not None)
        except (ImportError, ValueError):
            is_here = False
        if not is_here:
            what = f"there is no package {name} here, and no {name}.py in this folder"
            raise UserError(f"allow=[{name}]: {what}; install it, or correct the name in allow= or path=")


def find_target(group: str, path: str, allow: Collection[str], key: str = "_target_") -> Callable[..., Any]:
    """The class or function that ``_target_``, or another ``key``, names; :class:`UserError` if it may not be named."""
    path, home = str(path), HOMES.get(group, f"bnexp.{group}")
    known = f"{home} or torch's {KINDS[group].__name__}s" if group in KINDS else home
    refused = UserError(f"{group}.{key}={path}: not a part that {group}= takes; name one of {known}")
    package = path.partition(".")[0]
    if package not in ("bnexp", "torch", "torchvision", *allow):
        raise UserError(
            f"{group}.{key}={path}: configs may name classes of bnexp, torch and torchvision only; "
            f"if you trust {package}, add allow=[{package}]"
        )
    if package == "bnexp" and not path.startswith(home):
        raise refused  # before importing, which may do things
    module_name, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # importing a module can fail in any way
        raise UserError(f"{group}.{key}={path}: cannot be found ({error})") from error
    lives = getattr(target, "__module__", None) or ""
    is_ours = (lives + ".").startswith(home + ".") and (group != "data" or isinstance(target, type))
    is_trusted = package in allow and lives.partition(".")[0] == package
    is_part = isinstance(target, type) and issubclass(target, KINDS.get(group, ()))
    is_model = group == "model" and inspect.isfunction(target) and lives.startswith("torchvision.models.")
    if not (callable(target) and (is_ours or is_trusted or is_part or is_model)):
        raise refused
    return target


def check_options(group: str, node: DictConfig, allow: Collection[str], label: str = "") -> None:
    """Raise :class:`UserError` for an option that the entry's target does not take, or not with that type.

    ``label`` is the entry's key if it is not the group's name.
    """
    label = label or group
    choice = f"; choose probes by probe=[NAME], among {', '.join(choices(group))}" if group == "probe" else ""
    if not isinstance(node, DictConfig) or "_target_" not in node.keys():  # noqa: SIM118 (in hides what is missing)
        raise UserError(f"{label}={node}: an entry of the group is expected, which has a _target_{choice}")
    if missing := OmegaConf.missing_keys(node):
        raise UserError(f"{label}.{sorted(missing)[0].rpartition('.')[2]}: has to be given, it has no default")
    options = OmegaConf.to_container(node, resolve=True)
    target = find_target(group, options["_target_"], allow)
    accepted = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    ours = options["_target_"].startswith("bnexp.")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for key, value in options.items():
        if key in ("_target_", "_partial_"):
            continue
        is_ours = group == "optimizer" and key in OURS or group == "data" and is_unasked(target, key, value)
        if not isinstance(key, str) or key.startswith("_") or _mentions_target(value):
            raise UserError(f"{label}.{key}: an entry names one _target_ and plain options, nothing else")
        if not is_ours and key not in accepted and not takes_any:
            known = ", ".join(k for k in accepted if k in options) or "none"
            given = f"{label}.{key}={as_typed(value)}"
            raise UserError(f"{given}: {options['_target_']} takes no such option; set here: {known}")
        hint = OURS.get(key, Any) if is_ours else hints.get(key, Any)
        plain = unquoted(value)
        if plain is not value and hint is Any and not isinstance(accepted[key].default, str) and ours:
            hint = type(plain)  # bnexp leaves the type out where an option takes several
        if not fits(value, hint):
            if isinstance(value, dict) and value:
                key = f"{label}.{key}"
                raise UserError(
                    f"{key}.{next(iter(value))}: nothing is inside {key}, {in_words(hint)} is expected; write {key}=..."
                )
            shown, how = (as_typed(value), "") if plain is value else (f"'{value}'", ", without quotes")
            raise UserError(f"{label}.{key}={shown}: {in_words(hint)} is expected{how}")
    positional, named = CALLS[group]
    named = named | {key: value for key, value in options.items() if key in accepted}
    try:
        inspect.signature(target).bind(*positional, **named)
    except TypeError as error:
        path = options["_target_"]
        raise UserError(f"{label}._target_={path}: cannot be called as a {group} is ({error})") from error


def unquoted(value: Any) -> Any:
    """The number, true, false or null that Hydra would read in the text ``value``; else ``value`` itself."""
    if not isinstance(value, str) or not is_readable(f"a={value}"):
        return value
    (override,) = parse_words([f"a={value}"])
    plain = None if override.is_sweep_override() else override.value()
    return plain if isinstance(plain, bool | int | float) or value.lower() == "null" else value


def is_unasked(target: Callable[..., Any], key: str, value: Any) -> bool:
    """Whether ``target``, a source of the user's own, does not take an option of data that changes nothing."""
    is_idle = (key, value) in (("corrupt", "none"), ("strength", None))
    return is_idle and key not in inspect.signature(target).parameters


def _mentions_target(value: Any) -> bool:
    """Whether ``value`` holds a ``_target_`` at any depth."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_mentions_target, value.values()))
    return isinstance(value, list) and any(map(_mentions_target, value))
