"""A study: a published claim as one yaml, with the runs that test it and what they should show."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from bnexp.config.choices import choices, conf_dir
from bnexp.config.compose import takes_text
from bnexp.config.explain import explained, is_hydras, parse_words
from bnexp.config.schema import fits, is_text
from bnexp.errors import UserError, home_path, nearest, unread
from bnexp.report.expectations import Expectation
from bnexp.store.settings import PERSON, decides
from bnexp.store.untrusted import read_yaml

FORMS = ("quick", "full")
HOW = ("compare", "sweep")


@dataclass
class Form:
    """A quick or full form of a study: its settings are added to the study's, its other fields replace the study's."""

    takes: str | None = None
    settings: list[str] = field(default_factory=list)
    sweep: dict[str, list[Any]] | None = None
    variants: dict[str, Any] | None = None
    expect: list[dict[str, Any]] | None = None
    how: str | None = None


@dataclass
class Study:
    """A claim, where it comes from, the runs that test it, and what they should show."""

    title: str
    source: str
    takes: str  # the time on two CPU cores
    variants: dict[str, Any]  # role: an override or a list of overrides; the first role is the baseline
    expect: list[dict[str, Any]]  # the fields of an Expectation each
    settings: list[str] = field(default_factory=list)  # overrides that all runs share
    sweep: dict[str, list[Any]] = field(default_factory=dict)  # setting: values, crossed with the variants
    seeds: int = 5  # their number
    first_seed: int = 20
    settled_on: list[int] = field(default_factory=list)  # the seeds that the expectations were found with, others
    amended: str | None = None  # what was changed in the expectations after they had been published, and why
    how: str = "compare"  # compare: in lockstep; sweep: one run after the other
    best_over: str | None = None  # the report takes every variant at its best value of this setting
    choose_on: int | None = None  # the first so many seeds choose that value, and the others are judged
    epochs: bool = False  # print the readings of every epoch
    forms: dict[str, Form] = field(default_factory=dict)

    @property
    def own_seeds(self) -> range:
        """The seeds that test the expectations."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def expectations(self) -> list[Expectation]:
        """The expectations of the study; :class:`UserError` for one that does not fit its fields or variants."""
        found, hints = [], get_type_hints(Expectation)
        for each in self.expect:
            for key, value in each.items():
                pairs = value.values() if key == "where" and isinstance(value, dict) else ()
                if not fits(value, hints.get(key, Any)) or not all(len(pair) == 2 for pair in pairs):
                    raise UserError(f"expect {each}: {key} cannot be {value}; see bnexp/report/expectations.py")
            try:
                found.append(Expectation(**each))
            except TypeError as error:
                raise UserError(f"expect {each}: {error}; see bnexp/report/expectations.py") from error
            found[-1].check(list(self.variants))
        if used := [seed for seed in self.settled_on if seed in self.own_seeds]:
            raise UserError(f"seeds: {used[0]} is one that the expectations were settled on, so it cannot test them")
        return found


def load(name: str) -> Study:
    """The study of this name in ``conf/study``, or in the user's own file if ``name`` ends with .yaml or .yml."""
    path = home_path(name, "study ") if name.endswith((".yaml", ".yml")) else conf_dir() / "study" / f"{name}.yaml"
    try:
        content = read_yaml(path, takes_text_in_study)
    except FileNotFoundError:
        known = choices("study")
        near = nearest(name, known)
        raise UserError(f"study {name}: there is no such study{near}; choose one of {', '.join(known)}") from None
    except OSError as error:
        raise unread(error, path) from error
    except ValueError as error:
        raise UserError(f"study {name}: cannot be read ({error}); correct the file") from error
    with explained([name]):
        study = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Study), content))
        check_study_words(study)
        for form in study.forms.values():
            check_study_words(form)
    return study


def takes_text_in_study(key: str) -> bool:
    """Whether a field of a study, or a setting in its ``sweep`` or ``only``, is text."""
    field, _, inner = re.sub(r"^forms\.[^.]*\.", "", key).partition(".")
    if field == "sweep" or inner.startswith("only."):
        return takes_text(inner.removeprefix("only."))
    return is_text(get_type_hints(Expectation if field == "expect" else Study).get(inner or field))


def check_study_words(study: Study | Form) -> None:
    """Raise :class:`UserError` for settings that a study may not have, because a stranger can have written it.

    Only the person at the keyboard decides where files are written, which packages are trusted and what Hydra starts.
    """
    words = [*study.settings, *(f"{key}=0" for key in study.sweep or {})]
    for role, own in (study.variants or {}).items():
        if not re.fullmatch(r"\w[\w.+-]{,59}", role):
            raise UserError(f"variants.{role}: cannot name a folder; use letters, digits, and then _ . + - too")
        words += own if isinstance(own, list) else [own]
    if odd := [word for word in words if not isinstance(word, str)]:
        raise UserError(f"{odd[0]}: not a setting; write it as text, name=value")
    for override in parse_words(words):
        key = override.key_or_group
        if decides(key) & PERSON or is_hydras(key):
            raise UserError(f"{override.input_line}: not allowed in a study; give it on the command line")


def choose(study: Study, arguments: Sequence[str]) -> tuple[Study, list[str]]:
    """The study with the form and the variants of the command line, and the arguments that are overrides.

    ``quick=true`` on a study without a quick form is ignored, and so is ``full=true``.
    """
    overrides, form, changes = [], None, {}
    for word in arguments:
        key, _, value = word.partition("=")
        if key in FORMS:
            if value not in ("true", "false"):
                raise UserError(f"{word}: true or false is expected")
            form = key if value == "true" else form
        elif key.startswith("variants."):
            changes[key.removeprefix("variants.")] = value.split()
        else:
            overrides.append(word)
    if form in study.forms:
        other = study.forms[form]
        given = {key: value for key, value in vars(other).items() if value is not None}
        study = replace(study, **given | {"settings": [*study.settings, *other.settings]})
    if unknown := [role for role in changes if role not in study.variants]:
        known = ", ".join(study.variants)
        raise UserError(f"variants.{unknown[0]}: this study has no such variant; its variants are {known}")
    if study.how not in HOW:
        raise UserError(f"how: {study.how}: not known; choose one of {', '.join(HOW)}")
    return replace(study, variants=study.variants | changes), overrides
