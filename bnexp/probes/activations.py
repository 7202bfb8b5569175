"""The inputs of activations: their distribution, and the share that saturates the activation."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bnexp.norms.base import ACTIVATIONS, contract_of
from bnexp.probes.layers import activation_sites, tapped
from bnexp.probes.population import shadow, some_images
from bnexp.store.readings import Histogram, Reading, Scalar
from bnexp.train.probe import Probe
from bnexp.train.run import Run

MOST_VALUES = 2**15  # values of a layer; percentiles of so many are off by some tenths of a percentile
PERCENTILES = (15, 50, 85)  # those of Ioffe & Szegedy 2015 (arXiv:1502.03167), figure 1
# Sigmoid and tanh are saturated where the derivative is below 5% of its largest value. With s'(x) = sech^2(x / 2) / 4
# and tanh'(x) = sech^2(x) that is |x| > 2 arcosh(sqrt 20) and |x| > arcosh(sqrt 20).
EDGE = math.acosh(math.sqrt(20))
SATURATED = {
    "sigmoid": lambda x: x.abs() > 2 * EDGE,
    "tanh": lambda x: x.abs() > EDGE,
    "relu": lambda x: x <= 0,
    "relu6": lambda x: (x <= 0) | (x >= 6),
    "hardswish": lambda x: x < -1.275,  # derivative x / 3 + 1/2, at most 1.5
    "silu": lambda x: x < -1.0591201596,  # largest derivatives 1.0998 and 1.1289, solved numerically
    "gelu": lambda x: x < -0.6334566281,
}


class Activations(Probe):
    """The inputs of the activations, normalize(x) + residual, for ``images`` validation images in training mode.

    For every layer: ``activation/<layer>``, a histogram with ``bins`` equal bins between the smallest and the largest
    value; the percentiles ``/p15``, ``/p50`` and ``/p85`` of Ioffe & Szegedy; and ``/saturation``, the share of inputs
    at which the activation has a derivative below 5% of its largest value, for relu 0 or below (after Glorot & Bengio
    2010, "Understanding the difficulty of training deep feedforward neural networks", section 3).

    ``layers`` are names of norms, by default all with an activation other than the identity. ``unit`` chooses one unit
    or channel of every layer, as Ioffe & Szegedy do, instead of all.

    The images are one batch. In a layer with more than 2^15 values, so many are picked at equal distances. Values that
    are not finite are left out of the histogram; the scalars are NaN if one value is NaN.
    """

    def __init__(
        self,
        every: int = 500,
        layers: Sequence[str] | None = None,
        images: int = 256,
        unit: int | None = None,
        bins: int = 64,
    ) -> None:
        super().__init__(every)
        self.layers = layers
        self.images = self.at_least("images", images, 2, "images that make a batch")
        self.unit = None if unit is None else self.at_least("unit", unit, 0, "a unit or channel, counted from 0")
        self.bins = self.at_least("bins", bins, 1, "bins of a histogram")

    def check(self, model: nn.Module) -> None:
        sites = activation_sites(model)
        self.check_layers(self.layers or (), sites, "norm with an activation")
        for name in sites if self.layers is None else self.layers:
            width = next((p.shape[0] for p in sites[name].parameters() if p.dim()), None)
            width = contract_of(sites[name]).num_features or width
            if self.unit is not None and width is not None and self.unit >= width:
                why = f"{name} has {width} units; give 0 to {width - 1}, or null for all of them"
                raise self.refusal("unit", self.unit, why)

    @torch.no_grad()
    def look(self, run: Run, before: object) -> Iterator[Reading]:
        model = shadow(run)
        sites = activation_sites(model)
        sites = {name: sites[name] for name in (sites if self.layers is None else self.layers)}
        activations = {name: site.activation for name, site in sites.items()}
        values: dict[str, Tensor] = {}

        def see(name: str, _: Tensor, output: Tensor) -> Tensor:
            values[name] = sample(output if self.unit is None else output[:, self.unit])
            return ACTIVATIONS[activations[name]](output)

        for site in sites.values():
            site.activation = "identity"  # its output is then the input of the activation, which see() applies
        with tapped(sites, see):
            run.forward(run.dataset.prepare(some_images(run, self.images).images), model)
        if values:
            on_host = torch.cat(list(values.values())).cpu().split([len(each) for each in values.values()])
            for name, each in zip(values, on_host, strict=True):
                yield from describe(f"activation/{name}", each, activations[name], self.bins)


def sample(x: Tensor) -> Tensor:
    """At most MOST_VALUES values of ``x``, (n,) in float32, at equal distances.

    The distance has no factor in common with the number of values, so that no row, column or channel is preferred.
    """
    x = x.flatten()
    distance = -(-len(x) // MOST_VALUES)
    while math.gcd(distance, len(x)) > 1:
        distance += 1
    return x[::distance].float()


def describe(tag: str, values: Tensor, activation: str, bins: int) -> Iterator[Reading]:
    """The readings of one layer's ``values`` (n,), on the CPU."""
    is_nan = bool(values.isnan().any())
    percentiles = torch.quantile(values, torch.tensor(PERCENTILES) / 100).tolist()
    for name, value in zip(PERCENTILES, percentiles, strict=True):
        yield Scalar(f"{tag}/p{name}", value)
    saturated = SATURATED[activation](values).float().mean()
    yield Scalar(f"{tag}/saturation", math.nan if is_nan else float(saturated))
    finite = values[values.isfinite()].double()
    if len(finite):
        low, high = (float(end) for end in finite.aminmax())
        if low == high:  # one value: bins at least 1 wide together, and wide enough for floating point
            low, high = low - max(0.5, abs(low) / 8), high + max(0.5, abs(high) / 8)
        edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
        counts, _ = torch.histogram(finite, edges)
        yield Histogram(tag, tuple(edges.tolist()), tuple(int(count) for count in counts.tolist()))
