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

from bnexp.cli.flags import parse_line, was_shown
from bnexp.config import schema
from bnexp.config.compose import composed, session
from bnexp.config.start import fitting
from bnexp.config.stored import moved
from bnexp.probes.layers import list_layers


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


def summary(arguments: list[str]) -> int:
    """``bnexp summary [overrides]``: the layers of the model that these overrides make; reads no data."""
    from bnexp.cli.inspect import show_summary
    from bnexp.config import check, parts

    line = parse_line("summary", arguments)
    if was_shown(line):
        return 0
    with session(line.source):
        cfg = composed(line.words)
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
    cfg = moved(question.folder, question.overrides, "inspect")
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
