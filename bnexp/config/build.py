"""Builds the run that a checked config describes."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bnexp.config import parts
from bnexp.config.check import check_evaluation, check_last_batch, check_schedule, mixes_images
from bnexp.data.batches import Batches
from bnexp.data.dataset import Dataset
from bnexp.errors import UserError
from bnexp.optim import place_learning_rates
from bnexp.probes.layers import list_layers
from bnexp.train.device import allow_tf32, memory_explained
from bnexp.train.draws import Draws
from bnexp.train.loop import Plan
from bnexp.train.own import naming
from bnexp.train.progress import counted
from bnexp.train.run import Run

MOST_FACTORS = 100_000  # steps of a schedule of the user's own that are tried before the run


def build(cfg: DictConfig, datasets: dict[str, Dataset] | None = None) -> Run:
    """The run of a checked config, on its device, at step 0.

    ``datasets`` holds loaded datasets by :func:`data_key`; a dataset that is missing is loaded and added.
    """
    device = parts.find_device(cfg.device)
    source = parts.part(cfg, "data")()
    model = parts.make_model(cfg, source)
    threads = count_threads(cfg, model, source.in_shape, device)
    torch.set_num_threads(threads)
    allow_tf32(cfg.precision == "tf32")
    datasets = {} if datasets is None else datasets
    key = data_key(cfg, device)
    layout = torch.channels_last if cfg.channels_last else torch.preserve_format
    with memory_explained(device, "the data and the model", cfg.batch_size):
        if key not in datasets:
            loaded = datasets.pop(data_key(cfg, torch.device("cpu")), None)  # for a check, before the device was known
            datasets[key] = (loaded or load_dataset(cfg, source)).to(device)
        model = model.to(device, memory_format=layout)
    dataset = datasets[key]
    batches = make_batches(cfg, source, dataset)
    optimizer = parts.build_optimizer(cfg, model)
    if device.type == "cuda":
        place_learning_rates(optimizer, device)
    run = Run(
        model,
        optimizer,
        batches,
        total_steps=count_steps(cfg, batches),
        schedule=parts.part(cfg, "schedule"),
        precision=cfg.precision,
        channels_last=cfg.channels_last,
        threads=threads,
        deterministic=cfg.deterministic,
        engine=parts.part(cfg, "engine"),
        mixes_images=mixes_images(cfg, model, dataset),
        own_parts=(own := parts.own_parts(cfg)),
        draws=Draws(cfg.seed, device) if own else None,
    )
    parts.check_kind(parts.target_of(cfg, "engine"), run.take_step, Callable)
    return run


def make_batches(cfg: DictConfig, source: Any, dataset: Dataset) -> Batches:
    """The run's training batches; :class:`UserError` if the splits are too small for them or for a norm."""
    check_last_batch(cfg, source, len(dataset.train))
    check_evaluation(cfg, source, dataset)
    options = {"drop_last": cfg.drop_last, "classes_per_batch": cfg.classes_per_batch}
    batches = Batches(dataset, cfg.batch_size, cfg.seed, **options)
    if parts.is_own(cfg.schedule):
        num_steps = count_steps(cfg, batches)
        check_schedule(cfg, num_steps, range(min(num_steps, MOST_FACTORS)))
    return batches


def count_steps(cfg: DictConfig, batches: Batches) -> int:
    """The number of steps of the whole run."""
    return cfg.steps or cfg.epochs * batches.steps_per_epoch


def load_dataset(cfg: DictConfig, source: Any) -> Dataset:
    """The dataset that ``source`` loads; :class:`UserError` unless it has the source's shape and classes."""
    target = parts.target_of(cfg, "data")
    with naming(target if parts.is_own(cfg.data) else ""):
        if "split" in cfg.vary:
            source.split_seed = cfg.seed
        with counted(f"data={source.name}: decoding images", quiet=cfg.quiet) as show:
            if not parts.is_own(cfg.data):
                source.show = show
            dataset = source.load()
    parts.check_kind(target, dataset, Dataset, "load()")
    for name in ("in_shape", "class_names"):
        here, there = tuple(getattr(source, name)), tuple(getattr(dataset, name))
        if here != there:
            raise UserError(f"{target}: its {name} is {here}, but load() returns a dataset with {there}")
    if "split" in cfg.vary and not dataset.origin:
        raise UserError(
            f"vary=[seed,split]: {target} sets no validation images aside, so none can be drawn; leave out split"
        )
    if fault := dataset.fault():
        raise UserError(f"{target}: load() returns a dataset with a fault: {fault}")
    return dataset


def data_key(cfg: DictConfig, device: torch.device) -> str:
    """A key that is the same for configs with the same data on the same device."""
    return f"{device} {cfg.seed if 'split' in cfg.vary else None} {OmegaConf.to_yaml(cfg.data, resolve=True)}"


def plan_of(cfg: DictConfig, steps_per_epoch: int) -> Plan:
    """When the run is evaluated, looked at and saved, by the config."""
    steps, seconds = parts.every_of(cfg.checkpoint_every)
    return Plan(
        log_every=cfg.log_every,
        eval_every=cfg.eval_every or steps_per_epoch,
        checkpoint_every=steps if steps or seconds else steps_per_epoch,
        checkpoint_seconds=seconds,
        eval_train=cfg.eval_train,
        eval_test=cfg.eval_test,
        probes=parts.probes_of(cfg),
    )


# Both measured. A further thread makes a layer's forward pass faster from this many multiply-adds on.
MULTIPLY_ADDS_PER_THREAD = 8_000_000
# Reading and writing one output of a layer, forward and backward, takes as long as this many multiply-adds.
MULTIPLY_ADDS_PER_OUTPUT = 50


def count_threads(
    cfg: DictConfig, model: nn.Module, in_shape: Sequence[int], device: torch.device, at_most: int | None = None
) -> int:
    """The number of CPU threads that the config gives; for ``auto``, as many as an average layer keeps busy.

    ``auto`` gives at most the usable cores, or ``at_most``. Layers run one after the other and each waits for all
    threads, so the work of an average layer counts, not that of the model. The work is counted and not timed, because
    the number of threads decides how sums are rounded: the same config must give the same bits.
    """
    if cfg.threads != "auto":
        return int(cfg.threads)
    if device.type != "cpu":
        return 1
    with naming(", ".join(parts.own_parts(cfg))):
        layers = list_layers(model, in_shape, "cpu", cfg.batch_size)
    work = sum(layer.multiply_adds + MULTIPLY_ADDS_PER_OUTPUT * math.prod(layer.out_shape) for layer in layers)
    per_layer = cfg.batch_size * work // max(1, len(layers))
    return max(1, min(at_most or len(os.sched_getaffinity(0)), per_layer // MULTIPLY_ADDS_PER_THREAD))
