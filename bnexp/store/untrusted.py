"""Reads files that a stranger may have written, so that none of them can hang us, fill the memory or look things up.

A run's folder, a sweep or a study can come from anybody. What cannot be taken is a ValueError that names the file and
says why, before it does harm; a file that is not there is a FileNotFoundError.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

MOST_YAML, MOST_JSON, MOST_LINE = 100_000, 2**24, 2**22  # bytes of a file, of a file and of a line
DEEPEST = 30  # levels of lists and tables in each other
LARGEST = 2**63  # of whole numbers: torch knows no larger, and Python cannot print the very large
# Control characters, ends of lines and paragraphs, turned directions, halves of characters: what is no text.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, most: int = 10_000) -> str:
    """``text`` on one line, with nothing in it that a terminal would obey: ``\\x1b`` stands for the character."""
    text = str(text)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def as_file_name(text: str) -> str:
    """``text`` as the name of a file in whichever folder it is put, as short as file systems want it."""
    return re.sub(r"[/\\]|^\.+", "_", printable(text)).encode()[:150].decode(errors="ignore")


def open_file(path: Path) -> BinaryIO:
    """The file at ``path``, if it is one: a pipe would be waited for, and a device has no end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise ValueError(f"{path.name}: a pipe or a device and no file")


def read(path: Path, most: int) -> bytes:
    """What the file at ``path`` holds, ``most`` bytes or fewer."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path.name}: longer than the {most:,} bytes that are read of it")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        content = json.loads(read(path, MOST_JSON))
    except RecursionError:
        raise ValueError(f"{path.name}: nested deeper than {DEEPEST} levels") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name}: no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: no JSON object, but a {type(content).__name__}")
    level = [content]
    for _ in range(DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [item for each in inner for item in each]
    if level:
        raise ValueError(f"{path.name}: nested deeper than {DEEPEST} levels")
    return content


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that has one per line, each with its ``step``; a last line cut short is dropped."""
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
                raise ValueError(f"{path.name}: line {number} is no JSON") from None
            step = row.get("step") if isinstance(row, dict) else None
            if type(step) is not int or not 0 <= step < 2**53:
                raise ValueError(f"{path.name}: line {number} is no JSON object with a step")
            yield row


def number(value: object, what: str) -> float:
    """``value`` as a float, null as NaN."""
    try:
        if value is None or type(value) in (int, float):
            return math.nan if value is None else float(value)
    except OverflowError:
        pass
    raise ValueError(f"{what}: {printable(json.dumps(value), 30)} is no number that can be used")


def read_yaml(path: Path) -> dict[str, Any]:
    """The table that a YAML file of settings holds: names, and below them text, numbers, true, false and null.

    Refused are references (``*name``), with which ten lines hold a billion values, tags (``!!name``), which ask for
    other types, and interpolations (``${...}``), which would look things up in whoever's environment this is.
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
    return content


def _check_events(text: bytes) -> None:
    """Look at all that a YAML file holds before anything is built of it, because building recurses."""
    import yaml

    depth = 0
    for event in yaml.parse(text, _loader()):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        where = f"line {event.start_mark.line + 1}"
        if depth > DEEPEST:
            raise ValueError(f"{where}: nested deeper than {DEEPEST} levels")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{where}: *{event.anchor} refers to another place; write out what stands there")
        if getattr(event, "tag", None):
            raise ValueError(f"{where}: the tag {event.tag} asks for what no setting is")


def _check_settings(value: object, where: str) -> None:
    """Raise ValueError for whatever no setting is made of."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: {printable(key, 30)} is no name of a setting")
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
        raise ValueError(f"{where}: a {type(value).__name__}, which no setting is")


@cache
def _loader() -> type:
    """As OmegaConf reads YAML: 1e-3 is a number, a date is text, and no name stands twice."""
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
