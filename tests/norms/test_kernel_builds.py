"""Every kernel compiles for real GPUs, without one: no register spills, and 16 bytes at a time where aligned.

What is compiled is what the host code launches: run as a script, this file calls it with tensors that
hold nothing and compiles each launch instead of starting it. A process of its own, because triton
decides at import whether it interprets.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TENSORS_READ = ("p_x", "p_dy", "p_residual", "p_saved")
TENSORS_WRITTEN = ("p_y", "p_dx", "p_dresidual")


FEW = [("90", "few"), *(pytest.param((arch, "few"), marks=pytest.mark.long) for arch in ("80", "100"))]
ALL = [pytest.param((arch, "all"), marks=pytest.mark.long) for arch in ("80", "90", "100")]


@pytest.fixture(scope="module", params=[*FEW, *ALL], ids=lambda each: f"sm_{each[0]}-{each[1]}")
def builds(request, tmp_path_factory):
    """Rows of :func:`compile_launch` for one architecture, for few or all types and activations."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, "-W", "error", __file__, *request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_is_built(builds):
    kernels = ("statistics", "apply", "reduce", "dx")
    assert {build["kernel"] for build in builds} == {f"{name}_kernel" for name in kernels}


def test_no_kernel_spills_registers(builds):
    # ptxas may park one 64-bit value on the stack to stay at 64 registers, with which four programs of 256 threads
    # fit on a multiprocessor. It does so for 2 or 3 of these kernels, others with every release of triton; given
    # leave to use more it takes 70 to 92 registers, of 255, and no stack. Beside 32 elements a thread that is nothing.
    spilling = [each for each in builds if each["local"] or each["stack"] > (8 if each["registers"] == 64 else 0)]
    assert not spilling


def test_momentum_reaches_the_kernels_in_double_precision(builds):
    """In float32 the running statistics of float64 input would be off by 1e-8; the interpreter would not show it."""
    kinds = {each["kernel"]: each["momentum"] for each in builds if each["momentum"]}
    assert kinds == {"apply_kernel": "fp64"}


def test_aligned_shapes_move_16_bytes_at_a_time(builds):
    aligned = [build for build in builds if build["aligned"]]
    assert aligned
    for build in aligned:
        assert build["loads"] == build["expected_loads"] > 0, build
        assert build["stores"] == build["expected_stores"], build


def launches(arch, which):
    """(case, aligned, function, arguments, keywords) of what the host code launches, each once."""
    import torch
    from triton.runtime.jit import JITFunction

    from bnexp.norms.base import ACTIVATIONS
    from bnexp.norms.kernels import launch, tiling
    from bnexp.norms.kernels.batch_norm import _saved

    tiling.num_sms = lambda device: 132
    case, found = None, []
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: found.append((*case, self, args, kwargs))

    def site(shape, last, dtype, activation, residual, aligned=True, training=True, momentum=0.1, halves=False):
        nonlocal case
        case = (f"{shape} last={last} {dtype} {activation} residual={residual} training={training}", aligned)
        x = torch.empty(shape, dtype=dtype, device="meta")
        if last and x.dim() > 2:
            x = x.contiguous(memory_format=torch.channels_last)
        kind = tiling.statistics_dtype(x)
        weight, bias, mean, var = (torch.empty(shape[1], dtype=kind, device="meta") for _ in range(4))
        counter, r = torch.empty((), dtype=torch.int64, device="meta"), x if residual else None
        y, used_mean, rstd, bits = launch.launch_forward(
            x, r, weight, bias, mean, var, counter, training, momentum, 1e-5, activation, True
        )
        saved = _saved(y, bits, r, activation)
        arguments = (y, x, weight, bias, used_mean, rstd, saved, activation)
        launch.launch_backward(*arguments, training)
        if halves:
            launch.launch_apply(x, r, weight, bias, used_mean, rstd, activation)
            launch.launch_backward(*arguments, training, torch.empty((2, 3, shape[1]), device="meta"), mean)

    local, large = (256, 64, 8, 8), (128, 256, 56, 56)
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    some = [(bf16, "identity", False), (bf16, "relu", True), (f32, "relu", False), (f32, "tanh", True)]
    more = [(bf16, a, r) for a in ACTIVATIONS for r in (False, True)]
    more += [(f32, "relu", True), (f16, "relu", True), (f64, "relu", True), (f64, "tanh", True)]
    chosen = [(bf16, "relu", True), (f32, "relu", False)]
    for last in (False, True):
        for shape in ((1024, 256) if last else local, large):
            for dtype, activation, residual in dict.fromkeys(some + more if which == "all" else chosen):
                site(shape, last, dtype, activation, residual)
        site(local, last, f64, "tanh", True)
        site((31, 257, 7, 7), last, bf16, "relu", True, aligned=False)
        site((31, 257, 57, 57), last, f32, "relu", True, aligned=False, momentum=None)
        site((31, 256, 7, 7), last, bf16, "relu", True, aligned=False, momentum=None)
        # Constant statistics need no x for dx, and the compiler finds that out.
        site(large, last, bf16, "relu", True, aligned=False, training=False, halves=True)
    seen = {}
    for each in found:
        _, _, function, args, kwargs = each
        kinds = tuple((str(a.dtype), a.dim() > 1) if isinstance(a, torch.Tensor) else type(a) for a in args)
        seen.setdefault((function.__name__, kinds, str(kwargs)), each)
    return seen.values()


def compile_launch(arch, case, aligned, function, args, kwargs):
    """One row of ``builds``."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {
        torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
        torch.uint8: "*u8", torch.int64: "*i64",
    }  # fmt: skip
    kwargs = dict(kwargs)
    options = {name: kwargs.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    arguments = dict(zip(function.arg_names, args, strict=False))
    constants = {**kwargs, **{name: None for name, value in arguments.items() if value is None}}
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        value = arguments.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = kinds[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # as every allocation of torch is
        else:
            kind = function.params[i].annotation_type  # how the launcher types an argument, if it is stated
            signature[name] = kind or ("fp32" if isinstance(value, float) else "i32")
    target = GPUTarget("cuda", arch, 32)
    built = triton.compile(ASTSource(function, signature, constants, attributes), target=target, options=options)

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    wide = collections.Counter(re.findall(r"(ld|st)\.global\S*?\.(?:v4\.b32|v2\.b64)", built.asm["ptx"]))

    def accesses(names):
        """16-byte accesses a thread needs for its share of a tile of each of these tensors."""
        tensors = [a for n, a in arguments.items() if n in names and isinstance(a, torch.Tensor) and a.dim() > 1]
        share = constants["ROWS"] * constants["COLS"] // (32 * options["num_warps"])
        return sum(share * t.element_size() // 16 for t in tensors)

    return {
        "kernel": function.__name__, "case": case, "aligned": aligned, "stack": stack, "local": local,
        "registers": registers, "momentum": signature.get("momentum"),
        "loads": wide["ld"], "expected_loads": accesses(TENSORS_READ),
        "stores": wide["st"], "expected_stores": accesses(TENSORS_WRITTEN),
    }  # fmt: skip


if __name__ == "__main__":
    architecture = int(sys.argv[1])
    print(json.dumps([compile_launch(architecture, *each) for each in launches(architecture, sys.argv[2])]))
