"""Bytes go out and come back as they were; buffers are used again, within their budgets."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memopt import InputError, MemoptError
from memopt.memory.ledger import Ledger
from memopt.passes import OffloadActivations
from memopt.scratch import Scratch
from memopt.transfer import Mover, Pool

ROOT = Path(__file__).resolve().parent.parent

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


def until(true):
    """Wait for what another thread is about to make true."""
    for _ in range(1000):
        if true():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def gate(monkeypatch):
    """Files are written only once it is open."""
    opened, write = threading.Event(), Scratch.write

    def late(self, file, data):
        opened.wait(60)
        write(self, file, data)

    monkeypatch.setattr(Scratch, "write", late)
    yield opened
    opened.set()


@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_there_and_back(dtype, to, tmp_path):
    mover = Mover(to, folder=tmp_path if to == "disk" else None)
    flat = torch.complex(some(torch.float32), some(torch.float32)) if dtype.is_complex else some(dtype)
    expected = flat.clone()
    parked = mover.out(flat)
    flat.zero_()  # a copy went out
    if to == "disk":
        mover.worker.drain()
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


@pytest.fixture(params=["bf16", "fp8", "int8"])
def compress(request):
    if request.param == "int8":
        pytest.importorskip("bitsandbytes")
    return request.param


def test_compressed_values_that_are_not_finite_stay_alone(compress):
    flat = torch.tensor([1.0, float("nan"), -2.0, float("inf"), 0.0])
    found = Mover(compress=compress).out(flat).get()
    assert (found - flat)[[0, 2]].abs().max() <= (2 / 140 if compress == "int8" else 0)
    assert found[4] == 0
    assert not found[[1, 3]].isfinite().any()
    assert Mover(compress=compress).out(torch.empty(0)).get().shape == (0,)


def test_compressed_bytes_of_fake_and_true_tensors_agree(compress):
    def account(to):
        x, mover, seen = torch.ones(3001, dtype=torch.float32), Mover(to, compress=compress), []
        with Ledger(fakes=True) as ledger:
            ledger.see(x)
            parked = mover.out(x)
            seen.append((ledger.total, ledger.peak, dict(ledger.off_device)))
            found = parked.get().mul(2)
            seen.append((ledger.total, ledger.peak, dict(ledger.off_device)))
            assert found.shape == x.shape
        return seen

    for to in ("cpu", "disk"):
        real = account(to)
        with FakeTensorMode():
            fake = account(to)
        if to == "cpu":
            assert fake == real
        assert [row[:2] for row in fake] == [row[:2] for row in real]
        assert {"bf16": 6002, "fp8": 3001, "int8": 3001}[compress] == fake[0][2][to]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 511, 512, 513, 5000])
def test_int8_is_as_near_as_promised_in_each_block(dtype, n):
    pytest.importorskip("bitsandbytes")
    mover = Mover(compress="int8")
    for scale in (1.0, 1e-3, 1e4):
        sizes = 10.0 ** -(torch.arange(n) // 512 % 5)  # blocks of their own size each
        flat = (some(torch.float64, n).clamp(-4, 4) * sizes * scale).to(dtype)
        found = mover.out(flat).get()
        assert found.dtype == dtype
        blocks = [x.double().split(512) for x in (found, flat)]
        for a, b in zip(*blocks, strict=True):
            assert (a - b).abs().max() <= b.abs().max() * (1 / 140 + torch.finfo(dtype).eps) + 6e-8
        assert n == 1 or not torch.equal(found, flat)
        assert (found * flat >= 0).all()
    whole = torch.cat([torch.zeros(600), torch.full((600,), 3.0), torch.full((600,), -1e-42)])
    assert (mover.out(whole).get() - whole).abs().max() <= 0.022
    rectified = some(torch.float32, 5000).relu()
    assert torch.equal(mover.out(rectified).get() > 0, rectified > 0)
    assert torch.equal(mover.out(whole.double()).get(), whole.double())


def test_int8_marks_what_is_not_finite_whatever_is_beside_it():
    pytest.importorskip("bitsandbytes")
    mover = Mover(compress="int8")
    for value in (float("nan"), float("inf"), -float("inf")):
        for others in (torch.zeros(2000), torch.ones(2000), some(torch.float32, 2000)):
            flat = others.clone()
            flat[::7] = value
            found = mover.out(flat).get()
            assert torch.equal(found.isnan(), ~flat.isfinite())
            assert (found - others)[flat.isfinite()].abs().max() <= 4 / 140


def test_int8_says_what_it_needs(monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="compress='int8' needs bitsandbytes: pip install bitsandbytes"):
        Mover(compress="int8")


# Files beside the computation.


def test_files_are_written_later_and_buffers_serve_until_then(gate, tmp_path):
    mover, x = Mover("disk", folder=tmp_path), some(torch.float32)
    source = x.clone()
    parked = mover.out(source)
    source.zero_()
    assert torch.equal(parked.get(), x)  # with no file anywhere
    assert list(mover.scratch.folder.glob("[0-9]*")) == []
    gate.set()
    mover.worker.drain()
    assert mover.pool.spare_bytes == x.nbytes
    assert [file.stat().st_size for file in mover.scratch.folder.glob("[0-9]*")] == [x.nbytes]
    assert torch.equal(parked.get(), x)


def test_reads_begin_with_fetch(tmp_path, monkeypatch):
    mover, x = Mover("disk", folder=tmp_path), some(torch.float32)
    parked = [mover.out(x + i) for i in range(2)]
    mover.worker.drain()
    threads, read, opened = [], Scratch.read, threading.Event()

    def late(self, file, data):
        threads.append(threading.current_thread())
        opened.wait(60)
        read(self, file, data)

    monkeypatch.setattr(Scratch, "read", late)
    for one in parked:
        one.fetch()  # does not wait
    assert until(lambda: threads)
    assert threads[0] is not threading.current_thread()
    threading.Timer(0.1, opened.set).start()
    assert torch.equal(parked[1].get(), x + 1)
    assert torch.equal(parked[0].get(), x)
    parked[0].fetch()  # and is never asked for
    del parked, one
    mover.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_dropped_before_it_is_written_leaves_nothing(gate, tmp_path):
    mover, x = Mover("disk", folder=tmp_path), some(torch.float32)
    parked = [mover.out(x) for _ in range(3)]  # the first is in the middle of it
    first, *_ = (one._slot.write.file for one in parked)
    parked.clear()
    assert mover.worker.pending == 0
    gate.set()
    mover.worker.end()
    assert os.listdir(mover.scratch.folder) == ["memopt.lock"]
    assert not first.exists()
    assert mover.pool.spare_bytes == 3 * x.nbytes


def test_callers_wait_when_too_much_is_to_be_written(gate, tmp_path):
    x = some(torch.float32)
    mover = Mover("disk", folder=tmp_path, in_flight=2 * x.nbytes)
    parked, done = [mover.out(x), mover.out(x)], threading.Event()

    def third(into):
        into.append(mover.out(x))
        done.set()

    thread = threading.Thread(target=third, args=(parked,))
    thread.start()
    assert not done.wait(0.3)
    assert mover.worker.pending == 2 * x.nbytes
    gate.set()
    thread.join(60)
    assert done.is_set()
    assert all(torch.equal(one.get(), x) for one in parked)
    large = torch.arange(10_000)  # more than the budget
    assert torch.equal(mover.out(large).get(), large)
    del parked
    mover.worker.drain()
    assert mover.pool.spare_bytes <= 2 * x.nbytes


@pytest.fixture
def full(monkeypatch):
    """Files of more than 1,000 bytes cannot be written."""
    write = Scratch.write

    def limited(self, file, data):
        if len(memoryview(data).cast("B")) > 1000:
            raise MemoptError(f"cannot write to {file}: No space left on device.")
        write(self, file, data)

    monkeypatch.setattr(Scratch, "write", limited)


def test_a_write_that_failed_is_told_once_and_to_who_asks_for_it(full, tmp_path):
    mover, small, large = Mover("disk", folder=tmp_path), torch.arange(10), torch.arange(1000)
    kept, *lost = [mover.out(x) for x in (small, large, large)]
    until(lambda: mover.worker.pending == 0)
    file = lost[0]._slot.write.file
    with pytest.raises(MemoptError, match=f"cannot write to {file}: No space left"):
        mover.out(small)
    again = mover.out(small)
    assert torch.equal(again.get(), small)
    assert torch.equal(kept.get(), small)
    for one in lost:
        for _ in range(2):
            one.fetch()
            with pytest.raises(MemoptError, match=f"cannot write to {one._slot.write.file}: No space left"):
                one.get()
    failed = mover.out(large)
    until(lambda: mover.worker.pending == 0)
    del failed  # nobody needs it
    mover.out(small)
    assert mover.pool.spare_bytes > 0


def test_threads_and_files_end_with_the_mover(tmp_path):
    before = threading.active_count()
    for _ in range(20):
        mover = Mover("disk", folder=tmp_path)
        parked = mover.out(torch.arange(1000))
        mover.worker.drain()
        parked.fetch()
    assert threading.active_count() > before
    del mover, parked
    gc.collect()
    assert until(lambda: threading.active_count() <= before)
    assert until(lambda: list(tmp_path.iterdir()) == [])


def test_at_exit(tmp_path):
    """Much that waits to be written, reads under way, and use by what runs at exit."""
    code = f"""
import atexit, torch
from memopt.transfer import Mover
mover, x = Mover("disk", folder={str(tmp_path)!r}), torch.arange(1 << 20)
early = mover.out(x)
mover.worker.drain()
early.fetch()
def late():
    more = mover.out(x + 1)
    print(torch.equal(early.get(), x), torch.equal(early.get(), x), torch.equal(more.get(), x + 1))
    mover.worker.drain()
    print(torch.equal(more.get(), x + 1))
atexit.register(late)
many = [mover.out(x) for _ in range(10)]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("True True True\nTrue\n", "")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_waiting_loses_nothing(gate, tmp_path):
    x = some(torch.float32)
    mover = Mover("disk", folder=tmp_path, in_flight=1)
    parked = mover.out(x)
    main = threading.main_thread().ident
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        mover.out(x + 1)
    gate.set()
    assert torch.equal(mover.out(x + 2).get(), x + 2)
    mover.worker.drain()
    assert torch.equal(parked.get(), x)


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


def test_a_fork_leaves_its_parents_files(tmp_path, monkeypatch):
    mover, x = Mover("disk", folder=tmp_path), some(torch.float32)
    parked, early = mover.out(x), mover.out(x + 3)
    mover.worker.drain()
    opened, write, read = threading.Event(), Scratch.write, Scratch.read
    parent = os.getpid()

    def late(do):
        def wait(self, file, data):
            if os.getpid() == parent:
                opened.wait(60)
            do(self, file, data)

        return wait

    monkeypatch.setattr(Scratch, "write", late(write))
    monkeypatch.setattr(Scratch, "read", late(read))
    early.fetch()  # under way as the process forks, and so is this
    pending = mover.out(x + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks in a process with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            other = mover.out(x + 1)  # in a folder of its own
            mover.worker.drain()
            right = torch.equal(other.get(), x + 1) and len(list(tmp_path.iterdir())) == 2
            right &= torch.equal(early.get(), x + 3) and torch.equal(pending.get(), x + 2)
            del parked, other, early, pending
            mover.close()
            code = 0 if right else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    opened.set()
    assert [torch.equal(y.get(), x + i) for y, i in ((parked, 0), (early, 3), (pending, 2))] == [True] * 3
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
        ({"compress": "zip"}, "compress='zip' is not one of bf16, fp8, int8"),
        ({"folder": "/tmp"}, "folder is for to='disk'"),
        ({"spare": "lots"}, "lots"),
    ):
        with pytest.raises(InputError, match=message):
            Mover(**given)
    with pytest.raises(InputError, match="offload_activations: to='moon' is not one of cpu, disk"):
        OffloadActivations(to="moon")
    with pytest.raises(InputError, match="offload_activations: prefetch must be at least 0, not -1"):
        OffloadActivations(prefetch=-1)
