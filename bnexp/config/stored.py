"""Reads the config of a run's folder, as it is, with another place, or composed again with other overrides."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from bnexp.config.choices import GROUPS, SHELVES
from bnexp.config.compose import chosen_settings, composed, plain_value, takes_text
from bnexp.config.explain import check_value, explained, is_hydras, nearest_setting, parse_words
from bnexp.config.schema import MISSING, SETTINGS, Train
from bnexp.errors import UserError, unread
from bnexp.store.files import replacing
from bnexp.store.run_folder import CONFIG, STATUS, load_status
from bnexp.store.settings import COMMAND, DECIDES, PLACE, completed, decides
from bnexp.store.untrusted import read_yaml

PLACES = [key for key in DECIDES if decides(key) & PLACE]


def stored_config(folder: Path) -> DictConfig:
    """The config of a run folder, with the types and checks of one from the command line."""
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give that of a run")
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder}: holds no run, there is no {CONFIG} in it; give the folder of a run")
    try:
        stored = read_yaml(folder / CONFIG, takes_text)
    except OSError as error:
        raise unread(error, folder / CONFIG) from error
    except ValueError as error:
        raise UserError(f"{folder}: not a run's settings, {error}; put back the {CONFIG} that was written") from error
    kept = {key: value for key, value in completed(stored).items() if not decides(key) & COMMAND}
    for key, value in kept.items():
        if key not in SETTINGS:
            raise UserError(f"{folder / CONFIG}: {key}: there is no such setting{nearest_setting(key)}")
        check_value(key, value, f"{folder / CONFIG}: {key}={value}")
    cfg = OmegaConf.merge(OmegaConf.structured(Train), kept)
    OmegaConf.set_struct(cfg, True)
    return cfg


def moved(folder: Path, words: Sequence[str], command: str) -> DictConfig:
    """The stored config with other settings of the place (data.root, device, threads, ...) or another ``allow``."""
    able, parsed = [*PLACES, "allow"], parse_words(words)
    if odd := [each.input_line for each in parsed if each.key_or_group not in able or each.is_delete()]:
        raise UserError(
            f"{odd[0]}: {command} keeps the settings of the run and takes only {', '.join(able)}, each as name=value; "
            "bnexp rerun trains with other settings, in a new folder"
        )
    cfg = stored_config(folder)
    for each in parsed:
        key, value = each.key_or_group, plain_value(each)
        if "${" in str(value):
            raise UserError(f"{each.input_line}: ${{...}} is not looked up by {command}; write the value itself")
        if key in SETTINGS:
            check_value(key, value, each.input_line)
        elif OmegaConf.select(cfg, key, default=MISSING) == MISSING:
            raise UserError(f"{each.input_line}: the data of this run have no such option; leave it out")
        with explained(words):
            OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def remember_place(folder: Path, cfg: DictConfig) -> None:
    """Write the settings of the place in ``cfg`` that differ from those in the run's folder into its config.yaml."""
    here, there = ({key: OmegaConf.select(each, key) for key in PLACES} for each in (cfg, stored_config(folder)))
    if changes := {key: value for key, value in here.items() if value != there[key]}:
        stored = OmegaConf.create(read_yaml(folder / CONFIG))
        for key, value in changes.items():
            OmegaConf.update(stored, key, value)
        with replacing(folder / CONFIG) as file:
            file.write(OmegaConf.to_yaml(stored).encode())


def rerun_config(folder: Path, words: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """The config that ``bnexp train`` makes of a run's overrides followed by ``words``, and all these overrides.

    The folder's config can differ from what its overrides make today, because defaults have changed or a person edited
    it. The folder's values then win over the defaults, and ``words`` over both.
    """
    stored, before = stored_config(folder), stored_words(folder)
    if missing := OmegaConf.missing_keys(stored):
        raise UserError(f"{folder / CONFIG}: {min(missing)}: has to be given, nothing runs without it")
    try:
        base = composed(before)
    except UserError:  # overrides of another version, or entries that are not here
        base, before = composed([]), []
    if missing := OmegaConf.missing_keys(base):
        raise UserError(f"{folder}: its overrides leave out {min(missing)}, nothing runs without it")
    parsed = parse_words(words)
    if lists := [each.input_line for each in parsed if each.is_sweep_override()]:
        raise UserError(f"{lists[0]}: rerun takes one config; give one value")
    chosen = {each.key_or_group for each in parsed}
    words = _followed(_without_lost(before, words), parsed)
    cfg = composed(words, logs=True)
    if OmegaConf.missing_keys(cfg):  # which bnexp train refuses
        return cfg, words
    with open_dict(cfg):
        for group in (each for each in SHELVES if each not in chosen):
            if group == "probe" or _target(stored[group]) != _target(base[group]):
                if cfg[group] == base[group]:
                    cfg[group] = stored[group]
                elif stored[group] != base[group]:
                    raise UserError(f"{folder}: its {group} is not what its overrides make; give {group}=NAME too")
        there, then, now = map(_settings_and_options, (stored, base, cfg))
        for key, value in there.items():
            is_untouched = now.get(key, MISSING) == then.get(key, MISSING)
            if not {key, key.partition(".")[0]} & chosen and then.get(key, MISSING) != value and is_untouched:
                with explained([f"{folder / CONFIG}: {key}={value}"]):
                    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg, words


def _without_lost(before: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words ``before`` without options that an entry chosen in ``words`` does not have; nobody typed them now."""
    chosen = tuple(f"{each.key_or_group}." for each in parse_words(words) if not each.is_delete())
    options = [each for each in parse_words(before) if each.key_or_group.startswith(chosen)]
    known = [each for each in chosen_settings([*before, *words]) if "." in each] if options else []
    lost = [
        each.input_line for each in options
        if not each.input_line.startswith("+") and not any(_overlap(each.key_or_group, key) for key in known)
    ]  # fmt: skip
    return [word for word in before if word not in lost]


def _followed(before: Sequence[str], new: Sequence[Override]) -> list[str]:
    """The words ``before`` followed by the ``new`` ones; ``+x=1`` or ``~x`` that holds already is not repeated."""
    done = parse_words(before)
    for each in new:
        last = next((other for other in reversed(done) if _overlap(each.key_or_group, other.key_or_group)), None)
        is_once = each.is_add() or each.is_delete()  # Hydra refuses it the second time
        if not (is_once and each.input_line in before and last and last.input_line == each.input_line):
            done.append(each)
    return [each.input_line for each in done]


def _overlap(one: str, other: str) -> bool:
    """Whether one dotted key is the other, or lies inside it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _settings_and_options(cfg: DictConfig) -> dict[str, Any]:
    """Run-level settings, and options of groups as ``group.option``; what is nested below is one value."""
    found = {key: value for key, value in OmegaConf.to_container(cfg).items() if key not in SHELVES}
    groups = [group for group in GROUPS if isinstance(cfg[group], DictConfig)]
    return found | {f"{group}.{key}": value for group in groups for key, value in cfg[group].items()}


def _target(node: Any) -> Any:
    return node.get("_target_") if isinstance(node, DictConfig) else node


def stored_words(folder: Path) -> list[str]:
    """The overrides in a run's status but those of a command and those with a resolver; [] if they cannot be read."""
    try:
        words = load_status(folder)["overrides"]
        parsed = parse_words(words)
    except (FileNotFoundError, ValueError):  # also UserError
        return []
    except OSError as error:
        raise unread(error, folder / STATUS) from error
    return [
        each.input_line for each in parsed
        if not decides(each.key_or_group) & COMMAND and not is_hydras(each.key_or_group) and _is_harmless(each)
    ]  # fmt: skip


def _is_harmless(override: Override) -> bool:
    """Whether no resolver, such as ``${oc.env:HOME}``, can come from a stranger's word: it would read this machine.

    One reference to a setting, ``${seed}``, is harmless. Two could be put together to a resolver, and so could one
    beside ``$`` or ``{``.
    """
    text = str(override.value())
    return "${" not in text or bool(re.fullmatch(r"[^${]*\$\{[^:${}]*\}[^${]*", text))
