"""The settings of a run that belong to no group: names, types, defaults and meanings, once.

Registered as Hydra's structured config ``schema``, so that a misspelt key or a value of the wrong type is
an error that names the key.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Train:
    """Everything ``bnexp train`` knows besides its groups."""

    model: Any = MISSING
    norm: Any = MISSING
    data: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    engine: Any = field(default_factory=lambda: {"_target_": "bnexp.engines.eager.eager", "_partial_": True})
    probe: Any = field(default_factory=dict)

    seed: int = 0  # of the initial weights and of the batches
    batch_size: int = 64  # images per step
    epochs: int = 5  # passes over the training set
    steps: int | None = None  # train for this many steps instead of epochs
    drop_last: bool = True  # drop the short last batch of an epoch: its statistics are others
    classes_per_batch: int | None = None  # only so many classes in a batch; all by default

    device: str = "auto"  # auto, cpu, cuda or cuda:N
    precision: str = "fp32"  # fp32, bf16 or fp16 (autocast; norm statistics stay in float32)
    channels_last: bool = False  # memory format of images and convolutions
    threads: str = "auto"  # CPU threads: auto (as many as the model keeps busy) or a number

    deterministic: bool = False  # the same bits every time on a GPU too, where torch can; a CPU always gives them

    log_every: int = 20  # steps between readings of the training loss
    eval_every: int | None = None  # steps between evaluations; every epoch by default
    eval_train: bool = False  # evaluate the training set too, in evaluation mode
    eval_test: bool = False  # evaluate the test set every time, and not only at the end
    checkpoint_every: Any = None  # steps between checkpoints, or seconds, as 60s; every epoch by default
    keep: str = "last"  # which checkpoints: last, best (best.pt too) or all (checkpoint-STEP.pt too)

    replicas: int = 1  # of the runs of train -m and compare, as many at most are computed as one (small models)
    sweep_order: str = "product"  # of the lists that -m and compare are given: product or zip
    out: str | None = None  # the run's folder; a new one under outputs/ by default
    resume: bool = False  # go on with the run in out, if there is one
    quiet: bool = False  # print nothing but the run's folder
    allow: list[str] = field(default_factory=list)  # further packages whose classes a config may name


ConfigStore.instance().store(name="schema", node=Train)
