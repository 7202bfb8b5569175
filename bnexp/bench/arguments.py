"""What a person typed after ``bnexp bench``: which benchmark, with which settings."""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from bnexp.bench.results import check_out
from bnexp.errors import UserError

KINDS = ("norms", "loop")


def kind_of(arguments: Sequence[str]) -> str:
    """Which benchmark is asked for: the first word, ``norms`` if it is a setting already."""
    word = arguments[0] if arguments else ""
    if not word or "=" in word or word.startswith("-"):
        return KINDS[0]
    if word not in KINDS:
        raise UserError(
            f"bench {word}: nothing that is timed{_nearest(word, KINDS)}; choose {' or '.join(KINDS)}, "
            "and settings as setting=value"
        )
    return word


@dataclass(frozen=True)
class Form:
    """What a benchmark can be asked.

    ``settings`` is a dataclass with a default for each, ``choices`` what some of them can be, ``numbers`` are whole
    numbers, ``lists`` take several values with commas between them.
    """

    name: str
    settings: type
    usage: str
    choices: Mapping[str, Sequence[str]]
    numbers: Collection[str] = ("rounds",)
    lists: Collection[str] = ()

    def parse(self, arguments: Sequence[str]) -> Any:
        """The settings as typed, ``command`` the line that asks again; :class:`UserError` for what cannot be."""
        words = list(arguments)
        if {"-h", "--help"} & set(words):
            print(self.usage.format(**{key: " | ".join(values) for key, values in self.choices.items()}))
            raise SystemExit(0)
        if words and words[0] in KINDS:
            words.pop(0)
        known = [field.name for field in fields(self.settings) if field.name != "command"]
        given: dict[str, Any] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or not value or key not in known:
                near = _nearest(key, known)
                raise UserError(f"{word}: no setting of {self.name}{near}; settings are {', '.join(known)}")
            if key in given:
                raise UserError(f"{word}: {key} is given twice; give it once")
            values = [self._one(word, key, item) for item in (value.split(",") if key in self.lists else [value])]
            if len(set(values)) < len(values):
                raise UserError(f"{word}: a value stands there twice; give each once")
            given[key] = tuple(values) if key in self.lists else values[0]
        if "out" in given:
            check_out(Path(given["out"]))
        return self.settings(**given, command=shlex.join(["bnexp", "bench", *arguments]))

    def _one(self, word: str, key: str, value: str) -> int | str:
        """One value of a setting."""
        if key in self.numbers:
            if not (value.isdecimal() and int(value) > 0):
                what = "whole numbers, with commas between them," if key in self.lists else "a whole number,"
                raise UserError(f"{word}: has to be {what} 1 or more")
            return int(value)
        if value not in (choices := self.choices.get(key, (value,))):
            item = f" {value} is" if key in self.lists else ""
            raise UserError(f"{word}:{item} not known{_nearest(value, choices)}; choose {', '.join(choices)}")
        return value


def _nearest(word: str, known: Iterable[str]) -> str:
    found = get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
