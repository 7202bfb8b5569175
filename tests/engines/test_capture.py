"""What CUDA is asked for around a capture, read from stand-ins for it; the steps are those of test_engines.py."""

from contextlib import contextmanager

import pytest
import torch

from bnexp.engines import capture
from bnexp.engines.capture import CudaGraphs, convolutions_tried


class Stub:
    """Streams, graphs and generators that note in ``log`` what happens to them."""

    def __init__(self, log, name, state=7):
        self.log, self.name, self.state = log, name, state

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def register_generator_state(self, generator):
        self.log.append(f"{generator.name} is registered")

    def replay(self):
        self.log.append("replay")

    def get_state(self):
        return self.state

    graphsafe_get_state = get_state

    def set_state(self, state):
        self.state = state

    def graphsafe_set_state(self, state):
        self.log.append(f"{self.name} has a new state {state}")


@pytest.fixture
def cuda(monkeypatch):
    """The log of a CUDA with two devices, of which 0 is current."""
    log, on, pools = [], [0], iter(range(1, 9))
    current = Stub(log, "current")

    @contextmanager
    def device(chosen):
        on.append(chosen.index)
        yield
        on.pop()

    @contextmanager
    def stream(chosen):
        log.append(f"on {chosen.name}")
        yield

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        log.append(f"{capture_error_mode} capture on {on[-1]} by {stream.name} in pool {pool}")
        yield  # after an error CUDA has not put the stream back

    fakes = {
        "Stream": lambda *given: Stub(log, f"side-{given[0].index if given else on[-1]}"),
        "CUDAGraph": lambda: Stub(log, "graph"), "current_stream": lambda: current, "device": device, "graph": graph,
        "stream": stream, "set_stream": lambda stream: log.append(f"back on {stream.name}"),
        "graph_pool_handle": lambda: next(pools), "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: log.append(f"sync {mode}"), "current_device": lambda: on[-1],
        "default_generators": [Stub(log, "default 0"), Stub(log, "default 1")],
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "Generator", lambda device: Stub(log, "fresh", None))
    capture.shared_memory.cache_clear()
    yield log
    capture.shared_memory.cache_clear()


SECOND = torch.device("cuda:1")


def test_a_run_on_the_second_gpu_is_captured_there_whichever_is_current(cuda):
    graphs = CudaGraphs(SECOND)
    with graphs.warming_up():
        pass
    graphs.capture(lambda: cuda.append("step"), [Stub(cuda, "batches")])()
    assert "side-1 waits for current" in cuda and "current waits for side-1" in cuda
    capture_at = cuda.index("thread_local capture on 1 by side-1 in pool 1")
    assert cuda[capture_at - 1 :] == ["batches is registered", cuda[capture_at], "step", "replay"]


def test_after_a_warm_up_that_fails_nothing_is_put_back_before_the_side_stream_is_done(cuda):
    with pytest.raises(RuntimeError, match="a sync"), CudaGraphs(SECOND).warming_up():
        raise RuntimeError("a sync")
    assert cuda[-2:] == ["sync 0", "current waits for side-1"]


def test_after_a_capture_that_cuda_ends_the_stream_and_the_generators_are_those_of_before(cuda):
    def out_of_memory():
        raise RuntimeError("out of memory")

    graphs = CudaGraphs(SECOND)
    with pytest.raises(RuntimeError, match="out of memory"):
        graphs.capture(out_of_memory, [Stub(cuda, "batches", 3)])
    assert cuda[-3:] == ["back on current", "batches has a new state 3", "default 1 has a new state 7"]
    graphs.capture(lambda: None, [])
    assert cuda[-1].endswith("in pool 2"), "the first pool is still as the capture left it"


def test_all_graphs_of_a_kind_share_one_pool_of_memory(cuda):
    for what in ("steps", "evaluation", "steps", "evaluation"):
        CudaGraphs(SECOND).capture(lambda: None, [], what)
    assert [line[-6:] for line in cuda] == ["pool 1", "pool 2"] * 2


@pytest.mark.parametrize("is_tried", [True, False])
def test_convolutions_are_tried_inside_the_block_only(is_tried):
    assert torch.backends.cudnn.benchmark is False
    with pytest.raises(RuntimeError), convolutions_tried(is_tried):
        assert torch.backends.cudnn.benchmark is is_tried
        raise RuntimeError
    assert torch.backends.cudnn.benchmark is False
