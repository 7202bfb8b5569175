"""The layers of a model: names, shapes and parameters, and what goes in and comes out of them in a forward pass."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.norms.base import contract_of

LARGEST_BLOCK = 1024  # that a norm is expected to need
See = Callable[[str, Tensor, Tensor], Tensor | None]


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalizes, by what its contract says."""
    return contract_of(module).normalizes


def describe_norm(module: nn.Module, num_dims: int) -> str:
    """``BatchNorm over N, H, W`` for an input with ``num_dims`` dimensions, the class alone if it averages nothing.

    Empty for a module that is no norm.
    """
    if not is_norm(module):
        return ""
    name, over = type(module).__name__, contract_of(module).reduces_over(num_dims)
    return f"{name} over {over}" if over else name


def tracking_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms that keep running statistics, torch's own among them, by name."""
    return {name: module for name, module in model.named_modules() if contract_of(module).keeps_running_statistics()}


def takes_batch(modules: Iterable[nn.Module], batch_size: int) -> bool:
    """Whether the norms among ``modules`` that split a batch can split one of this size."""
    try:
        for module in modules:
            contract_of(module).check_batch_size(batch_size)
    except UserError:
        return False
    return True


def smallest_batch(model: nn.Module) -> int:
    """The smallest number of images, 2 or more, that ``model`` takes in evaluation mode.

    A norm without running statistics normalizes by those of the batch: one image can leave it one value per channel,
    and a norm that splits batches takes multiples of its block only.
    """
    tracking = set(tracking_norms(model).values())
    others = [module for module in model.modules() if module not in tracking]
    return next((size for size in range(2, LARGEST_BLOCK + 1) if takes_batch(others, size)), 2)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` by name, in the order of definition.

    Layers are norms, each with all that is inside it, other modules without children, and other modules with
    parameters of their own. So every parameter belongs to a layer.
    """
    found: dict[str, nn.Module] = {}
    inside_norms: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside_norms):
            continue
        if is_norm(module):
            inside_norms += (f"{name}.",)
        elif list(module.children()) and not list(module.parameters(recurse=False)):
            continue
        found[name] = module
    return found


def activation_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The norms that end with an activation other than the identity."""
    return {name: m for name, m in model.named_modules() if contract_of(m).activation != "identity"}


@contextmanager
def tapped(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Inside, every call of one of ``modules`` calls ``see(name, input, output)``; input is the first argument.

    What ``see`` returns, unless None, takes the output's place.
    """

    def hook(name: str) -> Callable:
        return lambda module, args, kwargs, output: see(name, (*args, *kwargs.values())[0], output)

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Layer(NamedTuple):
    """One layer and what it does to one image: shapes are without the batch.

    ``num_parameters`` counts the parameters that no earlier layer has; ``norm`` is :func:`describe_norm`'s.
    Shapes are empty for a layer that images do not pass, and where the input or output is no tensor.
    """

    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    num_parameters: int
    norm: str
    multiply_adds: int


def list_layers(model: nn.Module, in_shape: Sequence[int], device: torch.device | str = "meta") -> list[Layer]:
    """The layers of ``model`` in the order in which images leave them, in evaluation mode, then those not passed.

    A copy of the model runs on a batch of :func:`smallest_batch` images. Multiply-adds are those of convolutions and
    dense layers; everything else costs little beside them.
    """
    layers, found = named_layers(model), {}
    num_parameters = count_parameters(layers)

    def see(name: str, x: Tensor, output: Tensor) -> None:
        shapes = [tuple(each.shape[1:]) if isinstance(each, Tensor) else () for each in (x, output)]
        is_product = isinstance(layers[name], nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
        cost = math.prod(shapes[1]) * layers[name].weight[0].numel() if is_product else 0
        norm = describe_norm(layers[name], len(shapes[1]) + 1)
        found.setdefault(name, Layer(name, *shapes, num_parameters[name], norm, cost))

    shadow = copy.deepcopy(model).to(device).eval()
    with torch.no_grad(), tapped(named_layers(shadow), see):
        shadow(torch.zeros(smallest_batch(model), *in_shape, device=device))
    unseen = [
        Layer(name, (), (), num_parameters[name], type(layer).__name__ if is_norm(layer) else "", 0)
        for name, layer in layers.items() if name not in found and (num_parameters[name] or is_norm(layer))
    ]  # fmt: skip
    return [*found.values(), *unseen]


def count_parameters(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """How many numbers the parameters of every layer hold; a shared parameter counts where it comes first."""
    counted: set[nn.Parameter] = set()
    numbers = {}
    for name, layer in layers.items():
        own = set(layer.parameters(recurse=is_norm(layer))) - counted
        numbers[name] = sum(parameter.numel() for parameter in own)
        counted |= own
    return numbers
