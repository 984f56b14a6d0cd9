"""Parts that come to a CUDA device on demand. Run on a GPU machine: make gpu."""

import gc
import threading

import pytest
import torch
from torch import nn

from memopt.stage import stage
from tests.test_stage_pipelines import painted, stable_diffusion

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def parts(width=2048):
    torch.manual_seed(0)
    return {name: nn.Linear(width, width) for name in "abc"}


def bytes_of(*modules):
    """As the allocator counts them."""
    return sum(-(-p.nbytes // 512) * 512 for m in modules for p in (*m.parameters(), *m.buffers()))


def allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_the_device_holds_exactly_the_resident_parts():
    named, x = parts(), torch.randn(4, 2048, device="cuda")
    (nn.Linear(2048, 2048, device="cuda"))(x)  # cuBLAS has its workspace
    before = allocated()
    one = bytes_of(named["a"])
    with stage(named, budget=2 * sum(p.nbytes for p in named["a"].parameters())) as handle:
        assert handle.device == torch.device("cuda", torch.cuda.current_device())
        assert allocated() == before
        for name, resident in (("a", 1), ("b", 2), ("c", 2), ("a", 2)):
            named[name](x)
            assert allocated() - before == resident * one
        assert handle.report().loads == {"a": 2, "b": 1, "c": 1}
        assert handle._pool.pinned_bytes == sum(handle.report().bytes.values())
        assert all(p.is_pinned() for p in named["b"].parameters())
    assert allocated() == before
    assert not any(p.is_pinned() or p.is_cuda for m in named.values() for p in m.parameters())


def test_a_part_from_the_device_goes_back_to_it():
    named, x = {name: m.cuda() for name, m in parts().items()}, torch.randn(4, 2048, device="cuda")
    expected = {name: m(x) for name, m in named.items()}
    before = allocated()
    with stage(named):
        assert before - allocated() == bytes_of(*named.values())
        for name in "abcabc":
            assert torch.equal(named[name](x), expected[name])
        named["a"].weight.mul_(2)
        named["b"](x)
    assert allocated() == before
    named["a"].weight.div_(2)
    assert all(torch.equal(m(x), expected[name]) for name, m in named.items())


def test_streams_and_threads():
    named, x = parts(), torch.randn(4, 2048, device="cuda")
    expected = {name: m.cuda()(x).clone() for name, m in named.items()}
    wrong = []

    def work(name):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(named[name](x), expected[name]):
                    wrong.append(name)

    torch.cuda.synchronize()
    with stage(named):
        threads = [threading.Thread(target=work, args=(name,)) for name in "abcabc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_stable_diffusion_pipeline(tmp_path):
    pipe = stable_diffusion(tmp_path).to("cuda")
    expected = painted(pipe)
    pipe.to("cpu")
    before = allocated()
    with stage(pipe) as handle:
        assert pipe.device == pipe._execution_device == handle.device
        for _ in range(3):
            assert torch.equal(painted(pipe), expected)
            assert allocated() - before == bytes_of(pipe.vae)
            assert handle.report().resident == ("vae",)
    assert {p.device.type for p in pipe.unet.parameters()} == {"cpu"}
