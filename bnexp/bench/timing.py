"""How long does each implementation of batch norm take on one case, when no input is in a cache?"""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnexp.bench.cases import PHASES, REFERENCE, SITES, Case
from bnexp.bench.parity import CHUNK, Inputs, State, copy_inputs, differences_from_float64, make_inputs, parity_failure
from bnexp.bench.settings import BenchSettings
from bnexp.data.stored import free_memory
from bnexp.engines.capture import CudaGraphs
from bnexp.errors import UserError, first_line
from bnexp.norms.base import contract_of

MAX_BUFFERS = 512  # small inputs would need thousands to fill a cache, and launches dominate their time anyway
REPLAYS = 10  # of each phase in a turn
EAGER_CALLS = ", eager calls"
MAX_INTERPRETED = 2**18  # number of values that Triton's interpreter computes in seconds


@dataclass(frozen=True)
class Implementation:
    """A batch norm to measure: ``factory(num_features, activation=...)``, compiled or not, called in ``context()``."""

    name: str
    factory: Callable[..., nn.Module]
    compiled: bool = False
    context: Callable[[], AbstractContextManager] = nullcontext

    def build(self, num_features: int, device: torch.device) -> tuple[nn.Module, Callable[..., Tensor]]:
        """The module, and the function to call in its place: compiled, or the module itself."""
        module = self.factory(num_features, activation="relu").to(device)
        return module, torch.compile(module, dynamic=False) if self.compiled else module


class Steps(NamedTuple):
    """What is timed: ``forward(inputs) -> y``, ``backward(y, inputs)``, and the context that both are called in."""

    forward: Callable[[Inputs], Tensor]
    backward: Callable[[Tensor, Inputs], object]
    context: Callable[[], AbstractContextManager]

    def both(self, inputs: Inputs) -> object:
        """A forward and a backward pass."""
        return self.backward(self.forward(inputs), inputs)


def implementations_on(norms: Mapping[str, Callable], device: torch.device) -> list[Implementation]:
    """All ``norms``, and the library a second time, which shows the noise; on CUDA also without cuDNN, and compiled."""
    entries = [Implementation(name, factory) for name, factory in norms.items()]
    if library := norms.get("library"):
        entries.append(Implementation("library again", library))
        if device.type == "cuda":
            without_cudnn = partial(torch.backends.cudnn.flags, enabled=False)
            entries.append(Implementation("library (cudnn off)", library, context=without_cudnn))
            entries.append(Implementation("library (compiled)", library, compiled=True))
    return entries


def chosen(entries: Sequence[Implementation], names: Sequence[str]) -> list[Implementation]:
    """The ``entries`` with these names, or all without names; :class:`UserError` for a name that none has."""
    known = [entry.name for entry in entries]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"contestants={unknown[0]}: not measured on this device; choose among {', '.join(known)}")
    return [entry for entry in entries if not names or entry.name in names]


def measure_case(
    implementations: Sequence[Implementation], case: Case, site: str, settings: BenchSettings, device: torch.device
) -> list[dict]:
    """One row per implementation: its parity, and its times if it passed; the elementwise kernels' row comes first."""
    dtype, add = getattr(torch, settings.dtype), SITES[site]
    blank = {"shape": str(case), "count": case.count, "site": site}
    if reason := memory_shortage(bytes_needed(case, dtype), device):
        return [blank | {"implementation": e.name, "status": f"skipped: {reason}", "tier": ""} for e in implementations]
    inputs, state = make_inputs(case, dtype, settings.layout == "nhwc", device)
    if any(entry.compiled for entry in implementations):
        torch.compiler.reset()  # the shapes before would count against the limit of recompilations
    rows, steps = {}, {REFERENCE: copy_steps(add)}
    for entry in implementations:
        result, ready = check_parity(entry, inputs, state, add)
        rows[entry.name] = blank | {"implementation": entry.name} | result
        if ready is not None:
            steps[entry.name] = ready
    if len(steps) == 1:
        return list(rows.values())
    reason = memory_shortage(bytes_needed(case, dtype, num_buffers(inputs)), device) if case.numel else "no values"
    if not reason:
        try:
            ring = [copy_inputs(inputs) for _ in range(num_buffers(inputs))]
            seconds = time_steps(steps, ring, settings.rounds, CudaGraphs(device) if device.type == "cuda" else None)
            rows = {REFERENCE: blank | {"implementation": REFERENCE, "tier": ""}} | rows
            eager = [name for name in rows if name + EAGER_CALLS in seconds]
            rows |= {(key := name + EAGER_CALLS): rows[name] | {"implementation": key} for name in eager}
        except RuntimeError as error:  # out of memory, most likely
            reason = first_line(error)
    if reason:
        for name in rows.keys() & steps.keys():
            rows[name]["status"] = f"parity passed, not timed: {reason}"
    else:
        for name in rows.keys() & seconds.keys():
            other = REFERENCE + EAGER_CALLS * name.endswith(EAGER_CALLS)
            rows[name] |= {"status": "timed"} | summarize_seconds(seconds[name], seconds[other])
    return list(rows.values())


def check_parity(entry: Implementation, inputs: Inputs, state: State, add: bool) -> tuple[dict, Steps | None]:
    """The status, tier and differences from float64 of an implementation, and its steps if it may be timed."""
    try:
        module, call = entry.build(len(state.weight), inputs.x.device)
        is_interpreted = runs_interpreted(module, inputs.x.device)
        if is_interpreted and inputs.x.numel() > MAX_INTERPRETED:
            raise UserError("too large for the interpreter")
        with entry.context():
            off = differences_from_float64(call, module, inputs, state, add=add)
    except Exception as error:  # an implementation that fails is a result, and the others are still measured
        return {"status": f"not run: {first_line(error)}", "tier": ""}, None
    failure = parity_failure(off, inputs.x.dtype)
    result = {"status": failure or "parity passed, not timed: interpreted", "tier": tier_of(module), "parity": off}
    return result, None if failure or is_interpreted else norm_steps(call, module, add, entry.context)


def runs_interpreted(module: nn.Module, device: torch.device) -> bool:
    """Whether Triton's interpreter runs the kernels of ``module``; :class:`UserError` if ``device`` cannot run them."""
    norm = contract_of(module)
    try:
        norm.require_device(device)
    except UserError as error:
        raise UserError("needs a CUDA device" if device.type == "cpu" else str(error)) from error
    return norm.is_interpreted()


def tier_of(module: nn.Module) -> str:
    """The tier that the module's printed form names; empty if it names none."""
    match = re.search(r"tier=([\w-]+)", module.extra_repr())
    return match[1] if match else ""


# ---- the timed steps ----


def norm_steps(call: Callable[..., Tensor], module: nn.Module, add: bool, context: Callable) -> Steps:
    """A norm's forward pass in training, and the gradients of its inputs and parameters."""

    def forward(inputs: Inputs) -> Tensor:
        return call(inputs.x, inputs.residual) if add else call(inputs.x)

    def backward(y: Tensor, inputs: Inputs) -> object:
        leaves = (inputs.x, inputs.residual) if add else (inputs.x,)
        return torch.autograd.grad(y, (*leaves, module.weight, module.bias), inputs.dy)

    return Steps(forward, backward, context)


def copy_steps(add: bool) -> Steps:
    """Elementwise kernels that move as many bytes as a fused norm, into memory that is already allocated.

    Forward reads one tensor and writes one, backward reads two and writes one. With a residual, forward reads two
    and writes one; backward reads two and writes two, in two kernels.
    """

    def forward(inputs: Inputs) -> Tensor:
        out = inputs.spare[0]
        return torch.add(inputs.x, inputs.residual, out=out) if add else torch.neg(inputs.x, out=out)

    def backward(y: Tensor, inputs: Inputs) -> object:
        if add:
            return torch.neg(inputs.x, out=inputs.spare[0]), torch.neg(inputs.dy, out=inputs.spare[1])
        return torch.add(inputs.x, inputs.dy, out=inputs.spare[0])

    return Steps(forward, backward, torch.no_grad)


def time_steps(
    steps: dict[str, Steps], ring: Sequence[Inputs], rounds: int, graphs: CudaGraphs | None = None
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every call, by name and phase, from ``rounds`` turns each in rotating order after a warm-up.

    In a turn, forward is called on all buffers of the ring, then backward on all, then both on each. With ``graphs``
    these calls have the name with ``EAGER_CALLS``, and the name itself has a call's seconds in replays of all calls.
    """
    device, items = ring[0].x.device, [(inputs,) for inputs in ring]
    names = list(steps)
    replays = {name: capture_phases(steps[name], ring, graphs) for name in names} if graphs else {}
    called = {name: name + EAGER_CALLS * bool(graphs) for name in names}
    seconds = {name: {phase: [] for phase in PHASES} for name in [*called.values(), *replays]}
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with steps[name].context():
                forward, outputs = time_calls(steps[name].forward, items, device)
                backward = time_calls(steps[name].backward, zip(outputs, ring, strict=True), device)[0]
                del outputs
                both = time_calls(steps[name].both, items, device)[0]
            replayed = [time_replays(replay, len(ring), device) for replay in replays.get(name, ())]
            if turn >= 0:
                for i, phase in enumerate(PHASES):
                    seconds[called[name]][phase] += (forward, backward, both)[i]
                    if replayed:
                        seconds[name][phase] += replayed[i]
    return seconds


def capture_phases(steps: Steps, ring: Sequence[Inputs], graphs: CudaGraphs) -> list[Callable[[], None]]:
    """A replay of each phase on all buffers of the ring; forward has to be replayed before backward."""
    outputs, kept = [], []  # kept while capturing, so that no two calls write to the same memory
    with steps.context():
        with graphs.warming_up():
            steps.both(ring[0])
        forward = graphs.capture(lambda: outputs.extend(map(steps.forward, ring)), [], "bench")
        backward = graphs.capture(lambda: kept.extend(map(steps.backward, outputs, ring)), [], "bench")
        outputs.clear()
        kept.clear()
        return [forward, backward, graphs.capture(lambda: kept.extend(map(steps.both, ring)), [], "bench")]


def time_calls(function: Callable, arguments: Iterable[tuple], device: torch.device) -> tuple[list[float], list]:
    """Seconds of every ``function(*each)``, and its results, kept so that no two calls write to the same memory.

    On a GPU there is one number, the seconds of all calls divided by their number, until the device is done.
    """
    seconds, results = [], []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        began = perf_counter()
        results = [function(*each) for each in arguments]
        torch.cuda.synchronize(device)
        return [(perf_counter() - began) / max(1, len(results))], results
    for each in arguments:
        began = perf_counter()
        results.append(function(*each))
        seconds.append(perf_counter() - began)
    return seconds, results


def time_replays(replay: Callable[[], None], num_calls: int, device: torch.device) -> list[float]:
    """Seconds of a call, by the device's clock, in each of ``REPLAYS`` replays of ``num_calls`` calls."""
    if device.type != "cuda":
        began = perf_counter()
        replay()
        return [(perf_counter() - began) / num_calls]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for begin, end in events:
        begin.record()
        replay()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 / num_calls for begin, end in events]


def summarize_seconds(seconds: Mapping[str, list[float]], reference: Mapping[str, list[float]]) -> dict[str, float]:
    """Per phase: median, 20th and 80th percentile in microseconds, and the ratio to the reference's median."""
    summary = {"n": len(seconds["both"])}
    for phase, values in seconds.items():
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 2
        median = max(statistics.median(values), 1e-9)  # a coarse clock may give 0
        summary |= {f"{phase}_us": 1e6 * median, f"{phase}_p20_us": 1e6 * low, f"{phase}_p80_us": 1e6 * high}
        summary[f"{phase}_ratio"] = median / max(statistics.median(reference[phase]), 1e-9)
    return summary


# ---- memory ----


def num_buffers(inputs: Inputs) -> int:
    """How many copies of the inputs rotate: a forward pass over all moves four times the cache's bytes."""
    x = inputs.x
    return min(MAX_BUFFERS, -(-4 * cache_bytes(x.device) // max(1, 2 * x.numel() * x.element_size())))


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not tell them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=32 * 2**20)


def bytes_needed(case: Case, dtype: torch.dtype, num_inputs: int = 1) -> int:
    """Bytes that a comparison with float64 takes or, with ``num_inputs`` buffers, the timing.

    Each buffer and the passes on it take eleven tensors of the case's size; the comparison takes a dozen float64
    pieces.
    """
    piece = min(case.numel, max(CHUNK, case.numel // case.shape[1]))
    return num_inputs * 11 * case.numel * dtype.itemsize + 12 * 8 * piece


def memory_shortage(needed: int, device: torch.device) -> str:
    """How much memory is missing, if ``device`` has fewer than ``needed`` bytes free; else empty."""
    free = free_bytes(device)
    return f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free" if needed > free else ""


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate; on Linux this includes the cache of files."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return free_memory(device)
