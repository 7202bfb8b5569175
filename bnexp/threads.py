"""How many CPU threads a run gets: what its layers keep busy, and no more than there are cores for."""

import math
import os
from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import nn

from bnexp.summary import list_layers

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
    layers = list_layers(model, in_shape, batch_size=1, device="cpu")
    work = sum(layer.multiply_adds + PER_NUMBER * math.prod(layer.out_shape) for layer in layers)
    per_layer = cfg.batch_size * work // max(1, len(layers))
    return max(1, min(at_most or len(os.sched_getaffinity(0)), per_layer // WORTH_A_THREAD))
