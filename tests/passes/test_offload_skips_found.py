"""What a review has found to break skip connections that wait elsewhere."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import memopt
from memopt.memory.ledger import Ledger
from memopt.passes import OffloadActivations, OffloadSkips
from tests.passes.test_offload_activations import assert_equal

PASS = OffloadSkips(min_bytes=1, waits=2)
SIZE = 2 * 4 * 8 * 8 * 4


class Parts(nn.Module):
    """Parts for models that a test writes; ``way`` is what forward does."""

    def __init__(self, way):
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Conv2d(4, 4, 3, padding=1))
        self.mid = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(5)))
        self.way = way

    def forward(self, x):
        return self.way(self, x)


def pair(way, *others):
    torch.manual_seed(0)
    plain = Parts(way)
    model = copy.deepcopy(plain)
    handle = memopt.apply(model, [PASS, *others])
    return model, plain, handle


def x(seed=1):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    model.zero_grad()
    result = model(x())
    loss = result.square().sum() if isinstance(result, torch.Tensor) else sum(r.square().sum() for r in result)
    loss.backward()
    return [loss.detach(), *(torch.tensor(-1) if p.grad is None else p.grad.clone() for p in model.parameters())]


def left_in_no_grad(s, x):
    f, h = s.b(x), s.a(x)
    pooled = F.avg_pool2d(h, 1)
    with torch.no_grad():
        mean = f.mean() + s.e(x).mean()
    return s.c(s.mid(pooled)) + h + f * mean


def changed_by_a_view(s, x):
    h = s.a(x)
    view = h.detach()[:, 1:]
    k = s.d(h + 0)
    g = s.mid(s.e(k))
    with torch.no_grad():
        view.mul_(3)
    return s.c(g) * h.detach() + k


def base_changed_in_place(s, x):
    h = s.a(x)
    f = nn.Flatten()(h)
    h = F.relu(h, inplace=True)
    return s.c(s.mid(h)).flatten(1) + f * 2


def held_while_used(s, x):
    h = s.d(s.a(x))
    t = h.contiguous()
    k = s.mid(s.b(h))
    y = t.sin() * 3 + t.cos() * 20 + t * t * 0.7
    del t
    g = s.mid(s.e(k + y))
    return s.c(g) + h.tanh() * 0.1 + h * h * 0.3


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def without_a_gradient(s, x):
    h = s.a(x)
    k = s.d(h.detach())
    return NoGradient.apply(s.c(s.mid(k)), h)


def in_place_after_the_return(s, x):
    skips = [s.a(x), s.b(x)]
    g = s.c(s.mid(s.d(skips[0] + skips[1])))
    skips[0] += g
    nn.ReLU(inplace=True)(skips[1])
    return skips[0] * skips[1]


def shape_changed_in_place(s, x):
    h = s.a(x)
    g = s.mid(s.d(h + 0))
    h.unsqueeze_(1)
    assert h.shape == (2, 1, 4, 8, 8)
    assert h.requires_grad == torch.is_grad_enabled()
    return s.c(g).unsqueeze(1) * h


def read_in_inference_mode(s, x):
    h = s.a(x)
    g = s.mid(s.d(h + 0))
    with torch.inference_mode():
        mean = float(h.sum())
    return s.c(g) * h + mean


def passed_through(s, x):
    h = s.a(x)
    skips = [h]
    h = nn.Identity()(h.contiguous().float())
    return s.c(s.mid(s.d(h))) + skips.pop()


def looked_at(s, x):
    h = s.a(x)
    skips = [h]
    k = s.d(h + 0)
    assert not h.is_cuda
    assert h.is_contiguous()
    assert h.is_floating_point()
    assert h.stride() == (256, 64, 8, 1)
    return s.c(s.mid(k)) + skips.pop()


def vmapped(s, x):
    h = s.a(x)
    batched = torch.vmap(lambda one: s.b(one[None])[0])(x)
    return s.c(s.mid(s.d(h + batched))) + h


WAYS = [
    left_in_no_grad,
    changed_by_a_view,
    base_changed_in_place,
    held_while_used,
    without_a_gradient,
    in_place_after_the_return,
    shape_changed_in_place,
    read_in_inference_mode,
    passed_through,
    looked_at,
    vmapped,
]


@pytest.mark.parametrize("others", [[], [OffloadActivations(min_bytes=1)]], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_same_bits(way, others):
    model, plain, _ = pair(way, *others)
    for _ in range(3):
        assert_equal(gradients(model), gradients(plain))
    if way is not read_in_inference_mode:
        for m in (model, plain):
            m.eval()
        for _ in range(3):
            with torch.no_grad():
                assert torch.equal(model(x()), plain(x()))


@pytest.mark.parametrize("way", [passed_through, looked_at], ids=lambda way: way.__name__)
def test_what_is_only_looked_at_leaves(way):
    totals = []
    for passes in ([], [PASS]):
        torch.manual_seed(0)
        model = Parts(way).eval()
        memopt.apply(model, passes)
        with torch.no_grad(), Ledger() as ledger:
            model(x())
            model.mid[3].register_forward_pre_hook(lambda *_: totals.append(ledger.total))
            model(x())
    assert totals[0] - totals[1] == SIZE


def test_features_that_somebody_keeps_stay_ancestors_of_the_result():
    def returned(s, x):
        h = s.d(s.a(x) * 1)
        k = s.b(h + 1)
        return s.c(s.mid(s.e(k))) + k + h.mean(), h

    def kept(s, x):
        s.feature = h = s.d(s.a(x) * 1)
        k = s.b(h + 1)
        return s.c(s.mid(s.e(k))) + k + h.mean(), s.feature

    def hooked(s, x):
        h = s.d(s.a(x) * 1)
        h.register_hook(lambda grad: 2 * grad)
        k = s.b(h + 1)
        return s.c(s.mid(s.e(k))) + h, k

    for way in (returned, kept, hooked):
        model, plain, _ = pair(way)
        for _ in range(3):
            found = []
            for m in (model, plain):
                result, feature = m(x())
                assert isinstance(feature, torch.Tensor)
                m.zero_grad()
                found.append([*torch.autograd.grad(result.square().sum(), [feature, m.a.weight], allow_unused=True)])
            assert_equal([g for g in found[0] if g is not None], [g for g in found[1] if g is not None])


def test_a_hook_that_comes_too_late_is_refused():
    def late(s, x):
        h = s.a(x)
        g = s.c(s.mid(s.d(h + 0)))
        if s.hooks:
            h.register_hook(lambda grad: grad)
        return g + h

    model, _, _ = pair(late)
    model.hooks = False
    gradients(model)
    model.hooks = True
    with pytest.raises(memopt.MemoptError, match=r"register_hook comes too late for a skip connection \(of a\)"):
        gradients(model)
    model.hooks = False
    gradients(model)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_forward_mode_derivatives():
    def way(s, x):
        h = s.a(x)
        return s.c(s.mid(s.d(h + 0))) + h

    model, plain, _ = pair(way)
    gradients(model)
    found = []
    for m in (model, plain):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(m(forward_ad.make_dual(x(), x(2)))).tangent)
    assert_equal(found[:1], found[1:])


def test_the_fast_path_of_torchs_transformer_stays():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plain = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 3), nn.Linear(8, 8)).eval()
    model = copy.deepcopy(plain)
    memopt.apply(model, [OffloadSkips(min_bytes=1, waits=1)])
    tokens = torch.randn(2, 5, 8)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(model(tokens), plain(tokens))


def test_a_modules_own_list_stays_its_own():
    class Store(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.kept = nn.Conv2d(4, 4, 1), []

        def forward(self, x):
            self.kept.append(self.conv(x))
            return self.kept

    class Uses(Parts):
        def __init__(self):
            super().__init__(None)
            self.store = Store()

        def forward(self, x):
            kept = self.store(x)
            h = self.mid(self.a(kept[0] + 0))
            kept.append(h)
            assert len(self.store.kept) == 2
            result = h + kept[0]
            self.store.kept.clear()
            return result

    torch.manual_seed(0)
    plain = Uses()
    model = copy.deepcopy(plain)
    memopt.apply(model, [PASS])
    for _ in range(3):
        assert_equal(gradients(model), gradients(plain))


@pytest.mark.filterwarnings("ignore")
def test_scripted_and_nested_and_global_hooks():
    def way(s, x):
        h = s.a(x)
        return s.c(s.mid(s.d(h + 0))) + h

    torch.manual_seed(0)
    plain = Parts(way)
    plain.e = torch.jit.script(nn.Conv2d(4, 4, 1))
    model = copy.deepcopy(plain)
    handle = memopt.apply(model, [PASS])
    for _ in range(2):
        assert_equal(gradients(model), gradients(plain))
    handle.undo()
    assert not any(m._forward_hooks for m in model.modules() if not isinstance(m, torch.jit.ScriptModule))

    counts = []
    for passes in ([], [PASS]):
        calls = []
        model, _, handle = pair(way)
        handle.undo()
        memopt.apply(model, passes)
        gradients(model)
        hook = nn.modules.module.register_module_full_backward_hook(lambda *_: calls.append(1))  # noqa: B023
        gradients(model)
        hook.remove()
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_hooks_on_saved_tensors_that_are_forbidden():
    def way(s, x):
        h = s.a(x)
        return s.c(s.mid(s.d(h + 0))) + h

    for pass_ in (PASS, OffloadActivations(min_bytes=1)):
        model, plain, handle = pair(way)
        handle.undo()
        memopt.apply(model, [pass_])
        with torch.autograd.graph.disable_saved_tensors_hooks("no"):
            assert_equal(gradients(model), gradients(plain))


def test_larger_inputs_are_watched_anew():
    def way(s, x):
        h = s.a(x)
        return s.c(s.mid(s.d(h + 0))) + h

    torch.manual_seed(0)
    model = Parts(way)
    handle = memopt.apply(model, [OffloadSkips(min_bytes=1000, waits=2)])
    with torch.no_grad():
        for size, found in ((2, 0), (16, 1), (16, 1), (2, 1)):
            model(torch.randn(1, 4, size, size))
            assert handle.report().rows[0].counts["skip connections found"] == found
    assert handle.report().rows[0].counts["storages moved out"] == 1
