"""What Hydra and OmegaConf complain about, said so that the person at the keyboard can mend it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bnexp.cli import GROUPS, choices, nearest
from bnexp.errors import UserError


@contextmanager
def explained(arguments: Sequence[str] = ()) -> Iterator[None]:
    """Turn the config libraries' exceptions into :class:`UserError` with a cause and a remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of their own kinds and of many others
        raise UserError(explain(error, " ".join(arguments) or "the overrides")) from error


def explain(error: Exception, given: str) -> str:
    """One sentence or two for one exception; ``given`` is what stood on the command line."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    text = f"{error}\n{cause or ''}"
    if found := re.search(r"Could not find '([\w@/]+)/([^'/]*)'\s+Available options in '[^']+':\s+([\w\s]+)", text):
        group, wrong, options = found[1], found[2], found[3].partition("Config")[0].split()
        return (
            f"{group}={wrong}: there is no such {group}{nearest(wrong, options)}; "
            f"choose one of {', '.join(options)}"
        )
    if found := re.search(r"Could not load '(\w+)/([^']*)'", text):  # one of a list, probe=[a,b]
        group, wrong = found[1], found[2]
        options = choices(group)
        return (
            f"{group}={wrong}: there is no such {group}{nearest(wrong, options)}; "
            f"choose among {', '.join(options)}, as {group}=[{','.join(options[:2])}]"
        )
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return (
            f"{found[1]}: several values at once are a sweep; add -m to train them all, "
            "or write one value (a list is written key=[a,b])"
        )
    if found := re.search(r"Could not override '([^']+)'|^Key '([^']+)' (?:is )?not in", text):
        key = found[1] or getattr(error, "full_key", None) or found[2]
        if key == "study":
            return "study: is no setting but a command of its own: bnexp study NAME"
        return f"{key}: there is no such setting{nearest_setting(key)}; bnexp train --help lists them all"
    if found := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)\s+full_key: (\S+)", text):
        kind = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}.get(found[2], found[2])
        return f"{found[3]}={found[1]}: {kind} is expected"
    if found := re.search(r"LexerNoViableAltException: (.*)", text):
        name, equals, value = found[1].partition("=")
        if not equals:
            return f"{name}: not a setting; write it as name=value"
        return f"{found[1]}: holds characters that are read only in quotes; write it as '{name}=\"{value}\"'"
    if found := re.search(r"Error parsing override '([^']*)'\s+missing EQUAL", text):
        return f"{found[1]}: not a setting; write it as name=value"
    if found := re.search(r"(?:no viable alternative|mismatched|extraneous|token recognition).*", text):
        return f"cannot read {given}: {found[0]}; quote values that hold spaces, commas or brackets"
    if not isinstance(error, (HydraException, OmegaConfBaseException, YAMLError, ValueError)):
        text = f"{type(error).__name__}: {text}"
    text = " ".join(line.strip() for line in text.strip().splitlines() if line.strip())
    return text if any(word in text for word in given.split()) else f"cannot use {given}: {text}"


def nearest_setting(key: str) -> str:
    """`` (did you mean X?)`` among all settings of the default config, by the whole name or its last part."""
    from bnexp.compose import composed

    cfg = OmegaConf.to_container(composed([]))
    known = [*cfg, *(f"{group}.{name}" for group in GROUPS for name in cfg[group] if not name.startswith("_"))]
    if key in known:
        return " with these groups"
    if found := nearest(key, known):
        return found
    ends = {name.rpartition(".")[2]: name for name in known}
    close = get_close_matches(key.rpartition(".")[2], ends, n=1)
    return f" (did you mean {ends[close[0]]}?)" if close else ""
