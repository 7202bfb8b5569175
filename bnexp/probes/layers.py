"""The layers of a model: names, shapes and parameters, and their inputs and outputs in a forward pass."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.norms.base import contract_of

LARGEST_BLOCK = 1024  # the largest block of examples that a norm is expected to need
PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # layers whose multiply-adds count
See = Callable[[str, Tensor, Tensor], Tensor | None]


def describe_norm(module: nn.Module, num_dims: int) -> str:
    """``BatchNorm over N, H, W`` for an input with ``num_dims`` dimensions; empty for a module that is no norm."""
    if not contract_of(module).normalizes:
        return ""
    name, over = type(module).__name__, contract_of(module).reduces_over(num_dims)
    return f"{name} over {over}" if over else name


def tracking_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms that keep running statistics, torch's own among them, by name."""
    return {name: module for name, module in model.named_modules() if contract_of(module).keeps_running_statistics()}


def takes_batch(modules: Iterable[nn.Module], batch_size: int) -> bool:
    """Whether all norms among ``modules`` accept a batch of this size."""
    try:
        for module in modules:
            contract_of(module).check_batch_size(batch_size)
    except UserError:
        return False
    return True


def is_own_module(module: nn.Module) -> bool:
    """Whether ``module`` is of the user's own code, and its class does not say itself which batches it takes."""
    is_foreign = type(module).__module__.partition(".")[0] not in ("bnexp", "torch", "torchvision")
    return is_foreign and "check_batch_size" not in vars(type(module))


def smallest_batch(model: nn.Module, batch_size: int = 2) -> int:
    """The smallest number of images, 2 or more, that ``model`` accepts in evaluation mode.

    A norm without running statistics uses batch statistics. One image may then have one value per channel, and a norm
    that normalizes in blocks accepts only multiples of its block. A module of the user's own is sure to take the run's
    ``batch_size`` only.
    """
    least = batch_size if any(map(is_own_module, model.modules())) else 2
    tracking = set(tracking_norms(model).values())
    others = [module for module in model.modules() if module not in tracking]
    return next((size for size in range(least, least + LARGEST_BLOCK) if takes_batch(others, size)), least)


def is_whole(module: nn.Module) -> bool:
    """Whether ``module`` is one layer with all modules inside it, as a norm or a dense layer with a parametrization."""
    return contract_of(module).normalizes or isinstance(module, PRODUCTS)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` by name, in the order of definition.

    Layers are norms and PRODUCTS (with the modules inside them), other modules without children, and other modules that
    own parameters. So every parameter and every multiply-add belongs to a layer.
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if is_whole(module):
            inside += (f"{name}.",)
        elif list(module.children()) and not list(module.parameters(recurse=False)):
            continue
        found[name] = module
    return found


def activation_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The norms that end with an activation other than the identity."""
    return {name: m for name, m in model.named_modules() if contract_of(m).activation != "identity"}


@contextmanager
def tapped(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Inside, every call of one of ``modules`` calls ``see(name, input, output)`` with its first argument as input.

    A call without arguments is passed over. The result of ``see``, unless None, replaces the output.
    """

    def hook(name: str) -> Callable:
        def call(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            given = (*args, *kwargs.values())
            return see(name, given[0], output) if given else None

        return call

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Layer(NamedTuple):
    """One layer; shapes are those of one image, and multiply-adds are counted per image.

    ``num_parameters`` leaves out parameters of earlier layers; ``norm`` is the text of :func:`describe_norm`.
    Shapes are empty for a layer that the forward pass does not call, and for an input or output that is no tensor.
    """

    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    num_parameters: int
    norm: str
    multiply_adds: int


def list_layers(
    model: nn.Module, in_shape: Sequence[int], device: torch.device | str = "meta", batch_size: int = 2
) -> list[Layer]:
    """The layers of ``model`` in the order in which a forward pass leaves them, then those that it does not call.

    A copy of the model in evaluation mode runs on :func:`smallest_batch` images. Multiply-adds are those of all calls
    of PRODUCTS, those inside a norm too; everything else costs little beside them.
    """
    layers, found, costs = named_layers(model), {}, Counter()
    num_parameters, batch_size = count_parameters(layers), smallest_batch(model, batch_size)
    shadow = copy.deepcopy(model).to(device).eval()
    products = {name: module for name, module in shadow.named_modules() if isinstance(module, PRODUCTS)}

    def see(name: str, x: Tensor, output: Tensor) -> None:
        shapes = [tuple(each.shape[1:]) if isinstance(each, Tensor) else () for each in (x, output)]
        norm = describe_norm(layers[name], len(shapes[1]) + 1)
        found.setdefault(name, Layer(name, *shapes, num_parameters[name], norm, 0))

    def count(name: str, _: Tensor, output: Tensor) -> None:
        owner = max((layer for layer in layers if f"{name}.".startswith(f"{layer}.")), key=len)
        costs[owner] += output.numel() * products[name].weight[0].numel() if isinstance(output, Tensor) else 0

    with torch.no_grad(), tapped(named_layers(shadow), see), tapped(products, count):
        shadow(torch.zeros(batch_size, *in_shape, device=device))
    unseen = [
        Layer(name, (), (), num_parameters[name], type(layer).__name__ if contract_of(layer).normalizes else "", 0)
        for name, layer in layers.items()
        if name not in found and (num_parameters[name] or contract_of(layer).normalizes)
    ]
    return [each._replace(multiply_adds=costs[each.name] // batch_size) for each in (*found.values(), *unseen)]


def count_parameters(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """The number of parameters of every layer; a shared parameter counts for the first layer that has it."""
    counted: set[nn.Parameter] = set()
    numbers = {}
    for name, layer in layers.items():
        own = set(layer.parameters(recurse=is_whole(layer))) - counted
        numbers[name] = sum(parameter.numel() for parameter in own)
        counted |= own
    return numbers
