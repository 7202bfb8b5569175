"""What Hydra and OmegaConf complain about, said so that the person at the keyboard can mend it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bnexp.config.choices import GROUPS, choices, nearest
from bnexp.errors import UserError

KINDS = {  # by what OmegaConf says of a value that is of another kind
    "converted to Integer|field of type 'int'": "a whole number",
    "converted to Float|field of type 'float'": "a number",
    "not a valid bool|field of type 'bool'": "true or false",
    "to string: |field of type 'str'": "a single word",
    "is not a ListConfig|field of type 'list": "a list, written key=[a,b],",
    "is not Optional": "a value",
}


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
    for sign, kind in KINDS.items():
        if found := re.search(rf"(?:{sign})[\s\S]*full_key: (\S+)", text):
            return f"{what_was_given(text, found[1], given)}: {kind} is expected"
    if found := re.search(r"LexerNoViableAltException: (.*)", text):
        name, equals, value = found[1].partition("=")
        if not equals:
            return f"{name}: not a setting; write it as name=value"
        return f"{found[1]}: holds characters that are read only in quotes; write it as '{name}=\"{value}\"'"
    if found := re.search(r"Error parsing override '([^']*)'\s+missing EQUAL", text):
        return f"{found[1]}: not a setting; write it as name=value"
    if found := re.search(r"(?:no viable alternative|mismatched|extraneous|token recognition).*", text):
        return f"cannot read {given}: {found[0]}; quote values that hold spaces, commas or brackets"
    if "Config group override must be a string" in text:
        for group in (*GROUPS, "probe"):
            found = re.search(rf"(?:^| ){group}=(\S*)", given)
            if found and found[1] not in choices(group):
                return f"{group}={found[1]}: a name is expected; choose among {', '.join(choices(group))}"
    if not isinstance(error, (HydraException, OmegaConfBaseException, YAMLError, ValueError)):
        text = f"{type(error).__name__}: {text}"
    text = " ".join(line.strip() for line in text.strip().splitlines() if line.strip())
    return text if any(word in text for word in given.split()) else f"cannot use {given}: {text}"


def what_was_given(text: str, key: str, given: str) -> str:
    """``key=value``, from what OmegaConf says of it, behind the file that it stands in if it does in one."""
    override = re.search(r"^Error merging override (.*)", text)
    value = re.search(r"(?:[Vv]alue|to string:) '(.*?)'(?: of | is | for |\n)", text)
    what = override[1] if override else f"{key}={value[1]}" if value else key
    return f"{given}: {what}" if given.endswith(".yaml") and f"{key}=" not in given else what


def nearest_setting(key: str) -> str:
    """`` (did you mean X?)`` among all settings of the default config, by the whole name or its last part."""
    from bnexp.config.compose import composed

    cfg = OmegaConf.to_container(composed([]))
    known = [*cfg, *(f"{group}.{name}" for group in GROUPS for name in cfg[group] if not name.startswith("_"))]
    if key in known:
        return " with these groups"
    if found := nearest(key, known):
        return found
    ends = {name.rpartition(".")[2]: name for name in known}
    close = get_close_matches(key.rpartition(".")[2], ends, n=1)
    return f" (did you mean {ends[close[0]]}?)" if close else ""
