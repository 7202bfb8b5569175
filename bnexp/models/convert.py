"""Exchanges the batch norms of a network from elsewhere for another norm, with the addition and activation after them.

``batch norm -> activation`` and ``batch norm -> add -> activation`` in the network's graph (torch.fx) become one call
``norm(C, activation)(x, residual)``, so that a norm gets here what it gets in the models of bnexp.
"""

import copy
import inspect
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bnexp.errors import UserError, first_line

EXACT = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
TIMMS = "timm.layers.norm_act.BatchNormAct2d"  # batch norm, then its own modules drop and act
SPELLINGS = {  # those that a norm takes: a function, and what else computes it in a graph
    "relu": (F.relu, nn.ReLU, torch.relu, torch.relu_, "relu", "relu_"), "relu6": (F.relu6, nn.ReLU6),
    "silu": (F.silu, nn.SiLU), "hardswish": (F.hardswish, nn.Hardswish),
    "gelu": (F.gelu, nn.GELU, "timm.layers.activations.GELU"),
    "sigmoid": (torch.sigmoid, nn.Sigmoid, F.sigmoid, "sigmoid"), "tanh": (torch.tanh, nn.Tanh, F.tanh, "tanh"),
}  # fmt: skip
NAMES = {each: name for name, spellings in SPELLINGS.items() for each in spellings}
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
PLANS: dict[Hashable, tuple] = {}  # what plan_fusion() has found, by the key of the model
ROUNDING = 1e-8  # float64 rounds to 1e-16, deep networks amplify it, and sums of gradients may come in another order


class Conversion(NamedTuple):
    """What became of a network's batch norms: its attribute ``conversion``."""

    sites: dict[str, str]  # by name, what the call does after normalizing: "", "relu", "add", "add + relu"
    biases: list[str]  # layers straight before a norm, whose biases are left out
    left: Counter  # other modules that normalize, by class
    own: dict[str, list]  # the model's own eps and momentum, where the norm takes them and none is given
    note: str  # why nothing was fused

    def lines(self) -> list[str]:
        """Sentences for the person."""
        counts = Counter(self.sites.values()).most_common()
        kinds = ", ".join(f"{count} with {kind}" if kind else f"{count} alone" for kind, count in counts)
        left = ", ".join(f"{count} {kind}" for kind, count in self.left.items()) or "no other norm"
        own = "".join(f"; {key} {', '.join(map(str, values))}" for key, values in self.own.items())
        found = f"{len(self.sites)} batch norms exchanged ({kinds}), {left} left, {len(self.biases)} biases left out"
        return [f"{found}{own}; initial weights: the model's own", *[self.note] * bool(self.note)]


def convert(
    model: nn.Module, norm: Callable[..., nn.Module], images: Tensor, fuse: bool, label: str, key: Hashable
) -> None:  # fmt: skip
    """Exchange every batch norm of ``model`` in place.

    ``images``, float64 (N, C, H, W), pass the original and the network with fused calls, both still with batch norm, on
    a copy, in training and evaluation mode. Unless outputs, gradients and running statistics are the same, nothing is
    fused. This is found out once for all models of one ``key``, and not on torch's meta device. Weights, eps, momentum
    and state-dict keys of the batch norms stay; biases of layers straight before them go. ``label`` names the model.

    :class:`UserError` for a subclass of batch norm, which may compute something else, for a model without batch norm,
    and for a norm that does not fit a width.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, module in found.items():
        if type(module) not in EXACT and spelled(module) != TIMMS:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            what = "which may compute something else; only torch's BatchNorm1d, 2d and 3d and timm's BatchNormAct2d"
            raise UserError(f"{label}: {name} is a {kind}, {what} can be exchanged")
    if not found:
        raise UserError(f"{label}: has no batch norm, so norm= would change nothing; choose a model with batch norm")
    sites, forward, biases, note = PLANS[key] if key in PLANS else plan_fusion(model, images, fuse, label)
    if not images.is_meta:
        PLANS[key] = (sites, forward, biases, note)
    for name in biases:
        model.get_submodule(name).bias = None
    made = exchange(found, sites, norm, is_walked=forward is None)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in made:
            model.set_submodule(name, made[module])
    if forward:
        use_forward(model, forward)
    others = [m for m in model.modules() if re.search(r"Norm(\dd)?$", type(m).__name__) and m not in made.values()]
    own = {k: sorted({getattr(bn, k) for bn in made}, key=str) for k in ("eps", "momentum") if k in options_left(norm)}
    kinds = {name: " + ".join(["add"] * adds + [act] * (act != "identity")) for name, (act, adds) in sites.items()}
    left = Counter(type(module).__name__ for module in others)
    model.conversion = Conversion(dict.fromkeys(found, "") | kinds, biases, left, own, note)


def plan_fusion(
    model: nn.Module, images: Tensor, fuse: bool, label: str
) -> tuple[dict, Callable | None, list[str], str]:
    """Fused calls, the forward that makes them, layers that lose their biases, and why nothing is fused."""
    sites, forward, biases, note = {}, None, [], ""
    try:
        graph = Tracer().trace(model)
        biases = biased_layers(graph, model)
        sites, forward = rewritten(graph, model, images) if fuse else ({}, None)
    except Exception as error:  # what another's forward does when it is traced can fail in any way
        note = f"{label}: nothing is fused, batch norms were exchanged one by one ({first_line(error)})"
    return sites, forward, biases, note


def spelled(module: nn.Module) -> Any:
    """The class of ``module``; of timm's, which may not be here, its dotted name."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__module__.startswith("timm.layers") else kind


class Tracer(fx.Tracer):
    """Looks only into modules that hold batch norms; the others, such as StochasticDepth, may branch as they like."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _BatchNorm) or not any(isinstance(each, _BatchNorm) for each in module.modules())

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        y = super().call_module(module, forward, args, kwargs)
        if spelled(module) != TIMMS:
            return y
        return module.act(y if type(module.drop) is nn.Identity else module.drop(y))


class ShapeNotes(fx.Interpreter):
    """Notes the shape of every tensor in the graph."""

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        node.meta["shape"] = getattr(result, "shape", None)
        return result


def called(graph: fx.Graph, model: nn.Module) -> dict[fx.Node, nn.Module]:
    """The modules that are called, by node, without layers and norms that are called more than once."""
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls, modules = Counter(node.target for node in nodes), {n: model.get_submodule(n.target) for n in nodes}
    return {node: each for node, each in modules.items() if calls[node.target] == 1 or not [*each.parameters()]}


def biased_layers(graph: fx.Graph, model: nn.Module) -> list[str]:
    """Layers with a bias whose output goes into a batch norm and nowhere else."""
    modules, found = called(graph, model), []
    for node, module in modules.items():
        before = node.args[0]
        layer = modules.get(before)
        if isinstance(module, _BatchNorm) and isinstance(layer, _ConvNd | nn.Linear) and len(before.users) == 1:
            found += [before.target] * (layer.bias is not None)
    return found


def rewritten(graph: fx.Graph, model: nn.Module, images: Tensor) -> tuple[dict[str, tuple[str, bool]], Callable]:
    """Activation and addition of the fused calls by name, and the forward function that makes them.

    ValueError if it does not compute the same.
    """
    if any(node.op == "get_attr" and node.target.startswith("_tensor_constant") for node in graph.nodes):
        raise ValueError("its forward makes tensors of its own")
    twin = copy.deepcopy(model).double().train()
    state = copy.deepcopy(twin.state_dict())
    expected = [] if images.is_meta else observed(twin, images)
    twin.load_state_dict(state)
    for module in list(twin.modules()):
        if spelled(module) == TIMMS:
            module.__class__ = nn.BatchNorm2d  # its drop and act are in the graph
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        inputs = (images,)
        for hook in twin._forward_pre_hooks.values():
            inputs = hook(twin, inputs) or inputs
        ShapeNotes(fx.GraphModule(twin, graph)).run(*inputs)
    twin.load_state_dict(state)
    sites = fuse_calls(graph, twin)
    forward = type(fx.GraphModule(twin, graph)).forward
    for name, (activation, _) in sites.items():
        twin.set_submodule(name, Stand(twin.get_submodule(name), activation))
    use_forward(twin, forward)
    for mine, theirs in zip(observed(twin, images) if expected else [], expected, strict=True):
        if not (mine - theirs).double().norm() <= ROUNDING * (1 + theirs.double().norm()):
            raise ValueError("outputs, gradients or running statistics of the fused network differ")
    return sites, forward


def fuse_calls(graph: fx.Graph, model: nn.Module) -> dict[str, tuple[str, bool]]:
    """Replace batch norm, addition and activation by one call of the norm, in place; what each call does, by name."""
    modules, sites = called(graph, model), {}
    for node, module in modules.items():
        if not isinstance(module, _BatchNorm):
            continue
        chain, residual, activation = [node], None, "identity"
        user = only_user(node)
        if user and user.target in ADDITIONS and len(user.args) == 2 and not user.kwargs:
            other = user.args[user.args[0] is node]
            if isinstance(other, fx.Node) and other.meta["shape"] == node.meta["shape"]:
                chain, residual, user = [user, node], other, only_user(user)
        act = modules.get(user)
        kind = spelled(act) if act else user and user.target
        if kind in NAMES and set(user.kwargs) <= {"inplace"} and getattr(act, "approximate", "none") == "none":
            chain, activation = [user, *chain], NAMES[kind]
        sites[node.target] = (activation, residual is not None)
        with graph.inserting_before(chain[0]):
            call = graph.call_module(node.target, (node.args[0], *[residual] * (residual is not None)))
        chain[0].replace_all_uses_with(call)
        for each in chain:
            graph.erase_node(each)
        call.meta["shape"] = node.meta["shape"]
    return sites


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


class Stand(nn.Module):
    """``activation(batch norm(x) + residual)``: a norm's stand-in while the fused network is compared."""

    def __init__(self, bn: _BatchNorm, activation: str) -> None:
        super().__init__()
        self.bn, self.activation = bn, SPELLINGS[activation][0] if activation in SPELLINGS else nn.Identity()
        for name, child in bn.named_children():  # timm's drop and act, which the graph may call
            self.add_module(name, child)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.activation(self.bn(x) if residual is None else self.bn(x) + residual)


def use_forward(model: nn.Module, forward: Callable) -> None:
    """Give ``model`` this forward function, by a class of its own; modules, attributes and names stay."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def observed(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Outputs and gradients in training mode, then buffers, and outputs in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout draws the same twice
        output = model.train()(images)
        output.square().mean().backward()
        gradients = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
        model.zero_grad()
        with torch.no_grad():
            return [output.detach(), *gradients, *(b.clone() for b in model.buffers()), model.eval()(images)]


def given_to(norm: Callable[..., nn.Module]) -> Mapping[str, Any]:
    """The options of ``norm`` that the config gives."""
    return getattr(inspect.unwrap(norm), "keywords", {})


def options_left(norm: Callable[..., nn.Module]) -> set[str]:
    """The options that ``norm`` takes and the config does not give; with ``decay`` it gives the momentum."""
    given = given_to(norm)
    return set(inspect.signature(norm).parameters) - {*given, *["momentum"] * (given.get("decay") is not None)}


def exchange(found: Mapping[str, _BatchNorm], sites: Mapping[str, tuple], norm: Callable, is_walked: bool) -> dict:
    """A norm for every batch norm; :class:`UserError` names the layers with widths that it does not fit."""
    made, refused = {}, {}
    for name, bn in found.items():
        try:
            made[bn] = norm_like(bn, norm, sites.get(name, ("identity",))[0])
        except UserError as error:
            refused.setdefault(bn.num_features, (error, []))[1].append(name)
            continue
        if spelled(bn) == TIMMS:
            made[bn].drop, made[bn].act = bn.drop, bn.act
        if spelled(bn) == TIMMS and is_walked:
            made[bn].register_forward_hook(drop_and_act)
    if not refused:
        return made
    groups, most = given_to(norm).get("groups"), math.gcd(*(bn.num_features for bn in found.values()))
    if type(groups) is not int or groups < 1:
        raise next(iter(refused.values()))[0]
    where = "; ".join(
        f"{width} channels ({names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)})"
        for width, (_, names) in refused.items()
    )
    able = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
    raise UserError(f"norm.groups={groups}: does not divide {where}; numbers that divide all widths: {able}")


def drop_and_act(norm: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """What timm's batch norm does after normalizing."""
    return norm.act(norm.drop(output))


def norm_like(bn: _BatchNorm, norm: Callable[..., nn.Module], activation: str) -> nn.Module:
    """A norm with the width, eps, momentum, weight and bias of ``bn``, as far as it takes or has them."""
    options = {key: getattr(bn, key) for key in ("eps", "momentum") if key in options_left(norm)}
    taken = inspect.signature(norm).parameters
    options |= {k: False for k in ("affine", "track_running_stats") if k in taken and not getattr(bn, k)}
    made = norm(bn.num_features, activation=activation, **options).train(bn.training)
    count = bn.num_batches_tracked
    is_trained = count is not None and not count.is_meta and count > 0
    for key in ("weight", "bias", *["running_mean", "running_var", "num_batches_tracked"] * is_trained):
        mine, theirs = getattr(made, key, None), getattr(bn, key)
        if isinstance(mine, Tensor) and theirs is not None and mine.shape == theirs.shape:
            mine.data.copy_(theirs.data)
            mine.requires_grad_(theirs.requires_grad)
    return made
