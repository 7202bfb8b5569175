"""Shows a model before anybody trains it: its layers, their shapes and parameters, and where norms sit.

The model runs once on torch's meta device, where tensors have shapes and no contents, so a size of 224 costs
what a size of 28 costs, and the model itself is left as it was.
"""

from collections.abc import Sequence

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from bnexp.config import schema
from bnexp.config.compose import change, composed, stored_config
from bnexp.config.start import fitting
from bnexp.probes.layers import list_layers
from bnexp.probes.shapes import show_shape


def summary_table(model: nn.Module, in_shape: Sequence[int]) -> Table:
    """A table of the layers, closed by totals: parameters, buffer elements and multiply-adds per image.

    Outputs are those of one image; the layers of every shipped model fit a terminal of 80 columns.
    """
    layers = list_layers(model, in_shape)
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("output", justify="right", overflow="fold")
    table.add_column("parameters", justify="right", overflow="fold")
    table.add_column("norm", overflow="fold")
    for layer in layers:
        shape = show_shape(layer.out_shape) or "-"
        table.add_row(layer.name or "(model)", shape, f"{layer.num_parameters:,}", layer.norm or "-")
    table.add_section()
    num_parameters = sum(layer.num_parameters for layer in layers)
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if num_trainable != num_parameters:
        table.add_row("parameters", "", f"{num_parameters:,}", "")
    table.add_row("trainable parameters", "", f"{num_trainable:,}", "")
    table.add_row("buffer elements", "", f"{sum(b.numel() for b in model.buffers()):,}", "")
    table.add_row("multiply-adds per image", "", f"{sum(layer.multiply_adds for layer in layers):,}", "")
    return table


def show_summary(model: nn.Module, in_shape: Sequence[int]) -> None:
    """Print the table."""
    Console().print(summary_table(model, in_shape))


def summary(arguments: list[str]) -> int:
    """``bnexp summary [overrides]``: the layers of the model that these overrides make; reads no data."""
    from bnexp.cli.inspect import show_summary
    from bnexp.config import check, parts

    cfg = composed(arguments)
    check.check(cfg, runs=False)
    source = parts.part(cfg, "data")()
    show_summary(parts.make_model(cfg, source), source.in_shape)
    return 0


def inspect(arguments: list[str]) -> int:
    """``bnexp inspect RUN``: a run looked at again, from its last checkpoint; its own files stay as they are."""
    from bnexp.config import build, check, parts
    from bnexp.inspect import inspection
    from bnexp.probes.layers import list_layers
    from bnexp.store import checkpoint

    question = inspection.parse(arguments)
    cfg = stored_config(question.folder)
    change(cfg, question.overrides, "inspect")
    cfg.engine = OmegaConf.structured(schema.Train).engine  # nothing is trained: a graph's run can be seen on a CPU
    check.check(cfg, free=False)
    source = parts.part(cfg, "data")()
    model = parts.meta_model(cfg, source)
    inspection.check_layers(question.layers, [layer.name for layer in list_layers(model, source.in_shape)])
    state = checkpoint.load(question.folder, parts.find_device(cfg.device), model)
    run = build.build(cfg)
    with fitting(question.folder / checkpoint.NAME):
        run.model.load_state_dict(state["model"])
    run.num_steps = state["num_steps"]
    inspection.inspect(run, question)
    return 0
