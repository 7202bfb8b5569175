"""The run-level settings: names, types, defaults and meanings.

:data:`bnexp.store.settings.DECIDES` states what each of them decides.
"""

import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Union, get_args, get_origin

MISSING = "???"  # OmegaConf's word for a value that has to be given
WORDS = {  # one and many of each type
    float: ("a number", "numbers"), int: ("a whole number", "whole numbers"), bool: ("true or false", "true or false"),
    str: ("text", "texts"), types.NoneType: ("null", "nulls"),
}  # fmt: skip


@dataclass
class Train:
    """The groups and the run-level settings of ``bnexp train``."""

    model: Any = MISSING
    norm: Any = MISSING
    data: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    engine: Any = field(default_factory=lambda: {"_target_": "bnexp.engines.eager.eager", "_partial_": True})
    probe: Any = field(default_factory=dict)

    seed: int = 0  # of the initial weights and of the batches
    vary: list[str] = field(default_factory=lambda: ["seed"])  # [seed,split]: it draws the validation images too
    batch_size: int = 64  # images per step
    epochs: int = 5  # passes over the training set
    steps: int | None = None  # train for this many steps instead of epochs
    drop_last: bool = True  # drop the short last batch of an epoch, which would have other statistics
    classes_per_batch: int | None = None  # the number of classes in a batch; all by default

    device: str = "auto"  # auto, cpu, cuda or cuda:N
    precision: str = "fp32"  # fp32, tf32 (products by a GPU's TF32), bf16 or fp16 (autocast; statistics in float32)
    channels_last: bool = False  # memory format of images and convolutions
    threads: str = "auto"  # CPU threads: auto (as many as the model keeps busy) or a number

    deterministic: bool = False  # the same bits every time on a GPU too, where torch can; a CPU always gives them

    log_every: int = 20  # steps between readings of the training loss
    eval_every: int | None = None  # steps between evaluations; every epoch by default
    eval_train: bool = False  # evaluate the training set too, in evaluation mode
    eval_test: bool = False  # evaluate the test set every time, and not only at the end
    primary: str = "accuracy/test"  # the metric by which compare and report judge the variants
    margin: float = 0.5  # the largest difference in it that does not matter: points of accuracy, or nats of loss
    target: float | None = (
        None  # the validation accuracy whose steps are compared; what the baseline ends at by default
    )
    checkpoint_every: Any = None  # steps between checkpoints, or seconds, as 60s; every epoch by default
    keep: str = "last"  # which checkpoints: last, best (best.pt too) or all (checkpoint-STEP.pt too)

    replicas: int = 1  # compute up to this many runs of a sweep as one vmapped run (small models)
    sweep_order: str = "product"  # how -m and compare combine several lists of values: product or zip
    out: str | None = None  # the run's folder; a new one under outputs/ by default
    resume: bool = False  # go on with the run in out, if there is one
    quiet: bool = False  # print nothing but the run's folder
    allow: list[str] = field(default_factory=list)  # further packages whose classes a config may name


SETTINGS = tuple(each.name for each in fields(Train))


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value from a config has the annotated type ``hint``; unknown types take every value."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if hint is None or hint is types.NoneType:
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(fits(item, get_args(hint)[1]) for item in value.values())
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        items = get_args(hint)
        if origin is tuple and ... not in items:
            return isinstance(value, list) and len(value) == len(items) and all(map(fits, value, items))
        return isinstance(value, list) and (not items or all(fits(item, items[0]) for item in value))
    return not is_tensor(hint)


def in_words(hint: Any, many: int = 0) -> str:
    """The type in words: ``a number`` for float, ``numbers`` with ``many=1``."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(in_words(option, many) for option in get_args(hint) if not is_tensor(option))
    if inspect.isclass(get_origin(hint)) and issubclass(get_origin(hint), Sequence):
        items = get_args(hint)
        count = f"{len(items)} " if get_origin(hint) is tuple and ... not in items else ""
        return f"a list of {count}{in_words(items[0], many=1)}" if items else "a list"
    return WORDS.get(hint, (getattr(hint, "__name__", str(hint)),) * 2)[many]


def is_tensor(hint: Any) -> bool:
    """Whether the type is torch's Tensor, which no config can hold; by name, because torch is slow to import."""
    return getattr(hint, "__module__", "") == "torch" and getattr(hint, "__name__", "") == "Tensor"


def is_text(hint: Any) -> bool:
    """Whether ``hint`` takes text, or a list of texts, and no numbers."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    lists = [each for each in options if inspect.isclass(get_origin(each)) and issubclass(get_origin(each), Sequence)]
    items = {*options, *(item for each in lists for item in get_args(each))}
    return str in items and not {int, float, bool} & items
