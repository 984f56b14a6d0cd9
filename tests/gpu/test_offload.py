"""Moving bytes beside the computation on a CUDA device. Run on a GPU machine: make gpu."""

import gc
import itertools
import random

import pytest
import torch
from torch import nn

import memopt
from memopt.passes import OffloadActivations
from memopt.transfer import Mover

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),
]


def chain(widths):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers).cuda()


def step(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_the_same_bits_for_many_shapes(to, prefetch):
    draw = random.Random(prefetch)
    for _ in range(200 if to == "cpu" else 20):
        model = chain([draw.choice([8, 40, 256, 1000]) for _ in range(draw.randint(2, 6))])
        x = torch.randn(draw.choice([1, 33, 2000]), model[0][0].in_features, device="cuda")
        expected = step(model, x)
        with memopt.apply(model, [OffloadActivations(to=to, min_bytes=1, prefetch=prefetch)]):
            for _ in range(2):
                assert all(torch.equal(a, b) for a, b in zip(step(model, x), expected, strict=True))


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_sources_and_buffers_may_be_used_again_at_once(to):
    """Memory that the allocator hands on while copies are under way is written to on the computing stream."""
    mover = Mover(to, in_flight="4MiB")
    for size in (1 << 20, 3 << 20, 1 << 20):
        for i in range(50):
            flat = torch.full((size // 4,), float(i), device="cuda")
            parked = mover.out(flat)
            del flat
            torch.full((size // 4,), -1.0, device="cuda")
            parked.fetch()
            torch.full((size // 4,), -2.0, device="cuda")
            assert (parked.get() == i).all()
            if to == "disk" and i % 2:
                mover.worker.drain()  # the file is read; otherwise mostly the buffer
                assert (parked.get() == i).all()
            parked.fetch()  # and is never asked for
            del parked
    assert mover.pool.spare_bytes <= 4 << 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_by_the_kernels_of_the_device(dtype):
    pytest.importorskip("bitsandbytes")
    mover = Mover(compress="int8")
    flat = torch.randn(100_000, device="cuda").to(dtype)
    flat[:600] = 0
    flat[5000:5010] = torch.inf
    parked = mover.out(flat)
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        found = parked.get()
    assert torch.equal(found.isnan(), ~flat.isfinite())
    expected = flat.float().where(flat.isfinite(), 0)
    error = (found.float().nan_to_num() - expected).abs()
    for a, b in zip(error.split(512), expected.split(512), strict=True):
        assert a.max() <= b.abs().max() * (1 / 140 + torch.finfo(dtype).eps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mover.out(flat)  # waits for nothing
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pageable_memory_serves_where_nothing_may_be_pinned():
    mover = Mover(pinned=1)
    flat = torch.randn(1000, device="cuda")
    parked = mover.out(flat)
    assert mover.pool.pinned_bytes == 0
    assert torch.equal(parked.get(), flat)


def test_the_profile_predicts_the_peak():
    passes = [OffloadActivations(min_bytes=1024, prefetch=1)]
    model, x = chain([1024] * 13), torch.randn(8192, 1024, device="cuda")
    predicted = memopt.profile(model.cpu(), x.cpu(), passes=passes, device="cuda").peak
    model.cuda()

    def peak():
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        step(model, x)
        return torch.cuda.max_memory_allocated()

    plain = max(peak(), peak())
    memopt.apply(model, passes)
    found = max(peak(), peak())
    assert found < 0.6 * plain
    assert abs(found / predicted - 1) <= 0.03 or found < predicted


def test_nothing_grows():
    model, x = chain([256] * 5), torch.randn(4096, 256, device="cuda")
    memopt.apply(model, [OffloadActivations(min_bytes=1024)])
    for i in range(300):
        step(model, x)
        if i == 5:
            early = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == early
