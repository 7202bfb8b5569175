"""The table of what each setting decides, and settings as flat dictionaries.

Resume, sweeps, variants, studies, folds and inspect all read this table.
"""

import json
from collections.abc import Mapping
from enum import Flag, auto
from typing import Any

from bnexp.store.untrusted import printable


class Decides(Flag):
    """What a setting decides; a setting can decide several things."""

    NUMBERS = auto()  # what is trained and measured: part of the variant
    SEED = auto()  # the initial weights and the batches
    LOOKING = auto()  # when the run is evaluated and probed, and which checkpoints stay
    PLACE = auto()  # where and how the run is computed: may change when it is resumed
    COMMAND = auto()  # this start of the run only: not read from a run's folder
    PERSON = auto()  # only the person at the keyboard may set it: not allowed in a study


NUMBERS, SEED, LOOKING, PLACE, COMMAND, PERSON = Decides
NOTHING = Decides(0)
DECIDES = {
    "model": NUMBERS, "norm": NUMBERS, "data": NUMBERS, "optimizer": NUMBERS, "schedule": NUMBERS,
    # Engines and kinds of device round differently. Of a device only the kind is part of the variant, see select().
    "engine": NUMBERS, "device": NUMBERS | PLACE,
    "data.root": NUMBERS | PLACE,  # another folder can hold other images, or the same ones in another place
    "data.resident": PLACE,
    "batch_size": NUMBERS, "epochs": NUMBERS, "steps": NUMBERS, "drop_last": NUMBERS, "classes_per_batch": NUMBERS,
    "precision": NUMBERS, "channels_last": NUMBERS,
    "eval_every": NUMBERS,  # the best of several readings depends on how many there are
    "seed": SEED, "vary": NUMBERS,
    "probe": LOOKING, "log_every": LOOKING, "eval_train": LOOKING, "eval_test": LOOKING,
    "checkpoint_every": LOOKING, "keep": LOOKING,
    "threads": PLACE, "deterministic": PLACE,
    "out": COMMAND | PERSON, "resume": COMMAND | PERSON, "allow": COMMAND | PERSON,
    "quiet": COMMAND, "replicas": COMMAND, "sweep_order": COMMAND,
    "primary": COMMAND, "margin": COMMAND, "target": COMMAND,  # a report reads them as they were stored
}  # fmt: skip


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the options that older versions did not have, at the values that they trained with.

    Weights were torch's, norm=none had a shift beside the biases of the layers, test images were as stored, and all
    parameters were trained.
    """
    model, norm = (each if isinstance(each := config.get(key), Mapping) else {} for key in ("model", "norm"))
    found = dict(config)
    if isinstance(data := config.get("data"), Mapping) and str(data.get("_target_")).startswith("bnexp.data."):
        found["data"] = {"corrupt": "none", "strength": None, **data}
    if isinstance(optimizer := config.get("optimizer"), Mapping):
        found["optimizer"] = {"only": None, **optimizer}
    if str(model.get("_target_")).startswith("bnexp.models.") and "fuse" not in model:
        found["model"] = {"init": "torch", **model}
        if norm.get("_target_") == "bnexp.norms.none.Shift" and model.get("bias") and "init" not in model:
            found["norm"] = {"bias": True, **norm}
    return found


def decides(key: str) -> Decides:
    """What the setting with this dotted key decides; an option without a line here decides what its group does."""
    return DECIDES.get(key) or DECIDES.get(key.partition(".")[0], NUMBERS)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``config`` as {dotted key: value}, without Hydra's ``_partial_``; an empty dictionary is a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        elif key != "_partial_":
            flat[prefix + key] = value
    return flat


def select(config: Mapping[str, Any], what: Decides, but: Decides = NOTHING) -> dict[str, Any]:
    """The flat settings that decide any of ``what`` and none of ``but``. A device is given by its kind, ``cuda``."""
    flat = flatten(completed(config))
    flat = {key: value for key, value in flat.items() if decides(key) & what and not decides(key) & but}
    flat = {key: value for key, value in flat.items() if (key, value) != ("vary", ["seed"])}  # older runs lack it
    return flat | ({"device": str(flat["device"]).partition(":")[0]} if "device" in flat else {})


def numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings that make the variant: two runs of one variant have the same."""
    return select(config, NUMBERS)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], but: Decides = NOTHING) -> list[str]:
    """``key is X there and Y here`` for every differing setting that decides numbers, seed or looking, not ``but``."""
    there, here = (select(each, NUMBERS | SEED | LOOKING, but) for each in (there, here))
    return [
        f"{key} is {there.get(key, 'missing')} there and {here.get(key, 'missing')} here"
        for key in dict.fromkeys([*here, *there]) if there.get(key, "missing") != here.get(key, "missing")
    ]  # fmt: skip


def first_few(items: list[str], most: int = 6) -> str:
    """The first items, joined by semicolons, and how many more there are."""
    items = list(dict.fromkeys(items))
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def short_name(target: str) -> str:
    """The short name of a ``_target_``: ``none`` for ``bnexp.norms.none.Shift``, ``adam`` for ``torch.optim.Adam``."""
    *_, module, name = ["", *target.split(".")]
    return module if target.startswith("bnexp.") and name[:1].isupper() else name.lower()


def names_code(key: str) -> bool:
    """Whether the value of this setting names what an entry stands for: ``norm.path``, ``model.name``."""
    group, _, option = key.lstrip("+").rpartition(".")
    return option in ("_target_", "path", "name") and group in DECIDES


def stands_for(options: Mapping) -> str:
    """What an entry stands for: the code that its path or name names, by default its ``_target_``."""
    given = options.get("path") or options.get("name") if "args" in options else None
    return str(given or options["_target_"])


def as_typed(value: Any) -> str:
    """A setting's value as one would type it: ``null`` and ``true``, not ``None`` and ``True``."""
    return printable(value if isinstance(value, str) else json.dumps(value, default=str))
