"""Checks the overrides of a command line before Hydra reads them, so that every error names the word and a remedy."""

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from bnexp.config.choices import GROUPS, SHELVES, choices, defaults, entries
from bnexp.config.schema import SETTINGS, Train, in_words
from bnexp.errors import UserError, home_path, nearest
from bnexp.store.settings import as_typed
from bnexp.store.untrusted import check_name

PLAIN = "/-\\+.$%*@?|:_ "  # signs that Hydra reads without quotes
TILDE = ("~", "./~")
SYNONYMS = {  # what other programs call a setting; in lower case
    "optimizer.lr": "lr learning_rate learningrate base_lr", "optimizer.weight_decay": "wd l2",
    "batch_size": "bs bsz batch", "model": "net network arch architecture backbone",
    "norm": "bn batchnorm batch_norm normalization norm_layer",
    "data": "ds dataset", "optimizer": "opt optim", "schedule": "scheduler lr_scheduler", "device": "gpu gpus cuda cpu",
    "epochs": "num_epochs n_epochs max_epochs", "steps": "max_steps num_steps iterations iters",
    "threads": "workers num_workers cpus", "precision": "amp dtype", "out": "dir output output_dir logdir log_dir",
}  # fmt: skip
# Hydra's settings of what bnexp does itself; each ends with a dot, so that none is the beginning of another.
FOLDERS = ("hydra.run.", "hydra.sweep.", "hydra.output_subdir.", "hydra.job.chdir.", "hydra/output.")
JOBS = ("hydra.sweeper.", "hydra/sweeper.", "hydra.mode.")
NOW = "${now:%Y-%m-%d}/${now:%H-%M-%S}"
USUAL = {  # what conf/train.yaml and Hydra itself set
    "hydra.run.dir": (".", f"outputs/{NOW}"),
    "hydra.output_subdir": (None, ".hydra"),
    "hydra.sweep.dir": (f"multirun/{NOW}",),
    "hydra.sweep.subdir": ("${hydra.job.num}",),
    "hydra.job.chdir": (None, False),
    "hydra.mode": (None,),
    "hydra/sweeper": ("basic",),
    "hydra.sweeper._target_": ("hydra._internal.core_plugins.basic_sweeper.BasicSweeper",),
    "hydra.sweeper.max_batch_size": (None,),
    "hydra.sweeper.params": (None,),
}


def parse_words(words: Sequence[str], config_loader: object = None) -> list[Override]:
    """``words`` parsed by Hydra's grammar; ``config_loader`` expands ``glob(*)``."""
    parser = OverridesParser.create(config_loader)
    parsed = []
    for word in words:
        key, equals, value = word.partition("=")
        if value.startswith(TILDE):  # Hydra reads no ~, with which the home folder begins
            value = ",".join(quoted(each) if each.startswith(TILDE) else each for each in value.split(","))
        try:
            parsed += parser.parse_overrides([key + equals + value])
        except Exception as error:  # Hydra's own types and, for numbers of many digits, others
            raise UserError(unreadable(word)) from error
    return parsed


def unreadable(word: str) -> str:
    """The error text for a word that Hydra cannot read, with the word in quotes that the shell and Hydra take."""
    check_name(word)
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")
    if not equals or not name:
        return f"{word}: not a setting; write it as name=value"
    if not is_readable(f"{key}=1"):
        known = nearest_setting(name)
        return f"{word}: {name} cannot be the name of a setting{known}; bnexp train --help lists them all"
    signs = [sign for sign in value if not (sign.isascii() and sign.isalnum()) and sign not in PLAIN]
    what = f"the sign {signs[0]} in its value is read only in quotes" if signs else "its value cannot be read"
    proposed = f"{key}={quoted(value)}"
    if not is_readable(proposed):
        return f"{word}: its value cannot be read; give another"
    if name in ("out", "data.root"):
        home_path(value, f"{key}=")  # refuses ~ inside a path
    if name.partition(".")[0] in SHELVES and "." in name:
        values = values_in_entries(name)
        if found := [each for each in values if isinstance(each, list)]:
            return f"{word}: a list is expected, as in {name}={as_typed(found[0]).replace(' ', '')}"
        kinds = [kind for kind in (float, int, bool) if any(type(each) is kind for each in values)]
        if values and name != "data.root" and not any(isinstance(each, str) for each in values):
            return f"{word}: {in_words(kinds[0] if kinds else float)}{' or null' * (None in values)} is expected"
    else:
        try:
            check_words([proposed])
        except UserError as error:
            return str(error).replace(proposed.lstrip("+"), word)
    if "${" in value:
        return f"{word}: {what}, where ${{...}} would be looked up; give another value"
    if any(sign in proposed for sign in "$`\\!"):  # special inside a shell's double quotes
        return f"{word}: {what}; write {shlex.quote(proposed)}"
    return f"{word}: {what}; write " + '"' + proposed.replace('"', '\\"') + '"'


def is_readable(word: str) -> bool:
    """Whether Hydra's grammar takes the word."""
    try:
        OverridesParser.create().parse_override(word)
    except Exception:  # Hydra's own types and others
        return False
    return True


def values_in_entries(key: str) -> list[Any]:
    """The values that the entries of a group have for the option ``group.option`` or ``probe.name.option``."""
    group, *path = key.split(".")
    return [options[path[-1]] for options in entries(group).values() if path[-1] in options]


def quoted(value: str) -> str:
    """``value`` in quotes, which Hydra reads as this text."""
    for quote in "'\"":
        if quote not in value and not value.endswith("\\"):
            return f"{quote}{value}{quote}"
    tail = len(value) - len(value.rstrip("\\"))
    value = value[: len(value) - tail] + 2 * value[len(value) - tail :]
    return "'" + value.replace("\\'", "\\\\\\'").replace("'", "\\'") + "'"


def check_words(words: Sequence[str], folder: Path | None = None, known: Callable[[], Collection[str]] = tuple) -> None:
    """Raise :class:`UserError` for run-level settings, entries and values that do not exist.

    ``folder`` holds the user's own entries, ``known`` returns the dotted keys of the chosen entries. Options of entries
    are checked later, in the composed config.
    """
    for override in parse_words(words):
        key = override.key_or_group
        if not key:
            raise UserError(unreadable(override.input_line))
        if is_hydras(key):
            is_many = override.is_sweep_override()
            check_hydra(key, ... if is_many or override.is_delete() else override.value(), override.input_line)
            if is_many:
                raise UserError(f"{override.input_line}: holds for a sweep as a whole; give one value")
        elif override.is_sweep_override() and key == "out":
            name = override.input_line.partition("=")[2]
            raise UserError(f'{override.input_line}: one folder is expected; write "out={quoted(name)}" for this name')
        elif override.is_sweep_override():
            group, _, option = key.partition(".")
            options = {name for entry in entries(group, folder).values() for name in entry}
            is_new = override.is_add() or override.is_force_add() or "." in option or choices(key, folder)
            if not (is_new or key in SETTINGS or option in options):
                raise no_such_setting(key)
            raise UserError(
                f"{override.input_line}: several values at once are a sweep; add -m to train them all, "
                "or write one value (a list is written key=[a,b])"
            )
        elif key in SHELVES or (folder is not None and choices(key, folder)):
            check_choice(override, folder)
        elif "." not in key:
            check_setting(override, known)


def is_hydras(key: str) -> bool:
    """Whether the key, written without ``+`` or ``~``, is a setting or a group of Hydra's own."""
    return re.split("[./@]", key)[0] == "hydra"


def check_hydra(key: str, value: Any, given: str = "") -> None:
    """Raise :class:`UserError` for a setting of Hydra's, or one inside it, of what bnexp does itself."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            check_hydra(f"{key}.{name}", inner, given)
        return
    given, place = given or f"{key}={value}", f"{key}."
    if value in USUAL.get(key, ()):
        return
    elif place.startswith(JOBS):
        raise UserError(f"{given}: bnexp makes the jobs of a sweep itself; leave it out")
    elif place.startswith(FOLDERS):
        raise UserError(f"{given}: bnexp makes the folders of its runs; name one with out=DIR")
    elif (
        key == "hydra.launcher"
        or (key == "hydra/launcher" and not isinstance(value, str))
        or (key == "hydra.launcher._target_" and str(value) not in Plugins.instance().class_name_to_class)
    ):
        raise UserError(f"{given}: no launcher of Hydra's; choose one with hydra/launcher=NAME")


def check_choice(override: Override, folder: Path | None) -> None:
    """Raise :class:`UserError` for an entry that its group does not have."""
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        return
    known = choices(group, folder)
    remedy = f"choose one of {', '.join(known)}"
    if group == "probe":
        remedy = f"choose among {', '.join(known)}, as {group}=[{','.join(known[:2])}]"
    for name in value if isinstance(value, list) and group == "probe" else [value]:
        if not isinstance(name, str):
            raise UserError(f"{override.input_line}: a name is expected; {remedy}")
        if name not in known:
            raise UserError(f"{group}={name}: there is no such {group}{nearest(name, known)}; {remedy}")


def check_setting(override: Override, known: Callable[[], Collection[str]]) -> None:
    """Raise :class:`UserError` for a run-level setting that does not exist, or a value of another type."""
    key = override.key_or_group
    if key not in SETTINGS:
        if key == "study":
            raise UserError("study: not a setting but a command: bnexp study NAME")
        raise no_such_setting(key, known())
    if override.is_delete():
        raise UserError(f"~{key}: a setting of every run, which cannot be taken out; leave ~{key} out")
    check_value(key, override.value(), override.input_line.lstrip("+"))


def check_value(key: str, value: Any, given: str) -> None:
    """Raise :class:`UserError` for a value that a run-level setting cannot hold; ``given`` is the user's text."""
    try:
        _empty_config()[key] = value
    except Exception as error:
        if "${" in str(value):
            raise UserError(f"{given}: what begins with ${{ is not the name of a setting; write ${{NAME}}") from error
        hint = get_type_hints(Train)[key]
        form = f", written {key}=[a,b]," if get_origin(hint) is list else ""
        raise UserError(f"{given}: {in_words(hint)}{form} is expected") from error


@cache
def _empty_config() -> Any:
    """A config on which values are tried: OmegaConf decides what a type takes."""
    return OmegaConf.structured(Train)


def no_such_setting(key: str, known: Collection[str] = ()) -> UserError:
    """The error for a setting that does not exist; ``known`` are the dotted keys of the chosen entries."""
    group, _, option = key.partition(".")
    if option and key in known:
        return UserError(f"{key}: taken out by ~{key}; leave that out, or write +{key}=... after it")
    own = [each.removeprefix(f"{group}.") for each in known if each.startswith(f"{group}.") and "._" not in each]
    name, probes = option.partition(".")[0], choices("probe")
    if group == "probe" and name not in probes:
        return UserError(f"{key}: there is no such probe{nearest(name, probes)}; choose among {', '.join(probes)}")
    if group == "probe" and f"probe.{name}._target_" not in known:
        return UserError(f"{key}: the probe {name} is not chosen; choose it by probe=[{name}]")
    if is_hydras(key):
        return UserError(f"{key}: Hydra has no such setting; correct the name, or write +{key}=... for a new one")
    if not known or group not in GROUPS or not option:
        return UserError(
            f"{key}: there is no such setting{nearest_setting(key, known)}; bnexp train --help lists them all"
        )
    others = [entry for entry, options in entries(group).items() if option in options]
    where = f" in the chosen entries, it belongs to {group}={', '.join(others)}"
    where = where if others else nearest_synonym(key) or nearest(option, own, lambda name: f"{group}.{name}")
    return UserError(f"{key}: there is no such setting{where}; the chosen {group} has {', '.join(own) or 'no options'}")


def nearest_setting(key: str, known: Collection[str] = ()) -> str:
    """`` (did you mean X?)``, with the known setting that ends in ``key``, begins like it, or looks like it."""
    usual = (f"{group}.{option}" for group, name in defaults().items() for option in entries(group)[name])
    known = [each for each in known or [*SETTINGS, *usual] if "._" not in each]
    last = key.rpartition(".")[2]
    if found := nearest_synonym(last):
        return found
    ends = {name.rpartition(".")[2]: name for name in reversed(known)}
    alike = [each for each in known if each.startswith(key) or re.fullmatch(f"{re.escape(each)}[a-z]+", key)]
    if last in ends or alike:
        return f" (did you mean {ends.get(last) or alike[0]}?)"
    for group in GROUPS:
        for entry, options in entries(group).items():
            if last in options:
                return f" (did you mean {group}.{last}, with {group}={entry}?)"
    group = key.partition(".")[0]
    inside = {name: f"{group}.{name}" for entry in entries(group).values() for name in entry}
    return nearest(last, inside, inside.__getitem__) or nearest(key, known) or nearest(last, ends, ends.__getitem__)


def nearest_synonym(key: str) -> str:
    """`` (did you mean X?)`` if other programs call the setting X by the last part of ``key``, else nothing."""
    name = key.rpartition(".")[2].lower()
    return next((f" (did you mean {each}?)" for each, names in SYNONYMS.items() if name in names.split()), "")


@contextmanager
def explained(words: Sequence[str], known: Callable[[], Collection[str]] = tuple) -> Iterator[None]:
    """Turn the errors of Hydra and OmegaConf into :class:`UserError` that names the ``words``.

    ``known`` returns the dotted keys of the chosen entries.
    """
    try:
        yield
    except UserError:
        raise
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        known = list(error.options or ())
        choice = f"; choose one of {', '.join(known)}" if known else f" ({' '.join(str(error).split())[:300]})"
        group = group or "config"
        raise UserError(f"{group}={name}: there is no such {group}{nearest(name, known)}{choice}") from error
    except Exception as error:  # their own types and many others
        causes = (error.__cause__, error, error.__context__)
        cause = next((each for each in causes if isinstance(each, OmegaConfBaseException)), error.__cause__ or error)
        key = getattr(cause, "full_key", None)
        given, text = " ".join(words) or "the settings", str(cause).partition("\n")[0] or type(error).__name__
        unknown = re.match(r"Could not (?:override|delete from config\.) '(\S+)'(?!.*default)", str(error), re.DOTALL)
        if unknown or (key and "not in struct" in str(error)):
            raise no_such_setting(unknown[1] if unknown else key, known()) from error
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            raise UserError(f"{given}: {key}: there is no such setting{nearest_setting(key)}; take it out") from error
        if isinstance(cause, MissingMandatoryValue):
            raise UserError(f"{given}: {key}: has to be given, it has no default") from error
        if isinstance(cause, GrammarParseError | InterpolationResolutionError):
            given = " ".join(word for word in words if "${" in word) or given
        raise UserError(f"cannot use {given}: {f'{key}: ' if key else ''}{text}") from error
