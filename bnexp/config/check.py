"""Checks a config before any work, with errors that name the setting, the reason and a remedy."""

import math
import re
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from bnexp.config import parts
from bnexp.config.choices import GROUPS
from bnexp.config.explain import no_such_setting
from bnexp.config.schema import SETTINGS, fits
from bnexp.config.targets import check_allow, check_options
from bnexp.data.dataset import Dataset
from bnexp.engines.base import traits_of
from bnexp.errors import UserError
from bnexp.norms.base import contract_of, divisors
from bnexp.probes.layers import list_layers
from bnexp.probes.population import some_of
from bnexp.report.question import Question
from bnexp.store import run_folder
from bnexp.train.device import forked_rng
from bnexp.train.own import FAILURES, PartFailed, culprit, naming
from bnexp.train.recorder import KEEP
from bnexp.train.run import AUTOCAST, EVALUATION_BATCH, depends_on_company, equal_chunks, uses_batch_statistics

MOST_THREADS = 1024  # with more, the OpenMP library ends the process


def check(cfg: DictConfig, *, free: bool = True, runs: bool = True, many: bool = False) -> None:
    """Raise :class:`UserError` if the config cannot work.

    ``free=False`` allows ``out`` to hold this run already. ``runs=False`` checks only that the model can be built.
    ``many`` says that it is one run of many.
    """
    if unknown := set(cfg) - {*SETTINGS}:
        raise no_such_setting(min(unknown))
    check_numbers(cfg)
    check_allow(cfg.allow)
    for key, known in (("keep", KEEP), ("precision", AUTOCAST)):
        if cfg[key] not in known:
            raise UserError(f"{key}={cfg[key]}: not known; choose one of {', '.join(known)}")
    if [*cfg.vary] not in (["seed"], ["seed", "split"]):
        raise UserError(f"vary=[{','.join(cfg.vary)}]: not known; give [seed], or [seed,split] to draw the split too")
    Question(primary=cfg.primary, margin=cfg.margin, target=cfg.target).check()
    if cfg.primary == "accuracy/test/at_best" and not cfg.eval_test:
        raise UserError(f"primary={cfg.primary}: the test set has to be evaluated every time; give eval_test=true too")
    if cfg.replicas > 1 and not many:
        raise UserError(
            f"replicas={cfg.replicas}: a single run cannot be computed together with others; give several values, "
            f"bnexp train -m seed=0,1 replicas={cfg.replicas} say, or use compare"
        )
    device = parts.find_device(cfg.device)
    if cfg.precision == "tf32" and (device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(f"precision=tf32: device={device} has no TF32 products, newer GPUs have; use precision=fp32")
    for group in GROUPS:
        if OmegaConf.is_missing(cfg, group):
            raise UserError(f"{group}: has to be given, nothing runs without it")
        check_options(group, cfg[group], cfg.allow)
        check_finite(group, cfg[group])
    check_schedule(cfg, cfg.steps or 100)
    check_model(cfg, runs, device)
    if runs:
        traits_of(parts.part(cfg, "engine").func).require_device(device)
    if free and cfg.out is not None:
        run_folder.check_free(cfg.out)


def check_numbers(cfg: DictConfig) -> None:
    """Raise :class:`UserError` for a run-level number outside its range."""
    counts = ["batch_size", "log_every", "replicas"] + ["epochs"] * (cfg.steps is None)
    counts += [key for key in ("steps", "eval_every", "classes_per_batch") if cfg[key] is not None]
    for key in counts:
        if not isinstance(cfg[key], int) or cfg[key] < 1:
            raise UserError(f"{key}={cfg[key]}: has to be a whole number, 1 or more")
    parts.every_of(cfg.checkpoint_every)
    if not 0 <= cfg.seed < 2**63:
        raise UserError(f"seed={cfg.seed}: a seed is 0 or more, and below 2**63")
    is_number = re.fullmatch("[0-9]{1,4}", cfg.threads)
    if cfg.threads != "auto" and not (is_number and 1 <= int(cfg.threads) <= MOST_THREADS):
        raise UserError(f"threads={cfg.threads}: has to be auto or a whole number from 1 to {MOST_THREADS}")


def check_model(cfg: DictConfig, runs: bool, device: torch.device) -> None:
    """Build model and optimizer without data or weights, so that their parts raise errors for wrong settings."""
    source = parts.part(cfg, "data")()
    check_source(cfg, source)
    model = parts.meta_model(cfg, source)
    parts.build_optimizer(
        cfg, nn.ParameterList(torch.zeros([1] * p.dim()) for p in model.parameters() if p.requires_grad)
    )
    if runs:
        for module in model.modules():
            contract_of(module).require_device(device)
        check_batch(cfg, source, model, cfg.batch_size)
    check_results(cfg, source, [cfg.batch_size] * runs, [cfg.batch_size])
    for probe in parts.probes_of(cfg):
        with naming(probe.label):
            probe.check(model)


PROMISES = {  # what a source says without reading its files, what that is, and whether a value can be it
    "name": ("a text", lambda value: isinstance(value, str)),
    "class_names": ("a tuple of texts", lambda value: isinstance(value, tuple | list) and fits([*value], list[str])),
    "in_shape": (
        "the tuple (channels, height, width)",
        lambda value: isinstance(value, tuple | list) and fits([*value], tuple[int, int, int]) and min(value) > 0,
    ),
    "load": ("a method that returns a bnexp.data.dataset.Dataset", callable),
}


def check_source(cfg: DictConfig, source: Any) -> None:
    """Raise :class:`UserError` for a source that lacks what :data:`PROMISES` lists."""
    target = parts.target_of(cfg, "data")
    for name, (meaning, is_right) in PROMISES.items():
        with naming(target if parts.is_own(cfg.data) else ""):
            value = getattr(source, name, None)
        if not is_right(value):
            has = "no" if value is None else f"{value!r} as"
            raise UserError(f"{target}: has {has} {name}; {name} must be {meaning}")


def check_results(cfg: DictConfig, source: Any, training: Collection[int], evaluation: Collection[int]) -> None:
    """Raise :class:`UserError` if a model or norm of the user's own fails, or returns what a run cannot use.

    Batches of these sizes pass the model in training and in evaluation mode: on torch's meta device, which costs
    nothing, or on the run's device if the parts need numbers.
    """
    if not parts.is_foreign(cfg):
        return
    for device in (torch.device("meta"), parts.find_device(cfg.device)):
        try:
            with device, forked_rng(device):
                model = parts.plain_model(cfg, source, watched_norm(cfg))
                for is_training, size in [(True, size) for size in training] + [(False, size) for size in evaluation]:
                    with torch.set_grad_enabled(is_training):
                        logits = model.train(is_training)(torch.rand(size, *source.in_shape))
                    check_result(cfg, "model", logits, (size, len(source.class_names)))
                    if is_training and not logits.requires_grad:
                        raise UserError(
                            f"{parts.target_of(cfg, 'model')}: no weight has a part in what forward returns"
                        )
                    if is_training:
                        logits.sum().backward()  # fails if what it needs was changed in place
                list_layers(model, source.in_shape, device, cfg.batch_size)  # calls reduces_over of the norms
            return
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except FAILURES as error:
            failure, at = error, f" for {size} images in {'training' if is_training else 'evaluation'} mode"
    raise PartFailed(culprit(failure, parts.own_parts(cfg)), failure, at) from failure


def watched_norm(cfg: DictConfig) -> Callable[..., nn.Module]:
    """The config's norm, whose modules raise :class:`UserError` for a result that is not of their input's shape."""
    norm = parts.norm_part(cfg)

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x = (*args, *kwargs.values())[0]
        check_result(cfg, "norm", output, x.shape, x.dtype)

    @wraps(norm)
    def make(*args: Any, **kwargs: Any) -> nn.Module:
        module = norm(*args, **kwargs)
        module.register_forward_hook(see, with_kwargs=True)
        return module

    return make


def check_result(
    cfg: DictConfig, group: str, result: Any, shape: Sequence[int], dtype: torch.dtype | None = None
) -> None:
    """Raise :class:`UserError` unless the result of the group's part is a tensor of floats of this shape and type."""
    is_right = isinstance(result, torch.Tensor) and result.shape == tuple(shape) and result.is_floating_point()
    is_right = is_right and result.layout == torch.strided
    if not is_right or dtype not in (None, result.dtype):
        raise UserError(
            f"{parts.target_of(cfg, group)}: its forward returns {parts.describe_result(result)}; "
            f"return one dense floating-point tensor of shape {tuple(shape)}"
            f"{'' if dtype is None else ', of the type of the input'}"
        )


def check_finite(group: str, node: DictConfig) -> None:
    """Raise :class:`UserError` for numbers in the entry of ``group`` that are too large for 64 bits, or for float32."""
    for key, value in node.items():
        for number in value if isinstance(value, ListConfig) else [value]:
            if isinstance(number, int) and not abs(number) < 2**63:
                raise UserError(f"{group}.{key}={value}: too large; give a whole number below 2**63")
            if isinstance(number, float) and not abs(number) <= torch.finfo(torch.float32).max:
                raise UserError(f"{group}.{key}={value}: a finite number is expected, and it has to be so in float32")


def check_schedule(cfg: DictConfig, total_steps: int, steps: Sequence[int] = ()) -> None:
    """Raise :class:`UserError` for a schedule that makes the learning rate negative or not finite.

    ``steps`` are tried besides the first, the middle and the last.
    """
    schedule, target = parts.part(cfg, "schedule"), parts.target_of(cfg, "schedule")
    for step in (0, total_steps // 2, *steps, total_steps - 1):
        try:
            factor = parts.check_kind(target, schedule(step, total_steps), int | float, f"at step {step} it")
        except OverflowError:
            factor = math.inf
        if not 0 <= factor < math.inf:
            options = {k: v for k, v in cfg.schedule.items() if not k.startswith("_")}
            given = target if parts.is_own(cfg.schedule) else f"schedule={options}"
            raise UserError(
                f"{given}: the learning rate would be multiplied by {factor:g} at step {step}; "
                "give numbers that keep this factor at 0 or more"
            )


def check_last_batch(cfg: DictConfig, source: Any, num_images: int) -> None:
    """:func:`check_batch` for the short last batch of an epoch, if there is one."""
    last = num_images % cfg.batch_size
    if last and not cfg.drop_last:
        check_batch(cfg, source, parts.meta_model(cfg, source), last, num_images)
        check_results(cfg, source, [last], [])


def check_evaluation(cfg: DictConfig, source: Any, dataset: Dataset) -> None:
    """Raise :class:`UserError` if a split cannot be evaluated.

    Its chunks must pass a model of the user's own, and it must not be one image if results depend on other images.
    """
    splits = {name: len(getattr(dataset, name)) for name in ("valid", "test") if len(getattr(dataset, name))}
    if 1 not in splits.values() and not parts.is_foreign(cfg):
        return
    model = parts.make_model(cfg, source).to(dataset.device)
    mixes = mixes_images(cfg, model, dataset)
    for name, num_images in splits.items():
        if mixes and num_images == 1:
            is_off = cfg.norm.get("track_running_stats") is False
            group = "model" if parts.is_own(cfg.model) and not parts.is_own(cfg.norm) else "norm"
            given = "norm.track_running_stats=false" if is_off else parts.target_of(cfg, group)
            remedy = "norm.track_running_stats=true" if is_off else f"another {group}"
            raise UserError(
                f"{given}: evaluation on 1 {name} image has no other images, on which its result depends; "
                f"use more {name} images, none, or {remedy}"
            )
        order = torch.arange(num_images)
        chunks = equal_chunks(order) if mixes else order.split(EVALUATION_BATCH)
        check_results(cfg, source, [], dict.fromkeys(map(len, chunks)))


def mixes_images(cfg: DictConfig, model: nn.Module, dataset: Dataset) -> bool:
    """Whether the result of an image in evaluation mode depends on other images.

    A norm says so, or a trial shows it, which only parts of the user's own need.
    """
    model.eval()
    is_said = uses_batch_statistics(model)
    model.train()
    if is_said or not parts.is_foreign(cfg):
        return is_said
    with naming(", ".join(parts.own_parts(cfg))):
        return depends_on_company(model, dataset.prepare(some_of(dataset.train, max(2, cfg.batch_size)).images))


def check_batch(cfg: DictConfig, source: Any, model: nn.Module, size: int, num_images: int | None = None) -> None:
    """Raise :class:`UserError` if a norm cannot split a batch of ``size`` images or gets one value per channel.

    ``num_images`` is given for the short last batch of an epoch of so many images.
    ``model`` is on torch's meta device. A batch passes it in training mode only if a norm can raise an error for a
    batch that batch norm takes.
    """
    contracts = [contract_of(module) for module in model.modules()]
    for contract in contracts:
        try:
            contract.check_batch_size(size)
        except UserError as error:
            if num_images is None:
                raise
            raise UserError(unsplit(cfg, contract.virtual_batch, size, num_images, error)) from None
    others = [norm for norm in contracts if norm.normalizes and not norm.implements_batch_norm]
    is_foreign = parts.is_foreign(cfg)
    if size > 1 and not others:
        return
    images = torch.empty(size, *source.in_shape, device="meta")
    if others and not is_foreign:
        # These norms treat a few images as they treat many. A few real images are cheap, but on the meta device torch
        # would import its symbolic shapes, which takes a second.
        model = parts.plain_model(cfg, source)
        images = torch.zeros(min(size, max(norm.virtual_batch or 2 for norm in others)), *source.in_shape)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(images)
    except UserError:
        raise
    except ValueError as error:
        if size > 1:
            raise UserError(f"batch_size={size}: the model cannot take it ({error})") from error
        raise UserError(
            f"batch_size={cfg.batch_size}: a batch of one image leaves a norm one value per channel, which has no "
            f"variance; use {way_to_more(cfg, num_images)} ({error})"
        ) from error
    except FAILURES:
        if not is_foreign:
            raise  # of the user's own parts, check_results finds what is wrong


def way_to_more(cfg: DictConfig, num_images: int | None) -> str:
    """What gives batches of more than one image, if that is the batch size or the last batch of ``num_images``."""
    if num_images is None:
        return "batch_size=2 or more" + " and data.limit=2 or more" * (cfg.data.get("limit") == 1)
    if num_images == 1:
        return "2 training images or more, there is only 1" + ": data.limit=2 say" * (cfg.data.get("limit") == 1)
    return "drop_last=true or a batch_size that leaves no single image"


def unsplit(cfg: DictConfig, block: int | None, size: int, num_images: int, error: UserError) -> str:
    """The ``error`` of a norm that cannot take the last batch, of ``size`` images, with remedies that work."""
    is_only = size == num_images  # drop_last=true would leave no batch
    if block is None or "virtual_batch" not in cfg.norm:
        return str(error) if is_only else f"{error}; or use drop_last=true"
    able = ", ".join(map(str, divisors(math.gcd(size, cfg.batch_size))[1:]))
    ways = [f"set norm.virtual_batch to a common divisor of {cfg.batch_size} and {size} ({able})"] if able else []
    ways.append(f"use a multiple of {block} training images" if is_only else "use drop_last=true")
    return (
        f"norm.virtual_batch={block}: the last batch of an epoch has {size} of {num_images} images and cannot be split "
        f"into blocks of {block}; {', or '.join(ways)}"
    )
