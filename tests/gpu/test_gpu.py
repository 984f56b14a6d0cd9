"""What only a CUDA device can show. Run on a GPU machine: make gpu."""

import gc

import pytest
import torch
from torch import nn

import memopt
from memopt.passes import AMP, CacheCleanup, Checkpoint
from tests.zoo import ZOO, loss_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),  # CUDA has some of its own, about kernels that are not deterministic say
]


def step(model, case, seed=0):
    model.zero_grad(set_to_none=True)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cuda(), case.inputs())
    torch.manual_seed(seed)
    loss = loss_of(model(*args, **kwargs))
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_close(grads, expected):
    """Some kernels add up in any order; what random state would change is far larger."""
    total = torch.stack([b.norm() for b in expected if b is not None]).norm()
    for a, b in zip(grads, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6 * total


@pytest.mark.parametrize("name", ["hae_v2", "unet2d_condition", "dit", "gpt2"])
def test_checkpoint_restores_device_random_state(name):
    case = ZOO[name]
    model = case.build().cuda()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        loss, grads = step(model, case)
        with memopt.apply(model, [Checkpoint()]):
            for _ in range(2):
                again, grads_again = step(model, case)
                assert torch.equal(loss, again)
                assert_close(grads_again, grads)
    finally:
        torch.use_deterministic_algorithms(False)


def test_checkpoint_restores_random_state_of_keyword_only_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, *, hidden):
            return self.b(nn.functional.dropout(self.a(hidden), 0.5))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(hidden=x)
            return x

    model, x = Net().cuda(), torch.randn(8, 64, device="cuda")

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    memopt.apply(model, [Checkpoint()])
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_checkpoint_lowers_the_peak():
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)) for _ in range(8)]
    ).cuda()
    x = torch.randn(4096, 512, device="cuda")

    def peak():
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        model(x).sum().backward()
        return torch.cuda.max_memory_allocated()

    plain = max(peak(), peak())
    memopt.apply(model, [Checkpoint()])
    assert max(peak(), peak()) < plain


def test_amp_on_the_device():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).cuda(), torch.randn(4, 64, device="cuda")
    seen = []
    model[1].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    plain = model(x)
    with memopt.apply(model, [AMP()]):
        out = model(x)
    assert seen == [torch.float32, torch.bfloat16]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, plain, rtol=0.1, atol=0.1)


def test_cache_cleanup_gives_memory_back():
    model = nn.Linear(2, 2).cuda()
    handle = memopt.apply(model, [CacheCleanup()])
    gc.collect()
    with handle.phase("sampling"):
        tensor = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        held = torch.cuda.memory_reserved()
        del tensor
        assert torch.cuda.memory_reserved() == held  # cached, not given back
    assert torch.cuda.memory_reserved() <= held - (256 << 20)
