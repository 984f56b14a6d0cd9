"""Bytes go out and come back as they were; buffers are used again, within their budgets."""

import gc
import os
import threading
import warnings

import pytest
import torch

from memopt import InputError
from memopt.memory.ledger import Ledger
from memopt.passes import OffloadActivations
from memopt.transfer import Mover, Pool

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def some(dtype, n=1000):
    generator = torch.Generator().manual_seed(1)
    if dtype.is_floating_point:
        return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2, (n,), generator=generator).to(dtype)


@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_there_and_back(dtype, to, tmp_path):
    mover = Mover(to, folder=tmp_path if to == "disk" else None)
    flat = torch.complex(some(torch.float32), some(torch.float32)) if dtype.is_complex else some(dtype)
    expected = flat.clone()
    parked = mover.out(flat)
    flat.zero_()  # a copy went out
    parked.fetch()
    for _ in range(2):
        found = parked.get()
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        found.zero_()  # and another comes back
    if to == "disk":
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == 2
        del parked
        assert [file.name for file in folder.iterdir()] == ["memopt.lock"]
        mover.close()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("compress", "bits", "bytes_"), [("bf16", 8, 2000), ("fp8", 3, 1000)])
def test_compressed(compress, bits, bytes_):
    dtype = torch.float32
    mover, flat = Mover(compress=compress), some(dtype) * 1e-3
    parked = mover.out(flat)
    found = parked.get()
    assert found.dtype == dtype
    error = (found - flat).abs() / flat.abs().clamp(min=flat.abs().max() / 100)
    assert 0 < error.max() <= 2.0**-bits
    del parked
    assert mover.pool.spare_bytes == bytes_
    assert torch.equal(mover.out(torch.zeros(5)).get(), torch.zeros(5))
    for narrow in (some(torch.int64), some(torch.bool)):
        assert torch.equal(mover.out(narrow).get(), narrow)


@pytest.mark.parametrize("compress", ["bf16", "fp8"])
def test_compressed_values_that_are_not_finite_stay_alone(compress):
    flat = torch.tensor([1.0, float("nan"), -2.0, float("inf"), 0.0])
    found = Mover(compress=compress).out(flat).get()
    assert torch.equal(found[[0, 2, 4]], flat[[0, 2, 4]])
    assert not found[[1, 3]].isfinite().any()
    assert Mover(compress=compress).out(torch.empty(0)).get().shape == (0,)


def test_finalizers_may_run_at_any_moment(tmp_path):
    """Garbage that holds what is parked is collected wherever memory is allocated, also inside the mover's own code."""

    class Cycle:
        pass

    before = gc.get_threshold()
    try:
        for to in ("cpu", "disk"):
            mover, x = Mover(to, folder=tmp_path if to == "disk" else None), some(torch.float32)
            for i in range(1500):
                gc.set_threshold(5 + i % 50)
                cycle = Cycle()
                cycle.me, cycle.parked = cycle, mover.out(x)
    finally:
        gc.set_threshold(*before)


def test_threads_use_one_mover_and_one_ledger():
    mover, x = Mover(), some(torch.float32)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            parked = mover.out(x)
            parked.fetch()
            assert torch.equal(parked.get(), x)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    with Ledger() as ledger:
        held = [torch.empty(10, dtype=torch.uint8) for _ in range(2000)]
        found = ledger.total
    stop.set()
    for thread in threads:
        thread.join()
    assert found == 10 * len(held)
    assert not ledger.quiet


def test_a_fork_leaves_its_parents_files(tmp_path):
    mover, x = Mover("disk", folder=tmp_path), some(torch.float32)
    parked = mover.out(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks in a process with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            other = mover.out(x + 1)  # in a folder of its own
            right = torch.equal(other.get(), x + 1) and len(list(tmp_path.iterdir())) == 2
            del parked, other
            mover.close()
            code = 0 if right else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(parked.get(), x)
    assert len(list(tmp_path.iterdir())) == 1


def test_buffers_are_used_again_within_a_budget():
    pool = Pool(pinned=0, spare=250)
    first = pool.take(100)
    pool.give(first)
    assert pool.take(100) is first
    pool.give(first)
    others = [pool.take(size) for size in (60, 60, 90)]
    for buffer in others:
        pool.give(buffer)
    assert pool.spare_bytes == 210  # the oldest went
    assert pool.take(90) is others[2]
    assert pool.take(60) is others[0]
    assert pool.take(100) is not first


def test_ledgers_are_told_where_bytes_are():
    flat = some(torch.float32)
    with Ledger() as ledger:
        mover = Mover()
        parked = mover.out(flat)
        assert (ledger.total, ledger.peak) == (4000, 4000)  # the tensor itself
        assert ledger.off_device == {"cpu": 4000}
        back = parked.get()
        assert ledger.total == 8000
        del back, parked
        gc.collect()
    assert ledger.total == 4000
    assert mover.pool.spare_bytes == 4000


def test_bad_settings_are_named():
    for given, message in (
        ({"to": "moon"}, "to='moon' is not one of cpu, disk"),
        ({"compress": "zip"}, "compress='zip' is not one of bf16, fp8"),
        ({"folder": "/tmp"}, "folder is for to='disk'"),
        ({"spare": "lots"}, "lots"),
    ):
        with pytest.raises(InputError, match=message):
            Mover(**given)
    with pytest.raises(InputError, match="offload_activations: to='moon' is not one of cpu, disk"):
        OffloadActivations(to="moon")
    with pytest.raises(InputError, match="offload_activations: prefetch must be at least 0, not -1"):
        OffloadActivations(prefetch=-1)
