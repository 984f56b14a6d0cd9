"""Skip connections and weights that come and go on a CUDA device. Run on a GPU machine: make gpu."""

import gc
import itertools
import random
import statistics
import time

import pytest
import torch
from torch import nn

import memopt
from memopt.passes import BlockSwap, Checkpoint, OffloadActivations, OffloadSkips
from memopt.recipe import load_recipe
from tests.passes.test_offload_skips import Res

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),
]


class UNet(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Res(a, b) for a, b in itertools.pairwise(widths))
        self.middle = nn.Sequential(Res(widths[-1], widths[-1]), Res(widths[-1], widths[-1]))
        pairs = list(zip([widths[-1], *widths[::-1]], widths[::-1], strict=False))
        self.up = nn.ModuleList(Res(a + b, b) for a, b in pairs)

    def forward(self, x):
        skips = [self.first(x)]
        for block in self.down:
            skips.append(block(skips[-1]))
        x = self.middle(skips[-1])
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], dim=1))
        return x


def step(model, x):
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.to(x.device, copy=True) for p in model.parameters())]


@pytest.fixture(autouse=True)
def _same_kernels():
    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize(
    "passes",
    [
        [OffloadSkips(min_bytes=1, waits=4)],
        [OffloadSkips(min_bytes=1, waits=4, prefetch=3), Checkpoint()],
        [OffloadSkips(min_bytes=1, waits=4), OffloadActivations(min_bytes=1, prefetch=2)],
        [BlockSwap()],
        [BlockSwap(prefetch=3, resident=2), Checkpoint()],
        [BlockSwap(level="leaf"), OffloadSkips(min_bytes=1, waits=4), OffloadActivations(min_bytes=1)],
    ],
    ids=str,
)
def test_the_same_bits_for_many_shapes(passes):
    draw = random.Random(0)
    for _ in range(200):
        torch.manual_seed(0)
        model = UNet([2 * draw.randint(1, 40) for _ in range(draw.randint(2, 5))]).cuda()
        x = torch.randn(draw.randint(1, 5), 3, draw.randint(2, 40), draw.randint(2, 40), device="cuda")
        expected = step(model, x)
        with torch.no_grad():
            torch.manual_seed(0)
            output = model(x)
        with memopt.apply(model, passes):
            for _ in range(3):
                assert all(torch.equal(a, b) for a, b in zip(step(model, x), expected, strict=True))
                with torch.no_grad():
                    torch.manual_seed(0)
                    assert torch.equal(model(x), output)
        assert all(p.is_cuda for p in model.parameters())


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_training_with_weights_at_home(to):
    """The optimizer steps in host memory; its rounding differs from that of kernels on the device."""
    weights = []
    for passes in ([], [BlockSwap(to=to)]):
        torch.manual_seed(0)
        model = UNet([8, 16, 32]).cuda().eval()
        with memopt.apply(model, passes):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            for i in range(20):
                torch.manual_seed(i)
                x = torch.randn(4, 3, 16, 16, device="cuda")
                for _ in range(2):
                    model(x).square().mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if passes:
                assert all(p.device.type == "cpu" for p in model.down.parameters())
        assert all(p.is_cuda for p in model.parameters())
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_that_goes_to_the_device_later_and_back():
    torch.manual_seed(0)
    model, x = UNet([8, 16, 32]).eval(), torch.randn(2, 3, 16, 16)
    expected = model(x)
    handle = memopt.apply(model, [BlockSwap(device="cuda")])
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    handle.undo()
    assert torch.equal(model(x), expected)
    handle = memopt.apply(model, [BlockSwap()])
    model.cuda()
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert all(p.device.type == "cpu" for p in model.down.parameters())


def test_weights_on_the_device_are_those_promised():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2048, 2048, bias=False), nn.ReLU()) for _ in range(12))).cuda()
    x = torch.randn(1, 2048, device="cuda")
    block = 2048 * 2048 * 4
    for resident, prefetch in ((1, 0), (1, 1), (2, 2)):
        with memopt.apply(model, [BlockSwap(resident=resident, prefetch=prefetch)]), torch.no_grad():
            for _ in range(3):
                gc.collect()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                model(x)
            found = torch.cuda.max_memory_allocated() - before
            assert 0 <= found - (resident + prefetch) * block < block / 2


def test_the_full_model():
    recipe = load_recipe("examples/hae_v2")
    config = recipe.presets["brats128"]
    torch.manual_seed(0)
    model = recipe.model(config).cuda()
    x = torch.randn(14, 4, config.image_size, config.image_size, device="cuda")
    t = torch.zeros(14, device="cuda").long()
    how = {"y": t, "clf_free": True, "null": t.bool()}

    def train():
        model.zero_grad()
        model(x, t, **how).square().mean().backward()

    def seconds():
        torch.cuda.synchronize()
        begin = time.perf_counter()
        train()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    skips = OffloadSkips()
    predicted = memopt.profile(model, ((x, t), how), passes=[skips], device="cuda").peak
    ratios = []
    for _ in range(5):
        [train() for _ in range(2)]
        plain = statistics.median(seconds() for _ in range(3))
        with memopt.apply(model, [skips]):
            [train() for _ in range(2)]
            torch.cuda.reset_peak_memory_stats()
            ratios.append(statistics.median(seconds() for _ in range(3)) / plain)
            peak = torch.cuda.max_memory_allocated()
    print(f"step time with offload_skips {statistics.median(ratios):.3f}, peak {peak:,}, predicted {predicted:,}")
    assert statistics.median(ratios) <= 1.08
    assert peak == pytest.approx(predicted, rel=0.03)
