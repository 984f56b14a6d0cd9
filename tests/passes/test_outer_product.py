"""The conditional outer product against the dense model: exact, found wherever it is, and smaller.

The algebra itself is tested in tests/test_deferred.py.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import memopt
from examples.hae_v2.blocks import AttentionBlock
from memopt import InputError, NothingToDo
from memopt.passes import AMP, Checkpoint, FusedAttention, OuterProduct
from tests.test_hae_model import make
from tests.zoo import ZOO, differences, fingerprint

F64 = torch.float64
MODES = ("rank_one", "sparse", "dense")
ROWS = {"conditional": (), "one dropped": (1,), "null": (0, 1, 2)}


def hae(dtype=F64, **changes):
    """A small HAE V2 with random weights everywhere, biases too."""
    return make(**changes).to(dtype)


def batch(null=(1,), n=3, dtype=F64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 2, 16, 16, generator=generator, dtype=F64).to(dtype).requires_grad_()
    rows = torch.tensor([i in null for i in range(n)])
    return (x, torch.arange(n) * 300 + 5, torch.arange(n) % 3), {"null": rows, "clf_free": True}


def results(model, inputs, train=True):
    """The output, and the gradients of everything, by name."""
    args, kwargs = inputs
    model.train(train).zero_grad(set_to_none=True)
    args[0].grad = None
    torch.manual_seed(0)
    output = model(*args, **kwargs)
    output.to(F64).square().mean().backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {"output": output.detach(), "x": args[0].grad.clone(), **grads}


def errors(found, expected):
    """Relative to each tensor's largest entry, or to a thousandth of all gradients' where it is mathematically zero."""
    assert found.keys() == expected.keys()
    assert {k for k, v in found.items() if v is None} == {k for k, v in expected.items() if v is None}
    size = max(float(v.abs().max()) for k, v in expected.items() if v is not None and k != "output")
    return {
        k: float((found[k] - v).abs().max()) / max(float(v.abs().max()), 1e-3 * size)
        for k, v in expected.items()
        if v is not None
    }


def worst(found, expected):
    return max(errors(found, expected).values())


def rms(found, expected):
    return sum(e * e for e in errors(found, expected).values()) ** 0.5


# Exact.

CONFIGS = {
    "plain": {},
    "new order": {"use_new_attention_order": True},
    "one head": {"num_heads": 1},
    "eight heads": {"num_heads": 8, "use_new_attention_order": True},
    "narrow heads": {"num_head_channels": 16, "use_scale_shift_norm": True},
    "every level": {"attention_resolutions": [1, 2], "resblock_updown": True},
    "use_checkpoint": {"use_checkpoint": True},
    "never dropped": {"clf_free": False},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("null", ROWS)
def test_exact_on_the_whole_model(config, null):
    model = hae(**CONFIGS[config])
    inputs = batch(ROWS[null])
    if config == "never dropped":
        inputs = (inputs[0], {})
    expected = results(model, inputs)
    for mode in MODES:
        handle = memopt.apply(model, [OuterProduct(mode=mode)])
        found = results(model, inputs)
        if mode == "dense":
            assert all(torch.equal(found[k], v) for k, v in expected.items())
        assert worst(found, expected) < 1e-10
        if mode == "rank_one":
            counts = handle.report().rows[0].counts
            assert counts.pop("products not made") == 1
            assert set(counts) == {"linear maps by rank one", "attentions by rank one"}
            assert counts["attentions by rank one"] == counts["linear maps by rank one"] > 0
        handle.undo()


@pytest.mark.parametrize("passes", [[Checkpoint()], [FusedAttention()], [FusedAttention(), Checkpoint()]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_exact_together_with_other_passes(mode, passes):
    model, inputs = hae(), batch()
    expected = results(model, inputs)
    before = fingerprint(model)
    handle = memopt.apply(model, [OuterProduct(mode=mode), *passes])
    for _ in range(2):  # the first call of a checkpointed block is special
        assert worst(results(model, inputs), expected) < 1e-10
    handle.undo()
    model.zero_grad()
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("mode", MODES)
def test_exact_in_eval_and_with_dropout(mode):
    model, inputs = hae(dropout=0.2), batch()
    expected = [results(model, inputs, train) for train in (True, False)]
    with torch.no_grad():
        silent = model(*inputs[0], **inputs[1])
    memopt.apply(model, [OuterProduct(mode=mode)])
    for train in (True, False):
        assert worst(results(model, inputs, train), expected[not train]) < 1e-10
    with torch.no_grad():
        assert (model(*inputs[0], **inputs[1]) - silent).abs().max() < 1e-10
    with torch.inference_mode():
        assert (model(*inputs[0], **inputs[1]) - silent).abs().max() < 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "null"), [(1, ()), (1, (0,)), (2, ()), (4, (1, 2)), (4, (0, 1, 2, 3))])
def test_every_gradient_is_there_at_any_share_of_zero_rows(mode, n, null):
    model, inputs = hae(), batch(null, n)
    expected = results(model, inputs)
    assert not [name for name, grad in expected.items() if grad is None]
    memopt.apply(model, [OuterProduct(mode=mode)])
    assert worst(results(model, inputs), expected) < 1e-10  # compares which are None, too


@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("null", ROWS)
@pytest.mark.parametrize("mode", ["rank_one", "sparse"])
def test_as_accurate_as_dense_in_low_precision(mode, null, how):
    truth = hae()
    expected = results(truth, batch(ROWS[null]))
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    inputs, model = batch(ROWS[null], dtype=dtype), copy.deepcopy(truth).to(dtype)
    if how == "autocast":
        memopt.apply(model, [AMP()])
    dense = results(model, inputs)
    memopt.apply(model, [OuterProduct(mode=mode)])
    found = results(model, inputs)
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in dense.items()}
    assert rms(found, expected) <= 2 * rms(dense, expected)


def test_a_threshold_drops_what_is_below_it():
    model, inputs = hae(clf_free=False), (batch()[0], {})
    condition = model.label_emb.weight
    with torch.no_grad():
        condition[1] *= 1e-2
    expected = results(model, inputs)
    handle = memopt.apply(model, [OuterProduct(mode="sparse")])
    assert worst(results(model, inputs), expected) < 1e-10  # the default drops nothing
    handle.undo()
    memopt.apply(model, [OuterProduct(mode="sparse", zero_threshold=0.1)])
    assert 1e-10 < (results(model, inputs)["output"] - expected["output"]).abs().max() < 1e-2


# Smaller.


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made, and the operations that look at values."""

    def __init__(self):
        super().__init__()
        self.seen, self.looks = set(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "unique"):
            self.looks[func] += 1
        self.seen |= {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


def test_nothing_large_is_ever_made():
    """D = 128, 64 tokens, 4 heads of 16: no storage of D x D, T x (T + D), or of the extra tokens' keys and values."""
    model, inputs = hae(torch.float32), batch(dtype=torch.float32)
    with Shapes() as dense:
        results(model, inputs)
    memopt.apply(model, [OuterProduct()])
    with Shapes() as less:
        results(model, inputs)
    large = {(3, 128, 128), (12, 64, 192), (12, 16, 128), (12, 16, 192)}
    assert large <= dense.seen
    assert not large & less.seen


def test_the_device_is_never_waited_for():
    """But in the mode that counts rows, once; and for ``check_finite``."""
    model, inputs = hae(torch.float32), batch(dtype=torch.float32)
    with Shapes() as dense:
        results(model, inputs)
    for given, more in (({}, 0), ({"mode": "sparse"}, 1), ({"check_finite": True}, 1)):
        with memopt.apply(model, [OuterProduct(**given)]), Shapes() as found:
            results(model, inputs)
        assert found.looks.total() == dense.looks.total() + more


@pytest.mark.parametrize("passes", [["outer_product"], ["outer_product", "fused_attention", "checkpoint"]])
def test_profiles_on_fake_and_true_tensors_agree(passes):
    model, (args, kwargs) = hae(torch.float32), batch(dtype=torch.float32)
    inputs = (tuple(a.detach() for a in args), kwargs)
    plain = memopt.profile(model, inputs)
    fake, real = (memopt.profile(model, inputs, passes=passes, real=real) for real in (False, True))
    assert (fake.peak, fake.kept) == (real.peak, real.kept)
    assert fake.kept < plain.kept
    assert fake.peak < plain.peak
    weights = 4 * 12 * 64 * (64 + 128)
    assert max(t.bytes for t in plain.largest) == weights
    assert max(t.bytes for t in fake.largest) < weights


class Level(nn.Module):
    """One attention block of the full model, with the product made beside it."""

    def __init__(self, channels):
        super().__init__()
        self.block = AttentionBlock(channels, 4, 512)

    def forward(self, x, c):
        return self.block(x, torch.einsum("ab,ac->abc", c, c))


@pytest.mark.parametrize(("channels", "side", "share"), [(256, 32, 0.25), (512, 8, 0.5)])
def test_peak_of_an_attention_block(channels, side, share):
    model = Level(channels)
    inputs = (torch.empty(4, channels, side, side, requires_grad=True), torch.empty(4, 512, requires_grad=True))

    def above_start(report):
        return report.peak - sum(report.start_by_category.values())

    dense, less = (memopt.profile(model, inputs, passes=passes) for passes in ([], ["outer_product"]))
    assert above_start(less) <= share * above_start(dense)


# Refused, reported, undone.


def test_options_are_checked():
    with pytest.raises(InputError, match="mode 'fast' is not one of rank_one, sparse, dense"):
        OuterProduct(mode="fast")
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="zero_threshold must be at least 0"):
            OuterProduct(mode="sparse", zero_threshold=value)


@pytest.mark.parametrize("name", ["unet2d_condition", "dit", "gpt2", "vit", "guided_unet", "tied_weights", "nested_io"])
def test_models_without_the_pattern(name):
    model = ZOO[name].build()
    before = fingerprint(model)
    with pytest.raises(NothingToDo, match=r"outer_product: found nothing to do. It needs a product of each row of a"):
        memopt.apply(model, ["outer_product"])
    assert differences(before, fingerprint(model)) == []


def test_undo_copy_keys_and_report():
    model, inputs = hae(), batch()
    before, keys = fingerprint(model), list(model.state_dict())
    handle = memopt.apply(model, ["outer_product", "fused_attention"])
    assert list(model.state_dict()) == keys
    expected = results(model, inputs)
    twin = copy.deepcopy(model)
    report = str(handle.report())
    assert "outer_product()  [exact to rounding]" in report
    assert "attentions by rank one: 4" in report
    handle.undo()
    model.zero_grad()
    assert differences(before, fingerprint(model)) == []
    found = results(twin, inputs)
    assert all(torch.equal(found[k], v) for k, v in expected.items())


# Compiled and exported.


def test_compile_without_a_break_for_several_batch_sizes():
    model = hae(channel_mult=(1,), attention_resolutions=[1])
    torch._dynamo.reset()
    expected = [results(model, batch(null, n)) for n, null in ((3, (1,)), (4, (0, 1)))]
    memopt.apply(model, ["outer_product", "fused_attention"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for (n, null), wanted in zip(((3, (1,)), (4, (0, 1))), expected, strict=True):
        args, kwargs = batch(null, n)
        model.zero_grad()
        output = compiled(*args, **kwargs)
        output.square().mean().backward()
        found = {"output": output.detach(), "x": args[0].grad} | {k: p.grad for k, p in model.named_parameters()}
        assert worst(found, wanted) < 1e-10


def test_export():
    model, (args, kwargs) = hae().eval(), batch()
    args = tuple(a.detach() for a in args)
    expected = model(*args, **kwargs)
    memopt.apply(model, ["outer_product", "fused_attention"])
    program = torch.export.export(model, args, kwargs, strict=False)
    assert (program.module()(*args, **kwargs) - expected).abs().max() < 1e-10
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("rank_one_query" in target for target in targets) == 4
    assert not [target for target in targets if "softmax" in target]
