"""``bnexp bench``: nothing is timed that is not batch norm, and what is timed is written down."""

import csv
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tape import Tape

from bnexp.bench import benchmark, timing
from bnexp.bench.benchmark import geometric_means, run_benchmark, write_benchmark
from bnexp.bench.cases import PHASES, REFERENCE, SETS, SITES, Case
from bnexp.bench.parity import Inputs, differences_from_float64, float64_results, make_inputs, parity_failure
from bnexp.bench.results import make_results_folder
from bnexp.bench.settings import BENCH_CHOICES, BenchSettings
from bnexp.bench.timing import Implementation, Steps, measure_case, time_steps
from bnexp.cli.bench import read_settings
from bnexp.errors import UserError
from bnexp.norms import fused, library, scratch

CPU = torch.device("cpu")
ODD = Case((5, 6, 7, 9))


class Broken(scratch.BatchNorm):
    """The textbook with one ``fault``."""

    def __init__(self, *args, fault, **kwargs):
        super().__init__(*args, **kwargs)
        self.fault = fault

    def forward(self, x, residual=None):
        fault, dims, view = self.fault, [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        z = x.float()
        mean, var = z.mean(dims), z.var(dims, correction=0)
        if fault == "mean off by a bit":
            mean = mean + 1e-4 * var.sqrt()
        if fault == "a value left out":
            mean = z[1:].mean(dims)
        if fault == "E[x^2] - E[x]^2":
            var = z.square().mean(dims) - mean.square()
        if fault == "mean not differentiated":
            mean = mean.detach()
        if self.training:
            count = x.numel() // x.shape[1]
            self.track(mean.detach(), var.detach(), count)
            if fault == "counted twice":
                self.num_batches_tracked += 1
            if fault == "momentum swapped":
                self.running_mean.lerp_(mean.detach(), 0.8)
        else:
            mean, var = self.running_mean, self.running_var
            if fault == "evaluates with the batch":
                mean, var = z.mean(dims), z.var(dims, correction=0)
        root = var.sqrt() + self.eps if fault == "eps outside the root" else (var + self.eps).sqrt()
        y = (z - mean.view(view)) / root.view(view) * self.weight.view(view) + self.bias.view(view)
        if fault == "shift not learned":
            y = y - self.bias.view(view) + self.bias.detach().view(view)
        y = y.to(torch.float64 if fault == "wrong type" else x.dtype)
        if residual is not None and fault != "residual forgotten":
            y = y + (residual * 0.5 + residual.detach() * 0.5 if fault == "residual's gradient" else residual)
        return y.clamp(max=0) if fault == "mask inverted" else y.relu()


FAULTS = {  # and what parity names, the first thing that is wrong
    "mean off by a bit": "running_mean",
    "a value left out": "running_mean",
    "E[x^2] - E[x]^2": "running_var",
    "mean not differentiated": "gradient of x",
    "counted twice": "num_batches_tracked",
    "momentum swapped": "running_mean",
    "evaluates with the batch": "output in evaluation",
    "eps outside the root": "output",
    "shift not learned": "gradient of bias",
    "wrong type": "output",
    "residual forgotten": "output",
    "residual's gradient": "gradient of residual",
    "mask inverted": "output",
}


def judged(factory, case, dtype=torch.float32, layout="nchw", add=True):
    """(failure, differences) of ``factory``'s module on one shape."""
    inputs, state = make_inputs(case, dtype, layout == "nhwc", CPU)
    module = factory(case.shape[1], activation="relu")
    off = differences_from_float64(module, module, inputs, state, add=add)
    return parity_failure(off, dtype), off


@pytest.fixture
def small(monkeypatch):
    """A cache of 16 kB, so that few buffers rotate, and two small shapes in the quick set."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**14)
    monkeypatch.setitem(SETS, "quick", (Case((4, 6, 5, 5), count=3), Case((16, 8))))
    monkeypatch.setenv("COLUMNS", "80")


def rows_of(folder):
    return json.loads((folder / "bench.json").read_text())["rows"]


# ---- parity ----


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", [(9, 4), (5, 3, 4, 7)])
def test_the_expected_results_agree_with_torch_in_float64(shape, add):
    # Roundings of float64, 1e-16, on channels 100 deviations from zero whose scale, 1 / 0.003, gradients have.
    inputs, state = make_inputs(Case(shape), torch.float32, False, CPU)
    x, residual, dy = (t.detach().double().requires_grad_() for t in inputs[:3])
    weight, bias, mean, var = (t.double().requires_grad_(i < 2) for i, t in enumerate(state))
    y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.1, eps=1e-5)
    y = (y + residual if add else y).relu()
    leaves = {"x": x, "weight": weight, "bias": bias} | ({"residual": residual} if add else {})
    want = {f"gradient of {n}": g for n, g in zip(leaves, torch.autograd.grad(y, leaves.values(), dy), strict=True)}
    evaluated = F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)
    evaluated = (evaluated + residual if add else evaluated).relu()
    want |= {"output": y, "output in evaluation": evaluated, "running_mean": mean, "running_var": var}
    got = float64_results(x.detach(), residual.detach() if add else None, dy.detach(), y > 0, state, 0.1, 1e-5)
    assert set(want) | {"gradient of residual"} == set(got)
    for name, value in want.items():
        assert torch.allclose(got[name][0], value.detach(), rtol=1e-10, atol=1e-11), name


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in SETS["adversarial"] if case.numel < 2**17], ids=str)
def test_the_textbook_passes_on_every_adversarial_shape(case, dtype, layout):
    for add in SITES.values():
        text, off = judged(scratch.BatchNorm, case, dtype, layout, add)
        assert text == "", off


def test_a_comparison_in_pieces_is_the_comparison(monkeypatch):
    whole = judged(scratch.BatchNorm, ODD)
    monkeypatch.setattr("bnexp.bench.parity.CHUNK", 700)  # two of six channels at a time
    assert judged(scratch.BatchNorm, ODD) == whole


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_names_what_is_broken(fault):
    text, _ = judged(partial(Broken, fault=fault), ODD)
    assert text.startswith(f"parity failed: {FAULTS[fault]} off by ")


@pytest.mark.parametrize("add", [False, True])
def test_without_a_fault_the_broken_one_passes(add):
    assert judged(partial(Broken, fault=None), ODD, add=add)[0] == ""


def test_a_biased_running_variance_fails_and_the_other_results_do_not():
    text, off = judged(partial(scratch.BatchNorm, running_var="biased"), ODD)
    assert text.startswith("parity failed: running_var off by")
    # The last channels' variance is 1/315 too small, of which momentum and the old variance leave half.
    assert off.pop("running_var") == pytest.approx(1 / 315 / 2, rel=0.2)
    assert all(value < 2e-5 for name, value in off.items() if name != "output in evaluation")


@pytest.mark.parametrize("fault", ["E[x^2] - E[x]^2", "eps outside the root", "mean off by a bit"])
def test_half_precision_hides_no_fault_of_the_statistics(fault):
    assert judged(partial(Broken, fault=fault), Case((64, 12, 5, 5)), torch.bfloat16)[0]


def test_a_result_that_is_not_a_number_fails():
    class NotANumber(scratch.BatchNorm):
        def forward(self, x, residual=None):
            return super().forward(x, residual) * float("nan")

    assert "off by inf" in judged(NotANumber, ODD)[0]


# ---- what is not timed ----


def test_what_fails_parity_gets_no_time_and_says_why(small, tmp_path, capsys):
    entries = {"biased": partial(scratch.BatchNorm, running_var="biased"), "scratch": scratch.BatchNorm}
    entries["float64"] = partial(Broken, fault="wrong type")
    folder = run_benchmark(entries, BenchSettings(out=str(tmp_path / "out"), rounds=1), CPU)
    (wrong,) = {row["status"] for row in rows_of(folder) if row["implementation"] == "float64"}
    assert wrong == "parity failed: output off by inf (allowed 2e-05)"
    rows = [row for row in rows_of(folder) if row["implementation"] == "biased"]
    assert len(rows) == 4
    for row in rows:
        assert row["status"].startswith("parity failed: running_var off by")
        assert not [key for key in row if key.endswith(("_us", "_ratio")) or key == "n"]
    assert all("both_us" in row for row in rows_of(folder) if row["implementation"] == "scratch")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("biased")]
    assert len(printed) == 4 and all("parity failed: running_var off by" in line for line in printed)


def test_fused_needs_a_device_and_is_never_timed_by_the_interpreter(small, monkeypatch):
    pytest.importorskip("triton")
    compare = partial(measure_case, [Implementation("fused", fused.BatchNorm)], site="BN+ReLU")
    compare = partial(compare, settings=BenchSettings(rounds=1), device=CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert compare(case=ODD)[0]["status"] == "not run: needs a CUDA device"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compare(case=Case((512, 513)))[0]["status"] == "not run: too large for the interpreter"
    monkeypatch.setattr(timing, "differences_from_float64", lambda *args, **kwargs: {"output": 0.0})
    found = compare(case=ODD)
    assert [row["status"] for row in found] == ["parity passed, not timed: interpreted"]


@pytest.mark.skipif("os.environ.get('TRITON_INTERPRET') != '1'", reason="not interpreted")
def test_fused_passes_parity_and_names_its_tier(small):
    entries = [Implementation("fused", fused.BatchNorm)]
    (row,) = measure_case(entries, ODD, "BN+add+ReLU", BenchSettings(rounds=1), CPU)
    assert row["status"] == "parity passed, not timed: interpreted" and row["tier"] in ("local", "two-launch")


def test_shapes_that_do_not_fit_are_skipped_or_only_compared(small, monkeypatch):
    compare = partial(measure_case, [Implementation("scratch", scratch.BatchNorm)], site="BN+ReLU")
    compare = partial(compare, case=ODD, settings=BenchSettings(rounds=1), device=CPU)
    one = timing.bytes_needed(ODD, torch.float32)
    monkeypatch.setattr(timing, "free_bytes", lambda device: one - 1)
    assert compare()[0]["status"] == "skipped: needs 0.0 GiB of memory, 0.0 are free"
    monkeypatch.setattr(timing, "free_bytes", lambda device: one)
    assert [row["status"][:31] for row in compare()] == ["parity passed, not timed: needs"]
    big = SETS["adversarial"][-1]
    assert big.numel > 2**31 and timing.bytes_needed(big, torch.float32) > 2**36


def test_an_implementation_that_raises_stops_nobody_else(small, tmp_path):
    class Raises(scratch.BatchNorm):
        def forward(self, x, residual=None):
            raise RuntimeError("no kernel\nfor this")

    entries = {"raises": Raises, "scratch": scratch.BatchNorm}
    folder = run_benchmark(entries, BenchSettings(out=str(tmp_path / "out"), rounds=1), CPU)
    status = {row["implementation"]: row["status"] for row in rows_of(folder)}
    assert status == {REFERENCE: "timed", "raises": "not run: RuntimeError: no kernel", "scratch": "timed"}


# ---- timing ----


def test_everybody_gets_as_many_turns_on_every_buffer_in_rotating_order():
    inputs, _ = make_inputs(Case((2, 3)), torch.float32, False, CPU)
    ring, calls = [inputs._replace(spare=(i,)) for i in range(3)], []

    def steps(name):
        return Steps(
            lambda inputs: calls.append((name, "forward", *inputs.spare)),
            lambda y, inputs: calls.append((name, "backward", *inputs.spare)),
            torch.no_grad,
        )

    seconds = time_steps({"a": steps("a"), "b": steps("b")}, ring, rounds=2)
    assert {(n, p): len(s) for n, phases in seconds.items() for p, s in phases.items()} == {
        (name, phase): 6 for name in "ab" for phase in ("forward", "backward", "both")
    }  # two turns on three buffers, the warm-up not counted
    turns = calls[::12]
    assert [name for name, *_ in turns] == ["b", "a", "a", "b", "b", "a"]
    first = [("b", "forward", i) for i in range(3)] + [("b", "backward", i) for i in range(3)]
    assert calls[:6] == first and calls[6:8] == [("b", "forward", 0), ("b", "backward", 0)]


def test_a_replay_of_all_calls_is_timed_without_the_host_that_launches_them():
    """A forward pass whose host takes 5 ms a call, and whose replay does not."""
    inputs, state = make_inputs(Case((4, 3)), torch.float32, False, CPU)
    module = library.BatchNorm(3, activation="relu")
    plain = timing.norm_steps(module, module, False, nullcontext)
    slow = plain._replace(forward=lambda inputs: time.sleep(0.005) or plain.forward(inputs))
    ring = [inputs, inputs._replace(x=inputs.x.detach().clone().requires_grad_())]
    seconds = time_steps({"slow": slow}, ring, 2, Tape())
    assert list(seconds) == ["slow, eager calls", "slow"]
    assert {key: len(values) for key, values in seconds["slow"].items()} == dict.fromkeys(PHASES, 2), "one a turn"
    for phase in ("forward", "both"):
        assert min(seconds["slow, eager calls"][phase]) > 0.005 > min(seconds["slow"][phase])
    seen = []
    seconds = time_steps(
        {"a": plain._replace(forward=lambda inputs: seen.append(inputs) or plain.forward(inputs))}, ring, 1
    )
    assert list(seconds) == ["a"] and len(seen) == 2 * 2 * 2, "without graphs none is captured"


def test_on_a_gpu_calls_one_by_one_have_a_row_of_their_own_beside_the_reference_of_theirs(monkeypatch):
    def timed(steps, ring, rounds, graphs):
        assert graphs is None  # on a CPU
        values = {"": 1e-6, timing.EAGER_CALLS: 1e-5}
        factors = dict(zip(steps, (1, 3), strict=True))
        return {
            name + more: {phase: [factors[name] * value * (2 if more else 1)] for phase in PHASES}
            for name in steps for more, value in values.items()
        }  # fmt: skip

    monkeypatch.setattr(timing, "time_steps", timed)
    rows = measure_case([Implementation("library", library.BatchNorm)], ODD, "BN+ReLU", BenchSettings(rounds=1), CPU)
    found = {row["implementation"]: (round(row["forward_us"]), round(row["forward_ratio"])) for row in rows}
    assert found == {
        REFERENCE: (1, 1), "library": (3, 3), f"{REFERENCE}, eager calls": (20, 1), "library, eager calls": (60, 3)
    }  # fmt: skip
    assert {row["status"] for row in rows} == {"timed"}


def test_only_the_contestants_that_are_named_are_measured(small, tmp_path):
    norms = {"scratch": scratch.BatchNorm, "library": library.BatchNorm}
    named = read_settings(["contestants=library,library again"]).contestants
    folder = run_benchmark(norms, BenchSettings(out=str(tmp_path / "out"), rounds=1, contestants=named), CPU)
    assert {row["implementation"] for row in rows_of(folder)} == {REFERENCE, "library", "library again"}
    with pytest.raises(
        UserError, match="contestants=fused: not measured on this device; choose among scratch, library"
    ):
        run_benchmark(norms, BenchSettings(out=str(tmp_path / "no"), contestants=["library", "fused"]), CPU)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("case, layout", [(ODD, "nchw"), (ODD, "nhwc"), (Case((4, 6, 5, 8), gaps=True), "nchw")])
def test_the_steps_that_are_timed_are_a_norm_and_kernels_of_the_same_traffic(case, layout, add):
    inputs, state = make_inputs(case, torch.float32, layout == "nhwc", CPU)
    inputs = timing.copy_inputs(inputs)
    assert inputs.x.stride() == make_inputs(case, torch.float32, layout == "nhwc", CPU)[0].x.stride()
    assert inputs.x.is_contiguous(memory_format=torch.channels_last) == (layout == "nhwc")
    assert inputs.x.is_contiguous() == (layout == "nchw" and not case.gaps)
    module = library.BatchNorm(6, activation="relu")
    forward, backward, _ = timing.norm_steps(module, module, add, None)
    gradients = backward(forward(inputs), inputs)
    assert [g.shape for g in gradients] == [inputs.x.shape] * (1 + add) + [(6,), (6,)]
    forward, backward, context = timing.copy_steps(add)
    with context():
        written = {t.data_ptr() for t in (forward(inputs),)}
        results = backward(None, inputs)
    written |= {t.data_ptr() for t in (results if add else (results,))}
    # forward and backward write to the spare places and nowhere else; with a residual backward writes both
    assert written == {t.data_ptr() for t in inputs.spare[: 1 + add]}


def test_buffers_rotate_through_four_caches(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)
    x = torch.empty(64, 2**10)  # 256 kB read and as much written
    assert timing.num_buffers(Inputs(x, x, x)) == 8
    assert timing.num_buffers(Inputs(x[:1, :1], x, x)) == timing.MAX_BUFFERS
    assert timing.cache_bytes(CPU) > 0


def test_times_are_medians_with_percentiles_and_a_ratio():
    seconds = {phase: [5e-6, 1e-6, 3e-6, 2e-6, 4e-6, 6e-6] for phase in ("forward", "backward", "both")}
    reference = {phase: [1e-6, 2e-6, 9e-6] for phase in seconds}
    found = timing.summarize_seconds(seconds, reference)
    assert found["n"] == 6
    # of 1..6: the median 3.5, a fifth and four fifths of the way from 1 to 6
    assert found["forward_us"] == pytest.approx(3.5) and found["both_ratio"] == pytest.approx(1.75)
    assert (found["backward_p20_us"], found["backward_p80_us"]) == pytest.approx((2.0, 5.0))


def test_the_summary_weighs_shapes_by_how_many_norms_see_them():
    def row(shape, count, name, us, status="timed"):
        times = {f"{phase}_us": us for phase in ("forward", "backward", "both")} if status == "timed" else {}
        return {"site": "BN+ReLU", "shape": shape, "count": count, "implementation": name, "status": status} | times

    rows = [row(shape, count, REFERENCE, 1.0) for shape, count in (("1x2", 1), ("3x4", 3))]
    rows += [row("1x2", 1, "library", 16.0), row("3x4", 3, "library", 2.0)]
    rows += [row("1x2", 1, "ours", 4.0), row("3x4", 3, "ours", None, "parity failed: output off by 1")]
    theirs, ours = geometric_means(rows)
    assert theirs["implementation"] == "library" and (theirs["norms"], theirs["of"]) == (4, 4)
    assert theirs[f"both_over_{REFERENCE}"] == pytest.approx((16 * 2**3) ** (1 / 4))
    assert theirs[f"both_over_{REFERENCE}_range"] == [2.0, 16.0]
    assert (ours["norms"], ours["of"], ours["forward_over_library"]) == (1, 4, pytest.approx(0.25))


@pytest.mark.parametrize(
    "microseconds, cell",
    [
        ((1.234, 1.1, 65432.1), "1.23 1.1-65k 100x"),  # one call waited for another program
        ((98765.4, 12345.6, 99999.0), "98.8k 12k-100k 100x"),
        ((9999.4, 9876.5, 9999.4), "9999 9876-9999 100x"),
    ],
)
def test_times_of_any_size_fit_into_a_line(microseconds, cell, monkeypatch, capsys):
    def row(name, times):
        keys = [f"{phase}_{key}" for phase in PHASES for key in ("us", "p20_us", "p80_us")]
        ratios = {f"{phase}_ratio": 100.0 for phase in PHASES}
        same = {"status": "timed", "implementation": name, "tier": "", "n": 3}
        return same | ratios | dict(zip(keys, [*times] * 3, strict=True))

    monkeypatch.setenv("COLUMNS", "80")
    Console().print(benchmark.case_table([row(REFERENCE, (2.0, 1.0, 3.0)), row("x", microseconds)], "title"))
    assert capsys.readouterr().out.splitlines()[-1] == " ".join(["x".ljust(12), *[cell.rjust(21)] * 3])
    slow = benchmark.case_table([row("x", (2e3, 1.9e3, 1.2e6))], "title")
    assert slow.title == "title: ms, 20%-80%, x elementwise, n=3" and "2 1.9-1200 100x" in next(slow.columns[1].cells)


# ---- the command ----


@pytest.mark.parametrize("first_word", [(), pytest.param(("norms",), marks=pytest.mark.long)])
def test_the_quick_set_runs_end_to_end_and_is_written_down(bnexp, first_word, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**16)
    monkeypatch.setattr(timing, "MAX_INTERPRETED", 2**10)  # the shapes here take the interpreter seconds
    monkeypatch.setenv("COLUMNS", "80")
    assert bnexp("bench", *first_word, "rounds=1", "device=cpu", "out=mine") == 0
    folder = tmp_path / "mine"

    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "mine"
    assert max(map(len, out.splitlines())) <= 80
    assert "library again" in out and "Geometric means" in out
    lines = [line.split() for line in out.splitlines() if line.startswith(REFERENCE)]
    assert len(lines) == 2 * len(SETS["quick"])
    assert {len(line) for line in lines} == {10}, "a name and three times a median, its spread and a ratio, unfolded"

    content = json.loads((folder / "bench.json").read_text())
    assert content["complete"] and content["versions"]["torch"].startswith(torch.__version__[:4])
    assert content["device"].endswith("1 thread") and content["set"] == "quick"
    assert content["command"] == " ".join(["bnexp bench", *first_word, "rounds=1 device=cpu out=mine"])
    assert {row["shape"] for row in content["rows"]} == {str(case) for case in SETS["quick"]}
    assert {row["site"] for row in content["rows"]} == set(SITES)
    timed = [row for row in content["rows"] if row["status"] == "timed"]
    assert {row["implementation"] for row in timed} == {REFERENCE, "library", "library again", "scratch"}
    for row in timed:
        for phase in ("forward", "backward", "both"):
            assert 0 < row[f"{phase}_p20_us"] <= row[f"{phase}_us"] <= row[f"{phase}_p80_us"]
            assert row[f"{phase}_ratio"] > 0 and row["n"] >= 1
    assert {entry["implementation"] for entry in content["summary"]} == {"library", "library again", "scratch"}

    with open(folder / "bench.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["implementation"] for line in lines] == [row["implementation"] for row in content["rows"]]
    same = {"device": content["device"], "command": content["command"], "dtype": "float32", "layout": "nchw"}
    assert all(line | same == line and "torch 2" in line["versions"] for line in lines)
    assert float(lines[0]["forward_us"]) == content["rows"][0]["forward_us"]


def test_only_implementations_of_batch_norm_compete(bnexp, monkeypatch):
    """The other norms of conf/ compute something else, whatever they inherit, so parity could only fail them."""
    entered = {}
    monkeypatch.setattr(benchmark, "run_benchmark", lambda norms, *rest: entered.update(norms))
    assert bnexp("bench", "device=cpu") == 0
    assert set(entered) == {"scratch", "library", "fused"}


def test_an_interruption_keeps_what_was_measured(small, tmp_path, capsys):
    class Interrupted(scratch.BatchNorm):
        def forward(self, x, residual=None):
            if x.dim() == 2:
                raise KeyboardInterrupt
            return super().forward(x, residual)

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_benchmark({"interrupted": Interrupted}, BenchSettings(out=str(folder), rounds=1), CPU)
    content = json.loads((folder / "bench.json").read_text())
    assert not content["complete"] and {row["shape"] for row in content["rows"]} == {"4x6x5x5"}
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)


def test_results_are_never_overwritten(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = {"%Y-%m-%d": "2020-01-01", "bench-%H%M%S": "bench-120000"}
    monkeypatch.setattr("time.strftime", now.get)
    assert [str(make_results_folder(None)) for _ in range(2)] == [
        "outputs/2020-01-01/bench-120000", "outputs/2020-01-01/bench-120000-2",
    ]  # fmt: skip
    folder = run_benchmark({"scratch": scratch.BatchNorm}, BenchSettings(out="mine", rounds=1), CPU)
    before = (folder / "bench.json").read_text()
    with pytest.raises(UserError, match="already holds"):
        run_benchmark({"scratch": scratch.BatchNorm}, BenchSettings(out="mine", rounds=1), CPU)
    with pytest.raises(UserError, match="another benchmark has just taken"):
        write_benchmark(folder, json.loads(before), [])
    assert (folder / "bench.json").read_text() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sums"], "sums: no setting of bench"),
        (
            ["norms", "quick"],
            "quick: no setting of bench; settings are set, dtype, layout, device, rounds, contestants, out",
        ),
        (["set=quick", "norms"], "norms: no setting of bench"),
        (["dtyp=float32"], "dtyp=float32: no setting of bench (did you mean dtype?)"),
        (["command=x"], "command=x: no setting of bench"),
        (["set=resnet52"], "set=resnet52: resnet52 is not known (did you mean resnet50?); choose quick, lenet, mlp"),
        (["set=quick,lenet"], "set=quick,lenet: quick,lenet is not known (did you mean quick?); choose"),
        (["dtype=float64"], "dtype=float64: float64 is not known (did you mean float16?); choose float32, b"),
        (["layout=chwn"], "choose nchw, nhwc"),
        (["set="], "set=: has no value; give one as set=VALUE"),
        (["out"], "out: has no value; give one as out=VALUE"),
        (["rounds=0"], "rounds=0: has to be a whole number, 1 or more"),
        (["rounds=1.5"], "rounds=1.5: has to be a whole number, 1 or more"),
        (["rounds=null"], "rounds=null: has to be a whole number, 1 or more"),
        (["rounds=" + "9" * 5000], "has to be a whole number, 1 or more"),
        (["out=${oc.env:HOME}"], "out=${oc.env:HOME}: ${...} is not looked up in settings of bench; write the value"),
        (["set=quick", "set=lenet"], "set=lenet: set is given twice"),
        (["out=mine"], "out=mine: already holds a benchmark, which is never overwritten; choose another folder"),
        (["loop", "set=quick"], "run python tests/bench/loop.py [setting=value] ... there"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_in_one_sentence(bnexp, tmp_path, capsys, arguments, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/bench.csv").touch()
    assert bnexp("bench", *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_settings_have_defaults_and_are_kept_as_typed(monkeypatch):
    assert read_settings([]) == BenchSettings()
    given = read_settings(["set=lenet", "layout=nhwc", "dtype=bfloat16", "rounds=7", "device=cpu", "out=1e3"])
    assert given == BenchSettings("lenet", "bfloat16", "nhwc", "cpu", 7, out="1e3")
    assert read_settings(["out=a=b"]).out == "a=b"
    monkeypatch.setenv("HOME", "/home/me")
    assert read_settings(["out=~/x"]).out == "/home/me/x"


def test_help_lists_every_choice(bnexp, capsys):
    assert bnexp("bench", "--help") == 0
    shown = capsys.readouterr().out
    assert all(choice in shown for choices in BENCH_CHOICES.values() for choice in choices)


def test_arguments_are_answered_before_torch_is_imported():
    code = "import sys; from bnexp.cli.main import main; print(main(['bench', 'set=quik']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


def test_the_sets_are_the_ones_promised():
    assert {"quick", "lenet", "resnet18", "resnet50", "densenet", "adversarial"} <= set(SETS)
    assert sum(case.count for case in SETS["resnet50"]) == 50  # 49 batch norms and a shortcut's, as counted
    shapes = [case.shape for case in SETS["adversarial"]]
    assert any(len(shape) == 5 for shape in shapes) and any(0 in shape for shape in shapes)
    assert {1, 3, 6, 2049} <= {shape[1] for shape in shapes} and any(case.gaps for case in SETS["adversarial"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_library_also_runs_without_cudnn_and_compiled(small, tmp_path):
    entries = {"library": library.BatchNorm, "fused": fused.BatchNorm}
    folder = run_benchmark(entries, BenchSettings(out=str(tmp_path / "out"), rounds=1), torch.device("cuda"))
    timed = {row["implementation"] for row in rows_of(folder) if row["status"] == "timed"}
    assert timed >= {REFERENCE, "library", "fused", "library again", "library (cudnn off)", "library (compiled)"}
