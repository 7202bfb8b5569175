"""From configuration to objects: the only file that turns a config into things.

It also holds the rules that no single key can state.

``check`` looks at everything that can be wrong before anything is built, ``build`` makes the run.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bnexp.config import parts
from bnexp.config.check import check_evaluation, check_last_batch
from bnexp.data.batches import Batches
from bnexp.data.dataset import Dataset
from bnexp.errors import UserError
from bnexp.optim import place_learning_rates
from bnexp.probes.layers import list_layers
from bnexp.train.device import memory_explained
from bnexp.train.loop import Plan
from bnexp.train.run import Run


def build(cfg: DictConfig, datasets: dict[str, Dataset] | None = None) -> Run:
    """The run that a checked config describes, on its device, at step 0.

    Runs that are given the same ``datasets`` share the data that their configs have in common.
    """
    device = parts.find_device(cfg.device)
    source = parts.part(cfg, "data")()
    model = parts.make_model(cfg, source)
    threads = count_threads(cfg, model, source.in_shape, device)
    torch.set_num_threads(threads)
    datasets = {} if datasets is None else datasets
    key = data_key(cfg, device)
    layout = torch.channels_last if cfg.channels_last else torch.preserve_format
    with memory_explained(device, "the data and the model", cfg.batch_size):
        if key not in datasets:
            datasets[key] = load_dataset(cfg, source).to(device)
        model = model.to(device, memory_format=layout)
    dataset = datasets[key]
    check_last_batch(cfg, source, len(dataset.train))
    check_evaluation(cfg, source, dataset)
    batches = Batches(
        dataset, cfg.batch_size, cfg.seed, drop_last=cfg.drop_last, classes_per_batch=cfg.classes_per_batch
    )
    optimizer = parts.build_optimizer(cfg, model)
    if device.type == "cuda":
        place_learning_rates(optimizer, device)
    return Run(
        model,
        optimizer,
        batches,
        total_steps=cfg.steps or cfg.epochs * batches.steps_per_epoch,
        schedule=parts.part(cfg, "schedule"),
        precision=cfg.precision,
        channels_last=cfg.channels_last,
        threads=threads,
        deterministic=cfg.deterministic,
        engine=parts.part(cfg, "engine"),
    )


def load_dataset(cfg: DictConfig, source: Any) -> Dataset:
    """What ``source`` loads; :class:`UserError` if it is no dataset, or not the one that the source describes."""
    dataset = parts.check_kind(parts.target_of(cfg, "data"), source.load(), Dataset, "load()")
    for name in ("in_shape", "class_names"):
        here, there = tuple(getattr(source, name)), tuple(getattr(dataset, name))
        if here != there:
            target = parts.target_of(cfg, "data")
            raise UserError(f"{target}: its {name} is {here}, but load() returns a dataset with {there}")
    return dataset


def data_key(cfg: DictConfig, device: torch.device) -> str:
    """The same for configs that have their data in common."""
    return f"{device} {OmegaConf.to_yaml(cfg.data, resolve=True)}"


def plan_of(cfg: DictConfig, steps_per_epoch: int) -> Plan:
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


# By measurement, of a layer's forward pass: what a thread has to have to do, in multiply-adds, to be worth the wait for
# it in every layer, and how many of them take as long as a number that a layer puts out, read and written both ways.
WORTH_A_THREAD, PER_NUMBER = 8_000_000, 50


def count_threads(
    cfg: DictConfig, model: nn.Module, in_shape: Sequence[int], device: torch.device, at_most: int | None = None
) -> int:
    """As many CPU threads as asked for; ``auto``: as many as an average layer of ``model`` keeps busy.

    Never more than the usable cores, or ``at_most``. Layers come one after the other and each waits for all threads, so
    that many small ones are not worth what a few large ones are, however much work they are together. The rule counts
    multiply-adds and outputs and never the clock, because the number of threads decides how sums are rounded: the same
    config gives the same bits.
    """
    if cfg.threads != "auto":
        return int(cfg.threads)
    if device.type != "cpu":
        return 1
    layers = list_layers(model, in_shape, device="cpu")
    work = sum(layer.multiply_adds + PER_NUMBER * math.prod(layer.out_shape) for layer in layers)
    per_layer = cfg.batch_size * work // max(1, len(layers))
    return max(1, min(at_most or len(os.sched_getaffinity(0)), per_layer // WORTH_A_THREAD))
