"""What only a GPU shows of norm=fused: real shapes, bitwise repetition, CUDA graphs, memory, training."""

import shutil
import statistics

import pytest
import torch
from sanitizer import sanitize

from bnexp.norms.kernels import batch_norm as bn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bn.interpreted(), reason="needs a CUDA device"),
]

RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
RESNET18 = [(64, 32), (128, 16), (256, 8), (512, 4), (64, 48), (64, 24), (128, 12), (256, 6), (512, 3)]
SHAPES = [(128, c, s, s) for c, s in RESNET50] + [(256, c, s, s) for c, s in RESNET18]
SHAPES += [(256, 6, 24, 24), (256, 16, 8, 8), (256, 120), (256, 84), (8192, 1024)]  # LeNet, an MLP
SHAPES += [(64, 96, 32, 32), (64, 160, 16, 16), (64, 224, 8, 8)]  # DenseNet's widths
SHAPES += [(2, 1, 3, 3), (31, 3, 37, 41), (2, 2049, 7, 7), (2, 6, 5, 3, 7), (7, 2049)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_every_shape_of_the_networks(shape, dtype):
    from test_kernels import check, inputs

    for last in (False, True):
        for residual in (False, True):
            # Sums of a million float32 values; identity, since relu's mask may flip where z is around 0.
            check(inputs(shape, dtype, last, residual=residual), activation="identity", slack=32.0)


@pytest.mark.parametrize("tensor", [(128, 256, 28, 28), (64, 512, 7, 7), (8192, 1024)], ids=str)
def test_a_hundred_runs_are_bitwise_equal(tensor):
    from test_kernels import NAMES, inputs, ours

    arguments = inputs(tensor, torch.bfloat16)
    first = ours(*arguments, True, 0.1, 1e-5, "relu")
    for _ in range(99):
        again = ours(*arguments, True, 0.1, 1e-5, "relu")
        assert all(torch.equal(first[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(64, 32, 7, 7), (64, 32, 56, 56)], ids=["local", "two-launch"])
def test_a_thousand_replays_of_a_cuda_graph_move_the_statistics_exactly(shape, momentum):
    from bnexp.norms.fused import BatchNorm

    captured, eager = (BatchNorm(shape[1], momentum=momentum, activation="relu").cuda() for _ in range(2))
    x = torch.randn(shape, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels outside of the graph
        captured(x, x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(eager.state_dict())
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured(x, x).sum().backward()
    batches = torch.randn(4, *shape, device="cuda")
    for i in range(1000):
        with torch.no_grad():
            x.copy_(batches[i % 4])
        graph.replay()
        with torch.no_grad():
            eager(batches[i % 4], batches[i % 4])
    assert captured.num_batches_tracked.item() == 1000
    for name, value in eager.state_dict().items():
        assert torch.equal(value, captured.state_dict()[name]), name


def test_more_than_two_to_the_31_elements():
    from bnexp.norms.fused import BatchNorm

    x = torch.empty(2**15 + 8, 64, 32, 32, device="cuda", dtype=torch.bfloat16).normal_()
    norm = BatchNorm(64, activation="relu").cuda()
    with torch.no_grad():
        y = norm(x)
    for part in (slice(0, 8), slice(-8, None)):
        tail = x[part].float()
        expected = (tail / (1 + 1e-5) ** 0.5).relu()  # mean 0, variance 1, within 1e-3
        torch.testing.assert_close(y[part].float(), expected, rtol=2e-2, atol=2e-2)


BEYOND = """
import torch, triton, triton.language as tl

@triton.jit
def beyond(p):
    tl.store(p + 1_000_000, 1.0)

beyond[(1,)](torch.zeros(4, device="cuda"))
torch.cuda.synchronize()
"""


@pytest.fixture
def tool():
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    return found or pytest.skip("compute-sanitizer is not installed")


def test_compute_sanitizer_finds_a_write_beyond_a_tensor(tool, tmp_path):
    assert sanitize(tool, "memcheck", BEYOND, tmp_path).returncode == 9


def test_compute_sanitizer_finds_nothing(tool, tmp_path):
    script = (
        "import torch; from bnexp.norms.fused import BatchNorm\n"
        "for shape in ((3, 17, 5, 7), (65, 6, 24, 24), (33, 257)):\n"
        "    x = torch.randn(shape, device='cuda', requires_grad=True)\n"
        "    BatchNorm(shape[1], activation='relu').cuda()(x, x).sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    for check in ("memcheck", "racecheck"):
        done = sanitize(tool, check, script, tmp_path)
        assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_training_with_fused_is_training_with_library(name):
    """Equal to rounding at step 1, and at the end no further apart than two seeds of library are."""
    from bnexp.models import lenet, resnet
    from bnexp.models.initialize import initialize
    from bnexp.norms import fused, library

    model_class = lenet.LeNet if name == "lenet" else resnet.ResNet
    images = torch.randn(512, 1, 28, 28, generator=torch.Generator().manual_seed(0)).cuda()
    labels = (images.mean((1, 2, 3)) * 100).floor().long().remainder(10)

    def losses(norm, seed):
        model = model_class((1, 28, 28), 10, norm)
        initialize(model, torch.Generator().manual_seed(seed))
        model.cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        found = []
        for step in range(60):
            part = slice(128 * (step % 4), 128 * (step % 4 + 1))
            loss = torch.nn.functional.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    theirs = [losses(library.BatchNorm, seed) for seed in range(4)]
    ours = losses(fused.BatchNorm, 0)
    assert abs(ours[0] - theirs[0][0]) < 1e-3 * theirs[0][0]  # TF32 convolutions, float32 norms
    last = [statistics.mean(each[-4:]) for each in theirs]
    assert abs(statistics.mean(ours[-4:]) - statistics.mean(last)) < 4 * statistics.stdev(last) + 0.05
