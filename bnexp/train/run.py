"""A run: one variant with one seed. It steps, evaluates, and continues from a saved state."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bnexp.data.batches import Batches
from bnexp.data.dataset import Dataset, Split
from bnexp.norms.base import contract_of
from bnexp.optim import set_learning_rate
from bnexp.train.device import forked_rng
from bnexp.train.draws import Draws
from bnexp.train.meter import Meter
from bnexp.train.own import FAILURES

AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATION_BATCH = 512  # the most images that are evaluated together


class Run:
    """A model, an optimizer and a stream of batches.

    ``schedule(step, total_steps)`` returns the factor of the learning rate. ``precision`` is fp32, tf32, bf16 or
    fp16 (the last two by autocast; fp16 also scales the loss). ``engine(run)`` returns the function that takes a step,
    by default :meth:`eager_step`. Only the batches draw random numbers, and parts of the user's own: ``own_parts`` are
    the labels and names of these, ``draws`` is what they draw from. ``mixes_images`` says that an image's result in
    evaluation depends on other images.
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
        deterministic: bool = False,
        engine: Callable[["Run"], Callable[[], None]] | None = None,
        mixes_images: bool = False,
        own_parts: Mapping[str, str] = MappingProxyType({}),
        draws: Draws | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.total_steps = total_steps
        self.schedule = schedule
        self.channels_last = channels_last
        self.mixes_images, self.own_parts, self.draws = mixes_images, own_parts, draws or Draws()
        self.threads = threads
        self.deterministic = deterministic
        self.precision = precision
        self.autocast_dtype = AUTOCAST[precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.meter = Meter()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.num_steps = 0
        self.num_bad_gradients = 0  # steps so far with a finite loss and a gradient that is not; counted by the loop
        self.seconds = 0.0  # spent on this run; counted by the loop
        self.setup_seconds = 0.0  # in which the engine compiled or captured; not yet in a reading
        self.has_moved = False  # whether a step has moved the weights since the run was made or loaded
        self.tally = self.tally_of  # evaluates the run's own model; an engine may replace it by a faster function
        self.fallback = ""  # why the engine does not compile or capture as it was asked to; empty if it does
        self.take_step = engine(self) if engine else self.eager_step

    @property
    def dataset(self) -> Dataset:
        return self.batches.dataset

    @property
    def device(self) -> torch.device:
        return self.dataset.device

    @property
    def epoch(self) -> float:
        """Passes over the training set so far, a fraction included."""
        return self.num_steps / self.batches.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group in the last step."""
        return self.optimizer.param_groups[0]["base_lr"] * self.schedule(self.num_steps - 1, self.total_steps)

    def step(self) -> None:
        """Take a step by the engine: forward, backward and update of the weights by one batch."""
        self.take_step()
        self.num_steps += 1

    def eager_step(self) -> None:
        """Take a step, one operation after the other. The host does not wait for the device."""
        images, labels = self.batches.next()
        set_learning_rate(self.optimizer, self.schedule(self.num_steps, self.total_steps))
        loss, logits = self.loss(images, labels)
        found = self.descend(loss)
        self.meter.add(loss.detach(), logits.detach(), labels, found)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss (nats) of a batch of prepared images, and its logits (B, classes)."""
        logits = self.forward(images)
        return F.cross_entropy(logits, labels), logits

    def descend(self, loss: Tensor) -> Tensor:
        """Backward, and move the weights; return 1 on the device if the gradient was not finite, else 0."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.scale(loss).backward()
            found = find_non_finite(self.parameters)
            if self.has_moved or not found:
                self.scaler.step(self.optimizer)  # skips the step if the gradient is not finite
                self.has_moved = True
            else:  # a fused SGD that skips its very first step keeps uninitialized memory as its momentum
                self.scaler.unscale_(self.optimizer)
            self.scaler.update()
        else:
            loss.backward()
            found = find_non_finite(self.parameters)
            self.optimizer.step()
        return found

    def evaluate(self, split: Split, model: nn.Module | None = None) -> tuple[float, float]:
        """Mean loss (nats) and accuracy over ``split``, by the run's model in evaluation mode.

        Another ``model`` is evaluated in the mode that it is in.
        """
        if model is None:
            self.model.eval()
            loss, hits = self.tally(split, self.model)
            self.model.train()
        else:
            loss, hits = self.tally_of(split, model)
        return float(loss) / len(split), int(hits) / len(split)

    @torch.no_grad()
    def tally_of(self, split: Split, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The sum of the losses (nats) over ``split`` and the number of images classified right, on the device."""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        hits = torch.zeros((), dtype=torch.int64, device=self.device)
        chunks = self.chunks(split, model)
        for places, images in zip(chunks, split.images_in(chunks), strict=True):
            labels = split.labels[places]
            logits = self.forward(self.dataset.prepare(images), model)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            hits += (logits.argmax(1) == labels).sum()
        return loss, hits

    def chunks(self, split: Split, model: nn.Module) -> Sequence[slice | Tensor]:
        """Indices into ``split``, a chunk for the images that are evaluated together.

        Images come in stored order unless a prediction depends on the other images of its chunk. These would be of one
        class if files are sorted by class, so the images are then shuffled, always in the same way, and the sizes of
        the chunks differ by one image at most.
        """
        if self.mixes_images or uses_batch_statistics(model):
            return equal_chunks(shuffled(len(split), self.device))
        return [slice(start, start + EVALUATION_BATCH) for start in range(0, len(split), EVALUATION_BATCH)]

    @property
    def evaluation(self) -> str | None:
        """How the model is evaluated if an image's result depends on other images, else None."""
        if not self.mixes_images:
            return None
        return f"batch statistics over shuffled chunks of at most {EVALUATION_BATCH} images"

    def forward(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Logits in float32 by ``model``, the run's by default, in the run's precision and memory format."""
        model = self.model if model is None else model
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.autocast_dtype is None:
            return model(images)
        with torch.autocast(self.device.type, self.autocast_dtype):
            return model(images).float()

    def state_dict(self) -> dict:
        """Everything that the next step depends on, and the contents of the meter."""
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        for key, value in model.items():
            model[key] = whole(value)
        state = {i: {key: whole(value) for key, value in each.items()} for i, each in optimizer["state"].items()}
        return {
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "num_bad_gradients": self.num_bad_gradients,
            "model": model,
            "optimizer": optimizer | {"state": state},
            "scaler": self.scaler.state_dict(),
            "batches": self.batches.state_dict(),
            "meter": self.meter.state_dict(),
            "draws": self.draws.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.has_moved = False
        self.num_steps = state["num_steps"]
        self.seconds = state["seconds"]
        self.num_bad_gradients = state.get("num_bad_gradients", 0)  # older checkpoints have none
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["batches"])
        self.meter.load_state_dict(state["meter"])
        self.draws.load_state_dict(state.get("draws", self.draws.states))  # older checkpoints have none


def whole(value: object) -> object:
    """``value``, copied if it is a view into a larger tensor, as in a fold: torch would save the larger one."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return value
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a norm of ``model``, in its present mode, normalizes by batch statistics."""
    return any(contract_of(module).uses_batch_statistics() for module in model.modules())


@torch.no_grad()
def depends_on_company(model: nn.Module, images: Tensor) -> bool:
    """Whether the results of ``images`` (prepared) in evaluation mode depend on the other images, by trying.

    Half of the images pass a copy of the model among the others and among black ones. Weights that are 0 are 0.1 in the
    copy, because they can hide what comes before them. An error counts as yes; a result on another device raises one.
    """
    model = copy.deepcopy(model).eval()
    for p in model.parameters():
        p.masked_fill_(p == 0, 0.1)
    half = shuffled(len(images), images.device)[: len(images) // 2]
    black = torch.full_like(images, images.min()).index_copy(0, half, images[half])
    try:
        with forked_rng(images.device):  # a model that draws in evaluation mode draws the same twice
            torch.manual_seed(0)
            results = model(images)[half]
            torch.manual_seed(0)
            among = model(black)[half]
    except FAILURES:
        return True
    if results.device != images.device:
        raise ValueError(f"its forward returns a tensor on {results.device}, and {images.device} is expected")
    size = float(results.nan_to_num().abs().max()) if len(half) else 0.0
    return not torch.allclose(results, among, rtol=0, atol=1e-3 * size, equal_nan=True)  # half precision rounds


def equal_chunks(order: Tensor) -> Sequence[Tensor]:
    """``order`` in as few chunks of at most EVALUATION_BATCH as there can be, equal up to one."""
    return order.tensor_split(-(-len(order) // EVALUATION_BATCH))


@cache
def shuffled(num_images: int, device: torch.device) -> Tensor:
    """A random permutation of ``num_images`` indices, the same every time and on every device."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(0)).to(device)


def find_non_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """1 in float32 on the device of ``parameters`` if a gradient holds inf or NaN, else 0."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    gradients = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    device = gradients[0].device if gradients else torch.device("cpu")
    found = torch.zeros((), device=device)
    for kind in {gradient.dtype for gradient in gradients}:
        alike = [gradient for gradient in gradients if gradient.dtype == kind]
        # torch's loss scaler checks gradients by the same function; here the factor is 1.
        torch._amp_foreach_non_finite_check_and_unscale_(alike, found, one_on(device))
    return found


@cache
def one_on(device: torch.device) -> Tensor:
    """1.0, made once."""
    return torch.ones((), device=device)
