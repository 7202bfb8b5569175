"""The settings of ``loop.py``; read before torch is imported, which takes seconds."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from bnexp.bench.results import check_results_folder
from bnexp.config.choices import choices
from bnexp.errors import UserError, nearest

SOURCES = {  # grey images, which the tutorial's loop needs
    "mnist": "bnexp.data.mnist.MNIST",
    "fashion_mnist": "bnexp.data.mnist.FashionMNIST",
    "digits": "bnexp.data.digits.Digits",
}
ROUNDS = {"quick": 5, "full": 9}
IMAGES = {"quick": {"cpu": 5_120, "cuda": 51_200}, "full": {"cpu": 51_200, "cuda": 51_200}}
SLOWER = {"resnet": 40, "densenet": 40}  # a turn of these on a CPU takes so many times fewer images
CHOICES = {
    "models": [each for each in choices("model") if each not in ("torchvision", "timm", "own")],
    "engines": choices("engine"),
    "data": list(SOURCES),
    "parts": ["epochs", "start", "sweep"],
    "set": list(ROUNDS),
}
USAGE = """usage: python tests/bench/loop.py [setting=value] ...

Times, in turns: an epoch of bnexp; the bare floor (images ready as floats, nothing looked at); a tutorial's loop
(torchvision, ToTensor, DataLoader with 2 workers, loss and accuracy read at every step). Also measures what writer,
progress and probes take, the time from the start of a process to its first step, peak memory, and a sweep.

  models=lenet,mlp,resnet   {models}
  batch_sizes=16,32,256
  engines=...               {engines}; by default all that run on the device
  data=mnist                {data}
  parts=epochs,start,sweep  {parts}
  set=quick                 {set}: quick takes short turns, and engines but eager at the largest batch size only;
                            full also times the tutorial's loop in a process with torch's own number of threads
  rounds=N                  timed turns of every loop; 5, set=full 9
  images=N                  images in a turn, from which an epoch of 60,000 is computed; 5120, set=full or on a GPU
                            51200, deep models on a CPU a fortieth
  device=auto               auto, cpu, cuda or cuda:N
  out=DIR                   for bench.csv and bench.json; a new folder under outputs/ by default"""


@dataclass(frozen=True)
class LoopSettings:
    """What the script measures, and where it writes."""

    models: list[str] = field(default_factory=lambda: ["lenet", "mlp", "resnet"])
    batch_sizes: list[int] = field(default_factory=lambda: [16, 32, 256])
    engines: list[str] = field(default_factory=lambda: CHOICES["engines"])
    data: str = "mnist"
    parts: list[str] = field(default_factory=lambda: CHOICES["parts"])
    set: str = "quick"
    rounds: int | None = None
    images: int | None = None
    device: str = "auto"
    out: str | None = None

    @property
    def num_rounds(self) -> int:
        return self.rounds or ROUNDS[self.set]

    def num_steps(self, model: str, batch_size: int, device: str) -> int:
        """Steps in a turn on ``device``, cpu or cuda."""
        fewer = SLOWER.get(model, 1) if device == "cpu" else 1
        return max(1, (self.images or IMAGES[self.set][device]) // fewer // batch_size)


def read_loop_settings(words: Sequence[str]) -> LoopSettings:
    """The settings in ``words``, each ``setting=value``, lists with commas; :class:`UserError` for any other word."""
    settings = OmegaConf.structured(LoopSettings)
    given: set[str] = set()
    for word in words:
        key, _, value = word.partition("=")
        if key not in settings:
            near = nearest(key, settings)
            raise UserError(f"{word}: no setting of loop.py{near}; settings are {', '.join(settings)}")
        if not value:
            raise UserError(f"{word}: has no value; give one as {key}=VALUE")
        if key in given:
            raise UserError(f"{word}: {key} is given twice; give it once")
        given.add(key)
        is_list = OmegaConf.is_list(settings[key])
        values = value.split(",") if is_list else [value]
        check_values(word, values, CHOICES.get(key, values))
        try:
            settings = OmegaConf.merge(settings, {key: values if is_list else value})
            counts = [count for count in (settings[key] if is_list else [settings[key]]) if isinstance(count, int)]
        except ValidationError:
            counts = [0]
        if any(count < 1 for count in counts):
            what = "whole numbers, with commas between them," if is_list else "a whole number,"
            raise UserError(f"{word}: has to be {what} 1 or more")
    settings = OmegaConf.to_object(settings)
    if settings.images and settings.images < (largest := max(settings.batch_sizes)):
        raise UserError(
            f"images={settings.images}: not one batch of {largest}; give as many images or more, or smaller batch_sizes"
        )
    if settings.out:
        check_results_folder(Path(settings.out))
    return settings


def check_values(word: str, values: Sequence[str], allowed: Collection[str]) -> None:
    """Raise :class:`UserError` for a value of ``word`` that is not allowed, is repeated, or is OmegaConf's syntax."""
    for value in values:
        if value not in allowed:
            raise UserError(f"{word}: {value} is not known{nearest(value, allowed)}; choose {', '.join(allowed)}")
        if "${" in value or value == "???":
            raise UserError(f"{word}: ${{...}} and ??? have a meaning of their own in settings; give another value")
    if len(set(values)) < len(values):
        raise UserError(f"{word}: a value stands there twice; give each once")
