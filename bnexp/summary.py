"""Shows a model before anybody trains it: its layers, their shapes and parameters, and where norms sit.

The model runs once on torch's meta device, where tensors have shapes and no contents, so a size of 224 costs
what a size of 28 costs, and the model itself is left as it was.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn


class Layer(NamedTuple):
    """One layer as a forward pass meets it; ``norm`` is empty for what is no norm."""

    name: str
    out_shape: tuple[int, ...]
    num_parameters: int
    norm: str
    multiply_adds: int


def describe_norm(module: nn.Module, num_dims: int) -> str:
    """``BatchNorm over N, H, W``, the class alone if it averages nothing, empty for what is no norm.

    A norm is what says so, by a method ``reduces_over(num_dims) -> str`` that names the dimensions its
    statistics are taken over, for an input with ``num_dims`` dimensions.
    """
    if not hasattr(module, "reduces_over"):
        return ""
    name, over = type(module).__name__, module.reduces_over(num_dims)
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
        if hasattr(module, "reduces_over"):
            inside_norm += (f"{name}.",)
            watch(name, module)
        elif not any(module.children()):
            watch(name, module)
    with torch.no_grad():
        shadow(torch.empty(batch_size, *in_shape, device=device))
    return list(layers.values())


def summary_table(model: nn.Module, in_shape: Sequence[int], batch_size: int = 32) -> Table:
    """A table of the layers, closed by trainable parameters, buffer elements and multiply-adds per image.

    Outputs are those of one image; the layers of every shipped model fit a terminal of 80 columns.
    """
    layers = list_layers(model, in_shape, batch_size)
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("output", justify="right", overflow="fold")
    table.add_column("parameters", justify="right", overflow="fold")
    table.add_column("norm", overflow="fold")
    for layer in layers:
        shape = "x".join(map(str, layer.out_shape[1:]))
        table.add_row(layer.name, shape, f"{layer.num_parameters:,}", layer.norm or "-")
    table.add_section()
    totals = {
        "trainable parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "buffer elements": sum(b.numel() for b in model.buffers()),
        "multiply-adds per image": sum(layer.multiply_adds for layer in layers),
    }
    for name, total in totals.items():
        table.add_row(name, "", f"{total:,}", "")
    return table


def show_summary(model: nn.Module, in_shape: Sequence[int]) -> None:
    """Print the table."""
    Console().print(summary_table(model, in_shape))
