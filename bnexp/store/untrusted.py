"""Readers for files that a stranger may have written, such as a run's folder, a sweep or a study.

No file can hang the process, fill its memory, run code or read the environment. A file that could is refused by a
ValueError that names the file and the reason. A missing file is a FileNotFoundError.
"""

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from bnexp.errors import UserError

MOST_YAML, MOST_JSON, MOST_LINE = 100_000, 2**24, 2**22  # bytes of a file, of a file and of a line
DEEPEST = 30  # nested lists and tables
LARGEST = 2**63  # bound of whole numbers: torch has no larger ones, and Python does not print very large ones
# Control characters, line and paragraph separators, changes of direction, lone surrogates.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, most: int = 10_000) -> str:
    """``text`` on one line, at most ``most`` characters, with control characters escaped (``\\x1b``)."""
    text = str(text)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def check_name(name: str | Path) -> None:
    """Raise :class:`UserError` for a name with control characters, which may be a locale's reading of UTF-8."""
    if not UNPRINTABLE.search(str(name)):
        return
    try:
        meant = os.fsencode(name).decode()
    except UnicodeError:
        raise UserError(f"{name}: not UTF-8 text; rename the file or folder") from None
    if meant == str(name):
        raise UserError(f"{name}: control characters in the name of a file or folder; give it another")
    import locale

    here = locale.setlocale(locale.LC_CTYPE)
    raise UserError(f"{meant}: the locale {here} cannot hold this UTF-8 text; set PYTHONUTF8=1 and try again")


def as_file_name(text: str) -> str:
    """``text`` as the name of a file: no slashes, no leading dots, at most 150 bytes."""
    return re.sub(r"[/\\]|^\.+", "_", printable(text)).encode()[:150].decode(errors="ignore")


def open_file(path: Path) -> BinaryIO:
    """Open the regular file at ``path``; a pipe would block and a device has no end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise ValueError(f"{path.name}: not a regular file, but a pipe or a device")


def read(path: Path, most: int) -> bytes:
    """The content of the file at ``path``; ValueError if it is longer than ``most`` bytes."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path.name}: longer than {most:,} bytes")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(read(path, MOST_JSON))
    except RecursionError:
        raise ValueError(f"{path.name}: nested deeper than {DEEPEST} levels") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: not a JSON object, but a {type(content).__name__}")
    level = [content]
    for _ in range(DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [item for each in inner for item in each]
    if level:
        raise ValueError(f"{path.name}: nested deeper than {DEEPEST} levels")
    return content


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, each with a ``step``; a last line that is cut short is dropped."""
    with open_file(path) as file:
        number = 0
        while line := file.readline(MOST_LINE + 1):
            number += 1
            if len(line) > MOST_LINE:
                raise ValueError(f"{path.name}: line {number} is longer than {MOST_LINE:,} bytes")
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError):  # also a number of too many digits
                if not file.peek(1):
                    return
                raise ValueError(f"{path.name}: line {number} is not JSON") from None
            if not isinstance(row, dict) or not is_step(row.get("step")):
                raise ValueError(f"{path.name}: line {number} is not a JSON object with a step")
            yield row


def is_step(value: object) -> bool:
    """Whether ``value`` can be a number of steps: a whole number that a float holds exactly."""
    return type(value) is int and 0 <= value < 2**53


def number(value: object, what: str) -> float:
    """``value`` as a float, null as NaN."""
    try:
        if value is None or type(value) in (int, float):
            return math.nan if value is None else float(value)
    except OverflowError:
        pass
    raise ValueError(f"{what}: {printable(json.dumps(value), 30)} is not a number that can be used")


def read_yaml(path: Path, takes_text: Callable[[str], bool] = lambda key: False) -> dict[str, Any]:
    """The table in a YAML file of settings: names, and below them text, numbers, true, false and null.

    Settings whose dotted key ``takes_text`` get the text that was typed, see :func:`keep_texts`.

    Refused are references (``*name``), with which ten lines can hold a billion values, tags (``!!name``), which ask
    for other types, and interpolations (``${...}``), which would read the environment of the person who loads the file.
    """
    import yaml

    text = read(path, MOST_YAML)
    try:
        _check_events(text)
        content = yaml.load(text, _loader())
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two from numbers
        raise ValueError(f"{path.name}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: holds no settings")
    _check_settings(content, path.name)
    keep_texts(content, text, takes_text)
    return content


def keep_texts(content: Any, text: bytes, takes_text: Callable[[str], bool], package: str = "") -> None:
    """Put back the text that was typed where ``content``, loaded from YAML, holds a number or true or false for it.

    This changes the dotted keys that ``takes_text``, and the items of their lists. ``package`` is the key of the whole.
    """
    import yaml

    def walk(content: Any, node: Any, key: str) -> None:
        pairs = (
            [(name.value, inner) for name, inner in node.value] if isinstance(content, dict) else enumerate(node.value)
        )
        for name, inner in pairs:
            inner_key = f"{key}.{name}".lstrip(".") if isinstance(content, dict) else key
            value = content.get(name) if isinstance(content, dict) else content[name]
            if isinstance(value, dict | list):
                walk(value, inner, inner_key)
            elif isinstance(value, bool | int | float) and takes_text(inner_key):
                content[name] = inner.value

    if content:
        walk(content, yaml.compose(text, _loader()), package)


def _check_events(text: bytes) -> None:
    """Check the events of a YAML file before values are built from it, because building recurses."""
    import yaml

    depth = 0
    for event in yaml.parse(text, _loader()):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        where = f"line {event.start_mark.line + 1}"
        if depth > DEEPEST:
            raise ValueError(f"{where}: nested deeper than {DEEPEST} levels")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{where}: *{event.anchor} refers to another place; write the value itself")
        if getattr(event, "tag", None):
            raise ValueError(f"{where}: the tag {event.tag} is not allowed in settings")


def _check_settings(value: object, where: str) -> None:
    """Raise ValueError for a value that no setting can have."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: {printable(key, 30)} cannot be the name of a setting")
            _check_settings(key, f"{where}: a name")
            _check_settings(inner, f"{where}: {key}" if where.count(":") == 0 else f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            _check_settings(inner, where)
    elif isinstance(value, str):
        if UNPRINTABLE.search(value.replace("\n", "").replace("\t", "")):
            raise ValueError(f"{where}: holds control characters ({printable(value, 30)})")
        if "${" in value:
            raise ValueError(f"{where}: holds ${{...}}, which would be looked up; write the value itself")
    elif type(value) is int:
        if not -LARGEST <= value < LARGEST:
            raise ValueError(f"{where}: a whole number beyond 64 bits")
    elif value is not None and type(value) not in (bool, float):
        raise ValueError(f"{where}: a {type(value).__name__} cannot be a setting")


@cache
def _loader() -> type:
    """A YAML loader with OmegaConf's rules: 1e-3 is a number, a date is text, a repeated name is an error."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # C: ten times as fast
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names: set[str] = set()
            for name, mark in ((str(key.value), key.start_mark) for key, _ in node.value):
                if name in names:
                    raise yaml.constructor.ConstructorError(problem=f"{name} stands twice", problem_mark=mark)
                names.add(name)
            return super().construct_mapping(node, deep)

    exponent = re.compile(r"^[-+]?[0-9]+\.?[0-9]*[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    Loader.yaml_implicit_resolvers = {
        first: [each for each in resolvers if not each[0].endswith(":timestamp")]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    return Loader
