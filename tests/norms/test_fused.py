"""norm=fused is the same operation as library and scratch, in every mode a module is used in."""

import copy
import logging
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bnexp.errors import UserError
from bnexp.norms import library, scratch
from bnexp.norms.fused import BatchNorm
from bnexp.norms.kernels import batch_norm as bn
from bnexp.norms.kernels.batch_norm import require_kernels

needs_kernels = pytest.mark.skipif(
    not bn.interpreted(), reason="CPU tensors need TRITON_INTERPRET=1; test_fused_gpu.py runs on the GPU"
)
# Two float32 sums over some tens of values in different orders, each value a few roundings deep.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def images(n=4, c=6, h=3, w=5, seed=0, **kind):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed)).to(**kind)


def twins(**options):
    """A fused norm and a library norm of the same weights, none of them 0 or 1."""
    fused, other = BatchNorm(6, **options), library.BatchNorm(6, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    other.load_state_dict(fused.state_dict())
    return fused, other


@needs_kernels
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_training_then_evaluation_is_library_to_rounding(momentum, affine, track):
    fused, other = twins(momentum=momentum, affine=affine, track_running_stats=track, activation="relu")
    for step in range(3):
        x, r = images(seed=step), images(seed=10 + step)
        for mode in (True, False):
            grads = []
            for norm in (fused, other):
                norm.train(mode)
                leaves = [x.clone().requires_grad_(), r.clone().requires_grad_()]
                y = norm(*leaves)
                norm.zero_grad()
                (y * images(seed=20)).sum().backward()
                grads.append([y.detach(), *(t.grad for t in (*leaves, *norm.parameters()))])
            for mine, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(mine, theirs, **CLOSE)
    for (name, mine), theirs in zip(fused.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name, **CLOSE)


@needs_kernels
@pytest.mark.parametrize("other", [scratch.BatchNorm, library.BatchNorm, torch.nn.BatchNorm2d])
def test_checkpoints_load_into_each_other(other):
    fused = BatchNorm(6)
    fused(images())
    theirs = other(6)
    theirs.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused.eval()(images(seed=2)), theirs.eval()(images(seed=2)), **CLOSE)
    fused.load_state_dict(theirs.state_dict())


@needs_kernels
def test_one_value_per_channel_is_refused_in_training_and_taken_in_evaluation():
    norm, x = BatchNorm(6), torch.ones(1, 6, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(x)
    assert norm.num_batches_tracked == 0
    assert norm.eval()(x).shape == x.shape
    with pytest.raises(ValueError, match="channels"):
        norm(torch.ones(2, 5))
    with pytest.raises(ValueError, match="residual"):
        norm(x, torch.ones(1, 6))


@needs_kernels
@pytest.mark.parametrize("activation", ["identity", "relu", "tanh"])
def test_an_empty_batch_counts_and_changes_nothing_else_as_in_torch(activation):
    norm, theirs = BatchNorm(6, activation=activation), torch.nn.BatchNorm2d(6)
    x = torch.empty(0, 6, 3, 5, requires_grad=True)
    for each in (norm, theirs):
        y = each(x) if each is theirs else each(x, x.detach())
        y.sum().backward()
        assert y.shape == x.shape and each.num_batches_tracked == 1
        assert torch.equal(each.weight.grad, torch.zeros(6)) and torch.equal(each.running_var, torch.ones(6))


@needs_kernels
def test_the_memory_format_is_kept_forward_and_backward():
    volumes = torch.randn(2, 6, 2, 3, 2).contiguous(memory_format=torch.channels_last_3d)
    last = images().contiguous(memory_format=torch.channels_last)
    for x in (images(), last, images()[..., 0], volumes, images(h=1, w=1)):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = BatchNorm(6, activation="relu")(x, x.detach())
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.stride() == x.stride() == dx.stride()


@needs_kernels
def test_a_second_use_before_the_backward_of_the_first():
    fused, other = twins(activation="relu")
    grads = []
    for norm in (fused, other):
        norm.zero_grad()
        x, z = images().requires_grad_(), images(seed=3).requires_grad_()
        first, second = norm(x), norm(z, x.detach())
        first.square().sum().backward()
        second.square().sum().backward()
        grads.append([x.grad, z.grad, norm.weight.grad, norm.running_mean])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)  # sums of squares, values near ten


@needs_kernels
def test_differentiating_twice_is_refused_rather_than_wrong():
    x = images().requires_grad_()
    (dx,) = torch.autograd.grad(BatchNorm(6)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@needs_kernels
def test_no_gradient_nothing_saved():
    norm, x = BatchNorm(6, activation="relu"), images()
    with torch.no_grad():
        y = norm(x, images(seed=1))
    assert y.grad_fn is None and norm.num_batches_tracked == 1
    y = norm(x.requires_grad_(), images(seed=1))
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    # x, weight, bias, mean, rstd and a bit for each of 4 * 6 rows of 15 padded to 16
    assert sorted(t.numel() * t.element_size() for t in saved) == sorted([4 * x.numel(), 24, 24, 24, 24, 48])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_keep_float32_statistics_and_parameters(dtype):
    norm = BatchNorm(6, activation="relu")
    x = images(dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert norm.weight.grad.dtype == norm.running_mean.dtype == torch.float32


@needs_kernels
def test_a_residual_of_another_type_is_promoted_as_by_addition():
    x, r = images(dtype=torch.bfloat16).requires_grad_(), images(seed=1).requires_grad_()
    y = BatchNorm(6, activation="relu")(x, r)
    y.sum().backward()
    assert y.dtype == r.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    with pytest.raises(UserError, match="int64 input"):
        bn.batch_norm(torch.ones(2, 6, dtype=torch.int64), training=False)


@needs_kernels
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", ["identity", "relu", "tanh"])
def test_the_operators_are_registered_properly(training, activation):
    for x in (images(2, 6, 2, 3), images(2, 6, 2, 3).contiguous(memory_format=torch.channels_last)):
        r, w = images(2, 6, 2, 3, seed=1), torch.ones(6)
        state = (torch.zeros(6), torch.ones(6), torch.zeros((), dtype=torch.int64))
        arguments = (x, r, w, w.clone(), *state, training, 0.1, 1e-5, activation, True)
        torch.library.opcheck(torch.ops.bnexp.batch_norm.default, arguments)
        y, mean, rstd, bits = torch.ops.bnexp.batch_norm(*arguments)
        saved = bn._saved(y, bits, r, activation)
        backward = (torch.ones_like(x), x, w, w.clone(), mean, rstd, saved, training, activation)
        torch.library.opcheck(torch.ops.bnexp.batch_norm_backward.default, backward)


@needs_kernels
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_compiled_module_is_one_graph_and_gives_the_same(momentum):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1 = BatchNorm(6, momentum=momentum, activation="relu")
            self.norm2 = BatchNorm(6, momentum=momentum, activation="relu")

        def forward(self, x):
            return self.norm2(self.norm1(x * 2), residual=x)

    torch._dynamo.reset()
    eager = Block()
    block = copy.deepcopy(eager)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        for run in (eager, compiled):
            x = images(seed=seed).contiguous(memory_format=torch.channels_last).requires_grad_()
            y = run(x)
            y.square().sum().backward()
            assert y.is_contiguous(memory_format=torch.channels_last)
    for (name, mine), theirs in zip(block.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name  # the same kernels in the same order
    for mine, theirs in zip(block.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
    with torch.no_grad():
        assert torch.equal(compiled.eval()(x), eager.eval()(x))


@needs_kernels
def test_its_printed_form_and_the_debug_log_name_the_tier_and_the_reason(caplog):
    norm = BatchNorm(6)
    assert "tier" not in repr(norm)
    with caplog.at_level(logging.DEBUG, logger="bnexp.norms.kernels"):
        norm(images())
    assert "tier=local (4 x 16 tile holds a channel's 60 values" in repr(norm)
    assert "forward (4, 6, 3, 5): Tiling(tier='local'" in caplog.text
    assert repr(pickle.loads(pickle.dumps(norm))) == repr(copy.deepcopy(norm)) == repr(norm)


@needs_kernels
def test_the_interpreter_is_announced_once(caplog, monkeypatch):
    monkeypatch.setattr(bn, "_warned", False)
    require_kernels("cpu")
    require_kernels(torch.device("cpu"))
    assert [each.levelname for each in caplog.records] == ["WARNING"] and "slow" in caplog.text


def test_without_a_gpu_it_can_be_built_and_traced_and_running_it_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    norm = BatchNorm(6, activation="relu")
    with pytest.raises(UserError, match="need a CUDA device and this is cpu; use norm=library"):
        norm(images())
    with pytest.raises(UserError, match="CUDA device"):
        require_kernels("cpu")
    with pytest.raises(UserError, match="this is mps"):
        require_kernels("mps")
    require_kernels("cuda")  # whether there is one is torch's to say
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_var, torch.ones(6))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert norm(torch.empty(2, 6, 4, 4), torch.empty(2, 6, 4, 4)).shape == (2, 6, 4, 4)
    on_meta = BatchNorm(6, device="meta")
    assert on_meta(torch.empty(2, 6, 4, 4, device="meta")).shape == (2, 6, 4, 4)
