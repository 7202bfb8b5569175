"""Composes configs from overrides by Hydra, and names them."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from hydra._internal.core_plugins.file_config_source import FileConfigSource as FileSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.utils import configure_log
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from bnexp.config.choices import GROUPS, SHELVES, choices, conf_dir, entries
from bnexp.config.explain import check_hydra, check_words, explained, is_readable, parse_words, quoted
from bnexp.config.schema import SETTINGS, Train, is_text
from bnexp.errors import UserError, home_path
from bnexp.startup import quick_imports
from bnexp.store.settings import flatten, numbers, short_name, stands_for
from bnexp.store.untrusted import as_file_name, keep_texts

ORDERS = ("product", "zip")  # of sweep_order
ConfigStore.instance().store(name="schema", node=Train)


@dataclass(frozen=True)
class Source:
    """Where configs come from, besides ``conf/``."""

    folder: Path | None = None  # the user's own entries
    main: str = "train"  # the main config


_source = Source()  # of the current session


@contextmanager
def session(source: Source = Source()) -> Iterator[None]:  # noqa: B008 (frozen)
    """Prepare Hydra to compose; inside another session this does nothing."""
    global _source
    if GlobalHydra.instance().is_initialized():
        yield
        return
    search_path = create_config_search_path(str(conf_dir()))
    if source.folder is not None:
        search_path.prepend("command-line", f"file://{source.folder.resolve()}", "schema")
    Hydra.create_main_hydra2("bnexp", search_path)
    _source = source
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        _source = Source()


class FileConfigSource(FileSource):
    """Hydra's reader of yaml files; text settings in files of the user's own get the text that was typed.

    Hydra takes the first reader that has registered under a name.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        if Path(self.path) == conf_dir():
            return result
        group, _, name = config_path.replace("/", ".").removesuffix(".yaml").rpartition(".")
        if group == "probe" and not result.header.get("package"):
            result.header["package"] = f"probe.{name}"  # several probes are chosen at once
        package = (result.header.get("package") or "_group_").replace("_group_", group).replace("_global_", "")
        content = OmegaConf.to_container(result.config)
        path = Path(self.path) / self._normalize_file_name(config_path)
        keep_texts(content, path.read_bytes(), takes_text, package)
        result.config = OmegaConf.create(content)
        return result


SourcesRegistry.instance().register(FileConfigSource)


def composed(words: Sequence[str], *, logs: bool = False) -> DictConfig:
    """The config of these overrides, with interpolations resolved; ``logs=True`` starts Hydra's logging."""
    with session():
        known = partial(chosen_settings, words)
        check_words(words, _source.folder, known)
        words = quote_texts(words)
        with explained([*words, *[f"--config-name {_source.main}"] * (_source.main != Source.main)], known):
            cfg = composed_with_hydra(words, RunMode.RUN)
            check_hydra("hydra", OmegaConf.to_container(cfg.hydra))
            HydraConfig.instance().set_config(cfg)
            if logs:
                configure_log(cfg.hydra.job_logging, cfg.hydra.verbose)
            with open_dict(cfg):
                del cfg["hydra"]
            OmegaConf.resolve(cfg)
    leave_to_model(cfg, words)
    if cfg.get("out"):
        out = home_path(cfg.out, "out=")  # no folder is made that .. leaves again
        cfg.out = os.path.realpath(out) if ".." in out.parts else str(out)
    if (order := cfg.get("sweep_order", ORDERS[0])) not in ORDERS:
        raise UserError(f"sweep_order={order}: not known; choose {' or '.join(ORDERS)}")
    return cfg


def leave_to_model(cfg: DictConfig, words: Sequence[str]) -> None:
    """Take the usual eps and momentum out of the norm's options, unless given, if the model brings its own."""
    given = {each.key_or_group for each in parse_words(words)}
    if str(OmegaConf.select(cfg, "model._target_")).startswith("bnexp.models.foreign."):
        for key, usual in (("eps", 1e-5), ("momentum", 0.1)):
            if f"norm.{key}" not in given and OmegaConf.select(cfg, f"norm.{key}") == usual:
                with open_dict(cfg):
                    del cfg.norm[key]


def chosen_settings(words: Sequence[str]) -> list[str]:
    """The dotted keys of the config that the entries chosen in ``words`` make."""
    groups = [each.input_line for each in parse_words(words) if choices(each.key_or_group, _source.folder)]
    with session(), explained(groups):
        cfg = OmegaConf.to_container(composed_with_hydra(groups, RunMode.RUN))
    return [*SETTINGS, *flatten({group: cfg[group] for group in SHELVES})]


def composed_with_hydra(words: Sequence[str], mode: RunMode) -> DictConfig:
    """The config with Hydra's own settings, which its launchers need; must be called inside a session."""
    return GlobalHydra.instance().hydra.compose_config(_source.main, list(words), mode)


def quote_texts(words: Sequence[str]) -> list[str]:
    """The words, with the value of a text setting in quotes if Hydra would read a number: ``out=2026_11_28``."""
    return [typed(override) for override in parse_words(words)]


def typed(override: Override) -> str:
    """The word of one override, with texts in its value in quotes where Hydra would read a number."""
    key, equals, value = override.input_line.partition("=")
    if f"{key}.".startswith(("model.args.", "norm.args.")):
        return f"++{override.input_line}"  # arguments of code that is not ours: any name
    text = as_texts(value) if equals and not override.is_sweep_override() else value
    return f"{key}={text}" if text != value and takes_text(override.key_or_group) else override.input_line


def as_texts(value: str) -> str:
    """``value`` in Hydra's grammar with every number, true or false, in a list too, as the text that was typed."""
    (override,) = parse_words([f"a={value}"])
    if isinstance(override.value(), list):
        return f"[{','.join(map(as_texts, split(value.strip()[1:-1])))}]"
    return quoted(value.strip()) if isinstance(override.value(), bool | int | float) else value


def split(text: str) -> list[str]:
    """The values between the commas of ``text`` outside quotes and brackets."""
    values: list[str] = []
    for each in text.split(",") if text.strip() else ():
        if values and not is_readable(f"a={values[-1]}"):
            values[-1] += f",{each}"
        else:
            values.append(each)
    return values


def values_of(override: Override) -> list[str]:
    """The values of a list ``key=a,b`` in Hydra's grammar; of a text setting, the texts that were typed."""
    values = list(override.sweep_string_iterator())
    key, _, text = override.input_line.partition("=")
    texts = split(text) if takes_text(override.key_or_group) else []
    if len(texts) != len(values):
        return values
    return [word.partition("=")[2] for word in quote_texts([f"{key}={each}" for each in texts])]


def plain_value(override: Override) -> Any:
    """The one value of an override; text settings get the text that was typed."""
    if override.is_sweep_override():
        raise UserError(f"{override.input_line}: one value is expected")
    (override,) = parse_words([typed(override)])
    return override.value()


def takes_text(key: str) -> bool:
    """Whether the setting with this dotted key is text, by the schema or by the values in the entries of its group."""
    group, *entry, option = key.split(".") if "." in key else (key, "")  # probe.NAME.option names the entry
    if not option:
        return is_text(get_type_hints(Train).get(group, Any))
    for folder in (None, _source.folder):  # a user's own entry says nothing about an option of bnexp's
        found = [each for name, each in entries(group, folder).items() if option in each and entry in ([], [name])]
        if found and folder is None and any(isinstance(options[option], bool | int | float) for options in found):
            return False
        if found:
            return any(isinstance(each[option], str) or is_text(_type_of(each, option)) for each in found)
    return False


def _type_of(options: dict[str, Any], option: str) -> Any:
    """The type that the target of an entry annotates an option with."""
    from hydra.utils import get_object

    try:
        with quick_imports():  # the first that needs torch
            target = get_object(options["_target_"])
        return get_type_hints(target.__init__ if isinstance(target, type) else target).get(option, Any)
    except Exception:  # a target that is not bnexp's; it is checked later
        return Any


def run_name(cfg: DictConfig) -> str:
    """``lenet-none-s0``."""
    return f"{_label(cfg)}-s{cfg.seed}"


def _label(cfg: DictConfig) -> str:
    return "-".join(as_file_name(short_name(stands_for(each))) for each in (cfg.model, cfg.norm))


def hparams(cfg: DictConfig) -> dict[str, bool | int | float | str]:
    """The flat settings that make the variant, with the values that TensorBoard's HParams take."""
    named = {group: short_name(cfg[group]._target_) for group in GROUPS}
    flat = numbers(OmegaConf.to_container(cfg, resolve=True))
    plain = {key: value for key, value in flat.items() if not key.endswith("._target_")}
    return named | {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in plain.items()}


def group_name(cfg: DictConfig) -> str:
    """A name that all seeds of a variant share, and no other variant has."""
    text = json.dumps(hparams(cfg), sort_keys=True)
    return f"{_label(cfg)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
