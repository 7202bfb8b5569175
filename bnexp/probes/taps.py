"""Where a model can be listened to: its layers, and what goes in and comes out of them during a forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from bnexp.norms.base import ACTIVATIONS

See = Callable[[str, Tensor, Tensor], Tensor | None]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Norms, with whatever is inside them, and modules without children, by name in the order of definition."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = name.startswith(tuple(f"{outer}." for outer in found))
        if not is_inside and (hasattr(module, "reduces_over") or not any(module.children())):
            found[name] = module
    return found


def activation_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The norms that end with an activation other than the identity."""
    modules = {name: module for name, module in model.named_modules()}
    return {name: m for name, m in modules.items() if ACTIVATIONS.get(getattr(m, "activation", None)) is not None}


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
