"""A run: one variant with one seed. It can step and evaluate, and it can be put away and taken up again."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bnexp.data.batches import Batches
from bnexp.data.dataset import Dataset, Split
from bnexp.optim import set_learning_rate

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATION_BATCH = 512  # images at a time; evaluation mode, so the results do not depend on it


class Meter:
    """Losses and hits of the steps since the last reading, kept on the device until somebody reads."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.sizes: list[int] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.losses.append(loss)
        self.hits.append((logits.argmax(1) == labels).sum())
        self.sizes.append(len(labels))

    def read(self) -> tuple[list[float], float, float]:
        """Every step's loss, the mean loss and the accuracy, weighted by images; then start anew.

        The one place in training where the host waits for the device.
        """
        losses = torch.stack(self.losses).tolist()
        hits = int(torch.stack(self.hits).sum())
        num_images = sum(self.sizes)
        mean = sum(loss * size for loss, size in zip(losses, self.sizes, strict=True)) / num_images
        self.__init__()
        return losses, mean, hits / num_images

    def state_dict(self) -> dict:
        return {
            "losses": [loss.clone() for loss in self.losses],
            "hits": [hit.clone() for hit in self.hits],
            "sizes": list(self.sizes),
        }

    def load_state_dict(self, state: dict) -> None:
        self.losses, self.hits, self.sizes = list(state["losses"]), list(state["hits"]), list(state["sizes"])


class Run:
    """A model, an optimizer and a stream of batches, advanced a step at a time.

    ``schedule(step, total_steps)`` gives the factor of the learning rate; ``precision`` is fp32, bf16 or
    fp16 (autocast; fp16 also scales the loss). Nothing here draws random numbers but the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        batches: Batches,
        *,
        total_steps: int,
        schedule: Callable[[int, int], float],
        precision: str = "fp32",
        channels_last: bool = False,
        threads: int = 1,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.total_steps = total_steps
        self.schedule = schedule
        self.channels_last = channels_last
        self.threads = threads
        self.autocast_dtype = AUTOCAST[precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.meter = Meter()
        self.num_steps = 0
        self.seconds = 0.0  # spent on this run, kept by whoever drives it

    @property
    def dataset(self) -> Dataset:
        return self.batches.dataset

    @property
    def device(self) -> torch.device:
        return self.dataset.device

    @property
    def epoch(self) -> float:
        """Passes over the training set so far."""
        return self.num_steps / self.batches.steps_per_epoch

    def step(self) -> None:
        """One batch forward, backward and into the weights. The host does not wait for the device."""
        images, labels = self.batches.next()
        set_learning_rate(self.optimizer, self.schedule(self.num_steps, self.total_steps))
        logits = self.forward(images)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss.backward()
            self.optimizer.step()
        self.meter.add(loss.detach(), logits.detach(), labels)
        self.num_steps += 1

    @torch.no_grad()
    def evaluate(self, split: Split, model: nn.Module | None = None) -> tuple[float, float]:
        """Mean loss (nats) and accuracy over the whole of ``split``, of the run's model in evaluation mode.

        A ``model`` given instead is taken in the mode that it is in.
        """
        if model is None:
            self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        hits = torch.zeros((), dtype=torch.int64, device=self.device)
        chunks = zip(split.images.split(EVALUATION_BATCH), split.labels.split(EVALUATION_BATCH), strict=True)
        for images, labels in chunks:
            logits = self.forward(self.dataset.prepare(images), model)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            hits += (logits.argmax(1) == labels).sum()
        self.model.train()
        return float(loss) / len(split), int(hits) / len(split)

    def forward(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Logits in float32, by the run's model or by a copy of it, in the run's precision and memory format."""
        model = self.model if model is None else model
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.autocast_dtype is None:
            return model(images)
        with torch.autocast(self.device.type, self.autocast_dtype):
            return model(images).float()

    def state_dict(self) -> dict:
        """Everything that the next step depends on, and what has been measured but not yet read."""
        return {
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batches": self.batches.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.num_steps = state["num_steps"]
        self.seconds = state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["batches"])
        self.meter.load_state_dict(state["meter"])


def first_non_finite(losses: list[float]) -> int | None:
    """The index of the first loss that is infinite or not a number, None if all are finite."""
    return next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
