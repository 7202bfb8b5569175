"""How long does one implementation of batch normalization take on one shape, with nothing waiting in a cache?"""

import ctypes
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnexp.bench.cases import PHASES, REFERENCE, SITES, Case
from bnexp.bench.parity import CHUNK, Inputs, State, copied, make_inputs, parity, verdict
from bnexp.errors import UserError
from bnexp.norms.base import contract_of

MAX_BUFFERS = 512  # tiny inputs would need thousands to fill a cache, and are bound by launches anyway
INTERPRETED = 2**18  # values that Triton's interpreter gets through in seconds


@dataclass(frozen=True)
class Contestant:
    """A way to batch norms: ``factory(num_features, activation=...)``, and how its module is called."""

    name: str
    factory: Callable[..., nn.Module]
    compiled: bool = False
    cudnn: bool = True

    def build(self, num_features: int, device: torch.device) -> tuple[nn.Module, Callable[..., Tensor]]:
        module = self.factory(num_features, activation="relu").to(device)
        return module, torch.compile(module, dynamic=False) if self.compiled else module

    def context(self) -> AbstractContextManager:
        return nullcontext() if self.cudnn else torch.backends.cudnn.flags(enabled=False)


def is_interpreted(module: nn.Module, device: torch.device) -> bool:
    """Whether ``module`` runs Triton kernels, and interpreted; :class:`UserError` where they cannot run at all."""
    norm = contract_of(module)
    try:
        norm.require_device(device)
    except UserError as error:
        raise UserError("needs a CUDA device" if device.type == "cpu" else str(error)) from error
    return norm.is_interpreted()


def tier(module: nn.Module) -> str:
    """The tier that the module's printed form names, if it plans one."""
    found = re.search(r"tier=([\w-]+)", module.extra_repr())
    return found[1] if found else ""


def contestants(implementations: Mapping[str, Callable], device: torch.device) -> list[Contestant]:
    """Every implementation, and the library twice for the noise; on CUDA also without cuDNN and compiled."""
    entries = [Contestant(name, factory) for name, factory in implementations.items()]
    if library := implementations.get("library"):
        entries.append(Contestant("library again", library))
        if device.type == "cuda":
            entries.append(Contestant("library (cudnn off)", library, cudnn=False))
            entries.append(Contestant("library (compiled)", library, compiled=True))
    return entries


def compare(
    entries: Sequence[Contestant], case: Case, site: str, dtype: str, layout: str, rounds: int, device: torch.device
) -> list[dict]:
    """One row per contestant on one shape: parity first, then the times of those who passed."""
    dtype, add = getattr(torch, dtype), SITES[site]
    blank = {"shape": str(case), "count": case.count, "site": site}
    if reason := too_large(bytes_needed(case, dtype), device):
        return [blank | {"implementation": e.name, "status": f"skipped: {reason}", "tier": ""} for e in entries]
    inputs, state = make_inputs(case, dtype, layout == "nhwc", device)
    if any(entry.compiled for entry in entries):
        torch.compiler.reset()  # or the shapes before would count against the limit of recompilations
    rows, steps = {}, {REFERENCE: copy_steps(add)}
    for entry in entries:
        found, ready = examine(entry, inputs, state, add)
        rows[entry.name] = blank | {"implementation": entry.name} | found
        if ready is not None:
            steps[entry.name] = ready
    if len(steps) == 1:
        return list(rows.values())
    reason = too_large(bytes_needed(case, dtype, num_buffers(inputs)), device) if case.numel else "nothing in it"
    if not reason:
        try:
            seconds = measure(steps, [copied(inputs) for _ in range(num_buffers(inputs))], rounds)
            rows = {REFERENCE: blank | {"implementation": REFERENCE, "tier": ""}} | rows
        except RuntimeError as error:  # out of memory, most likely
            reason = first_line(error)
    for name in rows.keys() & steps.keys():
        if reason:
            rows[name]["status"] = f"parity passed, not timed: {reason}"
        else:
            rows[name] |= {"status": "timed"} | times(seconds[name], seconds[REFERENCE])
    return list(rows.values())


def examine(entry: Contestant, inputs: Inputs, state: State, add: bool) -> tuple[dict, "Steps | None"]:
    """What parity says of a contestant, and its steps if it may be timed."""
    try:
        module, call = entry.build(len(state.weight), inputs.x.device)
        interpreted = is_interpreted(module, inputs.x.device)
        if interpreted and inputs.x.numel() > INTERPRETED:
            raise UserError("too large for the interpreter")
        with entry.context():
            off = parity(call, module, inputs, state, add=add)
    except Exception as error:  # whatever an implementation does is a result, and the others go on
        return {"status": f"not run: {first_line(error)}", "tier": ""}, None
    found = {"status": verdict(off, inputs.x.dtype), "tier": tier(module), "parity": off}
    if found["status"]:
        return found, None
    found["status"] = "parity passed, not timed: interpreted"
    return found, None if interpreted else norm_steps(call, module, add, entry.context)


def too_large(needed: int, device: torch.device) -> str:
    """Empty if ``needed`` bytes are free on ``device``, else a reason."""
    free = free_bytes(device)
    return f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free" if needed > free else ""


def first_line(error: Exception) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return kind + (str(error).splitlines() or [""])[0]


def times(seconds: Mapping[str, list[float]], reference: Mapping[str, list[float]]) -> dict[str, float]:
    """Per phase: median, 20th and 80th percentile in microseconds, and the median over that of the reference."""
    found = {"n": len(seconds["both"])}
    for phase, values in seconds.items():
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 2
        median = max(statistics.median(values), 1e-9)  # a clock may tick more slowly than that
        found |= {f"{phase}_us": 1e6 * median, f"{phase}_p20_us": 1e6 * low, f"{phase}_p80_us": 1e6 * high}
        found[f"{phase}_ratio"] = median / max(statistics.median(reference[phase]), 1e-9)
    return found


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: 32 MB where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=32 * 2**20)


def free_bytes(device: torch.device) -> int:
    """Memory that a program may still take, on Linux the files it keeps for later included."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text() if meminfo.exists() else "")
    return int(found[1]) * 2**10 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def num_buffers(inputs: Inputs) -> int:
    """Inputs to rotate, so that forward's reading and writing pass four caches before one of them returns."""
    x = inputs.x
    return min(MAX_BUFFERS, -(-4 * cache_bytes(x.device) // max(1, 2 * x.numel() * x.element_size())))


def bytes_needed(case: Case, dtype: torch.dtype, num_inputs: int = 1) -> int:
    """Memory to compare one implementation with float64 or, with more inputs, to time it.

    Inputs and what one forward and backward pass allocates, eleven tensors, and a dozen pieces in float64.
    """
    piece = min(case.numel, max(CHUNK, case.numel // case.shape[1]))
    return num_inputs * 11 * case.numel * dtype.itemsize + 12 * 8 * piece


def keep_memory() -> None:
    """Have malloc keep freed memory, as the CUDA allocator does.

    Else what is timed is the kernel handing out pages: 32 MB is where malloc's own, growing threshold ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not the GNU C library
        return
    mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def clock(function: Callable, arguments: Iterable[tuple], device: torch.device) -> tuple[list[float], list]:
    """Seconds of ``function(*each)`` and what it returned, kept so that no two calls write to the same memory."""
    seconds, results = [], []
    if device.type != "cuda":
        for each in arguments:
            began = perf_counter()
            results.append(function(*each))
            seconds.append(perf_counter() - began)
        return seconds, results
    events = []
    torch.cuda.synchronize(device)
    for each in arguments:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        results.append(function(*each))
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in events], results


class Steps(NamedTuple):
    """What is timed: ``forward(inputs) -> y``, ``backward(y, inputs)``, and the context that both run in."""

    forward: Callable[[Inputs], Tensor]
    backward: Callable[[Tensor, Inputs], object]
    context: Callable[[], AbstractContextManager]


def norm_steps(call: Callable[..., Tensor], module: nn.Module, add: bool, context: Callable) -> Steps:
    """Forward of a norm in training, and the gradients of its inputs and parameters."""

    def forward(inputs: Inputs) -> Tensor:
        return call(inputs.x, inputs.residual) if add else call(inputs.x)

    def backward(y: Tensor, inputs: Inputs) -> object:
        leaves = (inputs.x, inputs.residual) if add else (inputs.x,)
        return torch.autograd.grad(y, (*leaves, module.weight, module.bias), inputs.dy)

    return Steps(forward, backward, context)


def copy_steps(add: bool) -> Steps:
    """The same traffic, elementwise, into memory that exists: 1R1W forward and 2R1W backward.

    With a residual 2R1W and, in two kernels, 2R2W.
    """

    def forward(inputs: Inputs) -> Tensor:
        out = inputs.spare[0]
        return torch.add(inputs.x, inputs.residual, out=out) if add else torch.neg(inputs.x, out=out)

    def backward(y: Tensor, inputs: Inputs) -> object:
        if add:
            return torch.neg(inputs.x, out=inputs.spare[0]), torch.neg(inputs.dy, out=inputs.spare[1])
        return torch.add(inputs.x, inputs.dy, out=inputs.spare[0])

    return Steps(forward, backward, torch.no_grad)


def measure(contestants: dict[str, Steps], ring: Sequence[Inputs], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every call, by contestant and phase: ``rounds`` turns each, in rotating order, after a warm-up.

    In a turn all buffers go forward, then all go backward, then each does both.
    """
    device = ring[0].x.device
    keep_memory()
    names = list(contestants)
    seconds = {name: {phase: [] for phase in PHASES} for name in names}
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            forward, backward, context = contestants[name]
            items = [(inputs,) for inputs in ring]

            def both(inputs: Inputs, forward: Callable = forward, backward: Callable = backward) -> object:
                return backward(forward(inputs), inputs)

            with context():
                times = {}
                times["forward"], outputs = clock(forward, items, device)
                pairs = [(y, inputs) for y, (inputs,) in zip(outputs, items, strict=True)]
                times["backward"] = clock(backward, pairs, device)[0]
                del outputs, pairs
                times["both"] = clock(both, items, device)[0]
            for phase in PHASES if turn >= 0 else ():
                seconds[name][phase] += times[phase]
    return seconds
