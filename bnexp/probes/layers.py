"""Where a model can be listened to: its layers, and what goes in and comes out of them during a forward pass."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnexp.norms.base import contract_of

See = Callable[[str, Tensor, Tensor], Tensor | None]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Norms, with whatever is inside them, and modules without children, by name in the order of definition."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = name.startswith(tuple(f"{outer}." for outer in found))
        if not is_inside and (contract_of(module).normalizes or not any(module.children())):
            found[name] = module
    return found


def activation_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The norms that end with an activation other than the identity."""
    return {name: m for name, m in model.named_modules() if contract_of(m).activation != "identity"}


@contextmanager
def tapped(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Inside, every pass through one of ``modules`` calls ``see(name, input, output)``.

    What ``see`` returns, unless None, takes the output's place.
    """

    def hook(name: str) -> Callable:
        return lambda module, args, output: see(name, args[0], output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Layer(NamedTuple):
    """One layer as a forward pass meets it; ``norm`` is empty for what is no norm."""

    name: str
    out_shape: tuple[int, ...]
    num_parameters: int
    norm: str
    multiply_adds: int


def describe_norm(module: nn.Module, num_dims: int) -> str:
    """``BatchNorm over N, H, W``, the class alone if it averages nothing, empty for what is no norm.

    ``num_dims`` is the number of dimensions of its input.
    """
    contract = contract_of(module)
    if not contract.normalizes:
        return ""
    name, over = type(module).__name__, contract.reduces_over(num_dims)
    return f"{name} over {over}" if over else name


def list_layers(
    model: nn.Module, in_shape: Sequence[int], batch_size: int = 32, device: str = "meta"
) -> list[Layer]:
    """The layers of ``model`` in the order an input (batch_size, *in_shape) passes them, in evaluation mode.

    A layer is a norm or a module without children. Multiply-adds are those of one image in convolutions and
    dense layers; everything else costs little beside them.
    """
    layers = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            is_product = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
            cost = out.numel() // batch_size * module.weight[0].numel() if is_product else 0
            num_parameters = sum(p.numel() for p in module.parameters())
            norm = describe_norm(module, args[0].dim())
            layers.setdefault(name, Layer(name, tuple(out.shape), num_parameters, norm, cost))

        module.register_forward_hook(hook)

    shadow = copy.deepcopy(model).to(device).eval()
    inside_norm = ()
    for name, module in shadow.named_modules():
        if inside_norm and name.startswith(inside_norm):
            continue
        if contract_of(module).normalizes:
            inside_norm += (f"{name}.",)
            watch(name, module)
        elif not any(module.children()):
            watch(name, module)
    with torch.no_grad():
        shadow(torch.empty(batch_size, *in_shape, device=device))
    return list(layers.values())
