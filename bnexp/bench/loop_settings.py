"""What ``bnexp bench loop`` can be asked; read before torch is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bnexp.bench.arguments import Form
from bnexp.errors import UserError

SOURCES = {  # grey images, as the tutorial's loop takes them
    "mnist": "bnexp.data.mnist.MNIST",
    "fashion_mnist": "bnexp.data.mnist.FashionMNIST",
    "digits": "bnexp.data.digits.Digits",
}
PARTS = ("epochs", "start", "sweep")
ROUNDS = {"quick": 5, "full": 9}
IMAGES = {"quick": {"cpu": 5_120, "cuda": 51_200}, "full": {"cpu": 51_200, "cuda": 51_200}}
SLOWER = {"resnet": 40, "densenet": 40}  # how many times fewer images a turn of these takes, on a CPU
USAGE = """usage: bnexp bench loop [setting=value] ...

An epoch of ours beside the bare floor (images ready as floats, nothing looked at) and beside a tutorial's loop
(torchvision, ToTensor, DataLoader with 2 workers, loss and accuracy read at every step), all in turns; what writer,
progress and probes take; from the start of a process to the first step; peak memory; a sweep.

  models=lenet,mlp,resnet   {models}
  batch_sizes=16,32,256
  engines=...               {engines}; by default all that run on the device
  data=mnist                {data}
  parts=epochs,start,sweep  {parts}
  set=quick                 {set}: quick takes short turns, and engines but eager at the largest batch size only;
                            full also runs the tutorial as it comes, in a process with torch's own number of threads
  rounds=N                  turns that every contestant gets; 5, set=full 9
  images=N                  images in a turn, from which an epoch of 60,000 is computed; 5120, set=full or on a GPU
                            51200, deep models on a CPU a fortieth
  device=auto               auto, cpu, cuda or cuda:N
  out=DIR                   for bench.csv and bench.json; a new folder under outputs/ by default"""


@dataclass(frozen=True)
class Settings:
    """What ``bnexp bench loop`` was asked for; ``command`` is the line that asks again."""

    models: tuple[str, ...] = ("lenet", "mlp", "resnet")
    batch_sizes: tuple[int, ...] = (16, 32, 256)
    engines: tuple[str, ...] = ()
    data: str = "mnist"
    parts: tuple[str, ...] = PARTS
    set: str = "quick"
    rounds: int | None = None
    images: int | None = None
    device: str = "auto"
    out: str | None = None
    command: str = "bnexp bench loop"

    @property
    def num_rounds(self) -> int:
        return self.rounds or ROUNDS[self.set]

    def num_steps(self, model: str, batch_size: int, device: str) -> int:
        """Steps in a turn, on a cpu or on cuda."""
        fewer = SLOWER.get(model, 1) if device == "cpu" else 1
        return max(1, (self.images or IMAGES[self.set][device]) // fewer // batch_size)


def parse(arguments: Sequence[str], choices: Mapping[str, Sequence[str]]) -> Settings:
    """``loop [setting=value] ...`` as typed; ``choices`` are the models and engines there are."""
    allowed = {"models": choices["model"], "engines": choices["engine"], "data": SOURCES, "parts": PARTS, "set": ROUNDS}
    numbers, lists = ("batch_sizes", "rounds", "images"), ("models", "batch_sizes", "engines", "parts")
    settings = Form("bench loop", Settings, USAGE, allowed, numbers, lists).parse(arguments)
    if settings.images and settings.images < max(settings.batch_sizes):
        raise UserError(
            f"images={settings.images}: not one batch of {max(settings.batch_sizes)}; give as many images or more, "
            "or smaller batch_sizes"
        )
    return replace(settings, engines=settings.engines or tuple(choices["engine"]))
