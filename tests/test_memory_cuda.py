"""The fake profile of CUDA: bytes against sums by hand, and nothing left behind."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
import torch.optim.optimizer as optimizers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from memopt import memory
from memopt.errors import InputError, MemoptError
from memopt.memory import cuda, cuda_attention, cuda_autocast
from memopt.passes.amp import AMP
from tests.zoo import ZOO

B, H, S, D = 2, 3, 40, 16
HEADS = B * H * S * D  # elements of a query
SEEDS = 16 + 8  # FlashAttention's, on the device


class Calls(nn.Module):
    """A model without parameters that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def kept(function, *inputs, device="cuda"):
    return memory.profile(Calls(function), inputs, device=device, rounding=1).kept


def heads(*shape, dtype=torch.float16, grad=True):
    return torch.zeros(*shape, dtype=dtype, requires_grad=grad)


def qkv(dtype=torch.float16, s=S, d=D, grad=True):
    return [heads(B, H, s, d, dtype=dtype, grad=grad) for _ in range(3)]


@contextlib.contextmanager
def as_cuda():
    with FakeTensorMode(allow_non_fake_inputs=True), cuda.kernels() as notes:
        yield notes


# --- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_keeps_its_inputs_output_and_sums(dtype, dropout, causal):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)

    assert kept(attend, *qkv(dtype)) == 4 * HEADS * 2 + B * H * S * 4 + SEEDS


def test_float32_takes_the_memory_efficient_kernel():
    assert kept(F.scaled_dot_product_attention, *qkv(torch.float32)) == 4 * HEADS * 4 + B * H * 64 * 4


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2), (torch.float32, 4)])
def test_masks_are_kept_once_in_the_type_of_the_query(dtype, size):
    plain = 4 * HEADS * size + B * H * 64 * 4
    every = qkv(dtype)
    assert kept(F.scaled_dot_product_attention, *every, torch.zeros(S, S, dtype=dtype)) == plain + S * S * size
    assert kept(F.scaled_dot_product_attention, *every, torch.ones(S, S, dtype=torch.bool)) == plain + S * S * size
    bias = torch.zeros(B, 1, S, S, dtype=dtype, requires_grad=True)
    assert kept(F.scaled_dot_product_attention, *every, bias) == plain + B * S * S * size


def test_masks_that_are_not_aligned_are_padded():
    s = 41
    expected = 4 * B * H * s * D * 4 + B * H * 64 * 4 + s * 48 * 4
    assert kept(F.scaled_dot_product_attention, *qkv(torch.float32, s), torch.zeros(s, s)) == expected


def test_flash_pads_the_size_of_heads():
    assert kept(F.scaled_dot_product_attention, *qkv(d=12)) == 4 * HEADS * 2 + B * H * S * 4 + SEEDS


def test_grouped_queries():
    q, k, v = heads(B, 6, S, D), heads(B, 2, S, D), heads(B, 2, S, D)
    per_head = B * S * D * 2
    expected = (6 + 2 + 2 + 6) * per_head + B * 6 * S * 4 + SEEDS
    assert kept(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, k, v) == expected


def test_what_no_fused_kernel_takes_keeps_the_scores():
    scores = B * H * S * S * 8
    double = kept(F.scaled_dot_product_attention, *qkv(torch.float64))
    assert double == 3 * HEADS * 8 + scores  # scaled query and key, value
    with sdpa_kernel([SDPBackend.MATH]):
        assert kept(F.scaled_dot_product_attention, *qkv()) > B * H * S * S * 4


def test_the_choice_of_the_user_holds():
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        assert kept(F.scaled_dot_product_attention, *qkv()) == 4 * HEADS * 2 + B * H * 64 * 4
    order = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(order, set_priority=True):
        assert kept(F.scaled_dot_product_attention, *qkv()) == 4 * HEADS * 2 + B * H * 64 * 4
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        assert kept(F.scaled_dot_product_attention, *qkv()) == 4 * HEADS * 2 + B * H * S * 4 + 16
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), pytest.raises(InputError, match="No available kernel"):
        kept(F.scaled_dot_product_attention, *qkv(torch.float32))


@pytest.mark.parametrize(
    ("chosen", "q", "k", "options"),
    [
        ("FLASH_ATTENTION", (2, 3, 8, 256), (2, 3, 8, 256), {}),
        ("EFFICIENT_ATTENTION", (2, 3, 8, 264), (2, 3, 8, 264), {}),
        ("EFFICIENT_ATTENTION", (2, 3, 8, 16), (2, 3, 9, 16), {"is_causal": True}),
        ("FLASH_ATTENTION", (2, 3, 8, 16), (2, 3, 9, 16), {}),
        ("MATH", (2, 3, 8, 16), (2, 1, 8, 16), {}),
        ("MATH", (3, 8, 16), (3, 8, 16), {}),
        ("MATH", (2, 3, 8, 12), (2, 3, 8, 12), {"mask": True}),
        ("MATH", (2, 4, 8, 16), (2, 2, 8, 16), {"mask": True, "enable_gqa": True}),
    ],
)
def test_which_kernel(chosen, q, k, options):
    options = {"is_causal": False, "enable_gqa": False, **options}
    mask = torch.zeros(8, 8, dtype=torch.float16) if options.pop("mask", False) else None
    every = [torch.zeros(shape, dtype=torch.float16) for shape in (q, k, k)]
    assert cuda_attention.choice(*every, mask, **options).name == chosen


def test_attention_in_inference_keeps_no_sums():
    q, k, v = qkv(torch.float32, grad=False)
    report = memory.profile(Calls(F.scaled_dot_product_attention), (q, k, v), train=False, device="cuda", rounding=1)
    assert report.peak == 4 * HEADS * 4
    assert report.kept == 0


def test_attention_is_named_among_the_assumptions_and_in_the_report():
    report = memory.profile(Calls(F.scaled_dot_product_attention), tuple(qkv()), device="cuda")
    assert cuda.ATTENTION in report.assumptions
    assert {t.category for t in report.largest if "flash_attention" in t.op and t.phase == "forward"} == {"activations"}
    assert cuda.ATTENTION not in memory.profile(nn.Linear(2, 2), torch.zeros(2, 2), device="cuda").assumptions
    assert all(len(text) < 160 for text in report.assumptions)


@pytest.mark.parametrize("train", [True, False])
def test_attention_modules(train):
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False
    )
    report = memory.profile(model, torch.zeros(2, 8, 16), train=train, device="cuda")
    assert (cuda.FAST_PATH in report.assumptions) is not train
    assert cuda.ATTENTION in report.assumptions


def test_wrong_arguments_raise_what_torch_raises():
    q, k, _ = qkv()
    with pytest.raises(InputError, match="same dtype"):
        kept(F.scaled_dot_product_attention, q, k, k.detach().float())


# --- other operators -----------------------------------------------------------------------------------------------


def test_dropout_keeps_a_byte_per_element():
    x = torch.zeros(30, 10, requires_grad=True)
    assert kept(lambda x: F.dropout(x, 0.3), x) == 300
    assert kept(lambda x: F.dropout(x, 0.3), x, device="cpu") == 300 * 4
    assert kept(lambda x: F.dropout(x, 0.3), x.detach().bfloat16().requires_grad_()) == 300
    assert kept(lambda x: F.dropout(x, 0.0), x) == kept(lambda x: F.dropout(x, 0.3, training=False), x) == 0


@pytest.mark.parametrize("dropout", [F.alpha_dropout, F.feature_alpha_dropout, F.dropout2d])
def test_other_dropouts_are_the_same_on_both(dropout):
    x = torch.zeros(4, 6, 3, 3, requires_grad=True)
    both = {kept(lambda x: dropout(x, 0.5, training=True), x, device=device) for device in ("cpu", "cuda")}
    assert len(both) == 1


def test_softmax_of_float16_into_float32_makes_no_copy():
    x = torch.zeros(8, 32, dtype=torch.float16)
    report = memory.profile(
        Calls(lambda x: x.softmax(-1, dtype=torch.float32)), x, train=False, device="cuda", rounding=1
    )
    assert report.peak == 8 * 32 * (2 + 4)
    x = x.bfloat16()
    report = memory.profile(
        Calls(lambda x: x.softmax(-1, dtype=torch.float32)), x, train=False, device="cuda", rounding=1
    )
    assert report.peak == 8 * 32 * (2 + 4 + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_fused(dtype):
    if len(torch.ops.aten._fused_rms_norm.default._schema.returns) != 2:
        pytest.skip("not in this torch")
    x = torch.zeros(6, 32, dtype=dtype, requires_grad=True)
    report = memory.profile(nn.RMSNorm(32, dtype=dtype), x, device="cuda", rounding=1)
    assert report.kept == 6 * 32 * dtype.itemsize + 6 * 4


def test_norms_keep_float32_statistics():
    x = torch.zeros(6, 32, dtype=torch.bfloat16)
    assert memory.profile(nn.LayerNorm(32).bfloat16(), x, device="cuda", rounding=1).kept == 6 * 32 * 2 + 2 * 6 * 4
    assert memory.profile(nn.BatchNorm1d(32).bfloat16(), x, device="cuda", rounding=1).kept == 6 * 32 * 2 + 2 * 32 * 4


def test_group_norm_makes_channels_last_contiguous():
    contiguous = []

    def norm(x):
        y = F.group_norm(x, 2)
        contiguous.append(y.is_contiguous())
        return y

    def run(x, device="cuda"):
        inference = memory.profile(Calls(norm), x, train=False, device=device, rounding=1)
        assert set(contiguous) == {device == "cuda" or x.is_contiguous()}
        contiguous.clear()
        return inference.peak, kept(lambda x: F.group_norm(x.relu(), 2), x.clone().requires_grad_(), device=device)

    n, statistics = 2 * 4 * 6 * 5 * 4, 2 * 2 * 2 * 4
    x = torch.zeros(2, 4, 6, 5)
    nhwc = x.to(memory_format=torch.channels_last)
    assert run(x) == run(nhwc, "cpu") == (2 * n + statistics, n + statistics)
    assert run(nhwc) == (3 * n + statistics, 2 * n + statistics)  # relu keeps its result, the norm the copy of it


def test_group_norm_under_autocast_copies_after_the_conversion():
    x = torch.zeros(2, 4, 6, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    def run(x):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return F.group_norm(x, 2)

    n, statistics = 2 * 4 * 6 * 5, 2 * 2 * 2 * 4
    report = memory.profile(Calls(run), x, train=False, device="cuda", rounding=1)
    assert report.peak == n * 2 + n * 4 + n * 4 + n * 4 + statistics


def test_logsigmoid_keeps_its_input_alone():
    x = torch.zeros(3, 50, requires_grad=True)
    n = 3 * 50 * 4
    assert kept(F.logsigmoid, x) == n
    assert kept(F.logsigmoid, x, device="cpu") == 2 * n
    report = memory.profile(Calls(F.logsigmoid), x.detach(), train=False, device="cuda", rounding=1)
    assert report.peak == 2 * n


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_keeps_positions(mode, index):
    bags, words, width = 3, 12, 8
    model = nn.EmbeddingBag(10, width, mode=mode)
    inputs = torch.zeros(words, dtype=index), torch.zeros(bags, dtype=index)
    # Of the kernel's: the bag of each word, the size of each bag, the word of each maximum. The inputs are kept too.
    expected = words + bags + (words + bags) + (bags * width if mode == "max" else 0)
    assert memory.profile(model, inputs, device="cuda", rounding=1).kept == expected * index.itemsize
    memory.profile(model, inputs, train=False, device="cuda")


def test_max_pool1d_makes_indices():
    x = torch.zeros(2, 3, 32)
    report = memory.profile(nn.MaxPool1d(2), x, train=False, device="cuda", rounding=1)
    assert report.peak == 2 * 3 * (32 * 4 + 16 * 4 + 16 * 8)


def test_rnns_are_named():
    class Sums(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    assert cuda.RNN in memory.profile(Sums(4, 4), torch.zeros(3, 2, 4), device="cuda").assumptions


# --- optimizers ----------------------------------------------------------------------------------------------------


def trained(optimizer, device="cuda", layers=4, **options):
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(layers)])
    x = torch.zeros(1, 64)
    report = memory.profile(model, x, optimizer=optimizer(model.parameters(), **options), device=device, rounding=1)
    return report, 64 * 64 * 4, x.nbytes


def test_optimizers_take_all_parameters_at_once():
    report, one, x = trained(torch.optim.AdamW)
    assert report.peak_phase == "optimizer"
    assert report.peak == 4 * 5 * one + x  # weights, gradients, two states, and the roots of one of them
    assert report.start_by_category["optimizer_states"] == 4 * 2 * one  # the step counts are on the CPU
    assert cuda.FOREACH in report.assumptions
    report, _, _ = trained(torch.optim.AdamW, device="cpu")
    assert report.peak == 4 * 4 * one + 3 * one + x + 4 * 4


def test_settings_of_the_optimizer_hold():
    report, one, x = trained(torch.optim.AdamW, foreach=False)
    assert report.peak == 4 * 4 * one + 3 * one + x
    assert cuda.FOREACH not in report.assumptions
    report, one, x = trained(torch.optim.AdamW, lr=torch.tensor(1e-3))  # for which AdamW does not use foreach
    assert 4 * 4 * one + 3 * one + x <= report.peak < 4 * 5 * one
    report, one, _ = trained(torch.optim.AdamW, fused=True)
    assert report.start_by_category["optimizer_states"] == 4 * 2 * one + 4 * 4


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "RAdam", "ASGD"])
def test_all_optimizers_run(name):
    report, one, _ = trained(getattr(torch.optim, name))
    assert report.peak >= 4 * 2 * one


def test_clipping_takes_all_gradients_at_once():
    with as_cuda():
        names = []

        class Log(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(func._schema.name)
                return func(*args, **(kwargs or {}))

        model = nn.Linear(4, 4)
        model(torch.zeros(2, 4)).sum().backward()
        with Log():
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert "aten::_foreach_norm" in names
    assert "aten::_foreach_mul_" in names


# --- autocast ------------------------------------------------------------------------------------------------------


def low(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


PRECISION = {
    "group_norm": (lambda: F.group_norm(low(2, 4, 3), 2), torch.float32),
    "layer_norm": (lambda: F.layer_norm(low(2, 4), (4,)), torch.float32),
    "softmax": (lambda: low(2, 4).softmax(-1), torch.float32),
    "softmax with a type": (lambda: low(2, 4).softmax(-1, dtype=torch.bfloat16), torch.bfloat16),
    "log_softmax": (lambda: F.log_softmax(low(2, 4), -1), torch.float32),
    "exp": (lambda: low(2).exp(), torch.float32),
    "pow": (lambda: low(2) ** 2, torch.float32),
    "pow of a number": (lambda: 2 ** low(2), torch.float32),
    "sum": (lambda: low(2, 3).sum(1, keepdim=True), torch.float32),
    "sum of all": (lambda: low(2, 3).sum(), torch.float32),
    "prod": (lambda: low(2, 3).prod(1), torch.float32),
    "cumsum": (lambda: low(2, 3).cumsum(0), torch.float32),
    "norm": (lambda: low(2, 3).norm(), torch.float32),
    "norm of a dimension": (lambda: torch.ops.aten.norm.ScalarOpt_dim(low(2, 3), 2, [1], True), torch.float32),
    "norm of all": (lambda: torch.ops.aten.norm.Scalar(low(2, 3)), torch.float32),
    "interpolate": (lambda: F.interpolate(low(1, 1, 2, 2), scale_factor=2), torch.float32),
    "cross_entropy": (lambda: F.cross_entropy(low(2, 4), torch.zeros(2, dtype=torch.long)), torch.float32),
    "mse_loss": (lambda: F.mse_loss(low(2), low(2)), torch.float32),
    "linear": (lambda: F.linear(torch.zeros(2, 4), torch.zeros(3, 4)), torch.bfloat16),
    "conv2d, same": (lambda: F.conv2d(torch.zeros(1, 1, 4, 4), low(1, 1, 3, 3), padding="same"), torch.bfloat16),
    "einsum": (lambda: torch.einsum("ij,jk->ik", torch.zeros(2, 2), torch.zeros(2, 2)), torch.bfloat16),
    "mv": (lambda: torch.zeros(2, 2).mv(torch.zeros(2)), torch.bfloat16),
    "addcmul": (lambda: torch.addcmul(low(2), low(2), torch.zeros(2)), torch.float32),
    "addcmul, all low": (lambda: torch.addcmul(low(2), low(2), low(2)), torch.bfloat16),
    "index_put": (lambda: low(4).index_put((torch.tensor([1]),), torch.zeros(1)), torch.float32),
    "cat": (lambda: torch.cat([low(2), torch.zeros(2)]), torch.float32),
    "avg_pool3d": (lambda: F.avg_pool3d(low(1, 1, 2, 2, 2), 2), torch.bfloat16),
    "silu": (lambda: F.silu(low(2)), torch.bfloat16),
    "double": (lambda: torch.zeros(2, dtype=torch.float64).exp(), torch.float64),
    "sum of integers": (lambda: torch.ones(2, dtype=torch.int32).sum(), torch.int64),
}


@pytest.mark.parametrize("name", PRECISION)
def test_autocast_has_the_types_of_cuda(name):
    run, expected = PRECISION[name]
    with as_cuda(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert run().dtype == expected


def test_autocast_covers_what_torch_registers_for_cuda():
    lists = (cuda_autocast.FLOAT32, cuda_autocast.FLOAT32_RESULT, cuda_autocast.OTHER_OVERLOAD, cuda_autocast.WIDEST)
    lists += (cuda_autocast.LOW, cuda_autocast.BANNED, cuda_autocast.LEFT)
    names = [name for names in lists for name in names]
    assert len(names) == len(set(names))
    assert cuda_autocast.registered("AutocastCUDA") <= set(names)


def test_autocast_asked_for_cuda_holds_and_refuses_what_cuda_refuses():
    with as_cuda():
        with torch.autocast("cuda"):
            assert F.linear(torch.zeros(2, 4), torch.zeros(3, 4)).dtype == torch.float16  # CUDA's default
            with torch.autocast("cuda", enabled=False):
                assert F.linear(torch.zeros(2, 4), torch.zeros(3, 4)).dtype == torch.float32
            with pytest.raises(RuntimeError, match="binary_cross_entropy_with_logits"):
                F.binary_cross_entropy(torch.zeros(2), torch.zeros(2))
        assert F.linear(torch.zeros(2, 4), torch.zeros(3, 4)).dtype == torch.float32


def test_amp_keeps_what_autocast_keeps_on_cuda():
    rows, width = 6, 32
    n = rows * width
    model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))

    def bytes_of(device):
        return memory.profile(model, torch.zeros(rows, width), passes=[AMP()], device=device, rounding=1).kept

    # Both keep the input of the linear layer in bf16; the norm runs in float32 on CUDA, and keeps its input so.
    assert bytes_of("cuda") == n * 2 + n * 4 + 2 * rows * 4
    assert bytes_of("cpu") == n * 2 + n * 2 + 2 * rows * 4


def test_softmax_under_float16_autocast_keeps_its_result_alone():
    def run(x):
        with torch.autocast("cuda", dtype=torch.float16):
            return x.softmax(-1)

    x = torch.zeros(8, 32, dtype=torch.float16, requires_grad=True)
    assert kept(run, x) == 8 * 32 * 4


# --- on and off ----------------------------------------------------------------------------------------------------


def everything():
    """Results of true operations, and the tables of the dispatcher."""
    torch.manual_seed(3)
    x = torch.randn(2, 3, 8, 16, requires_grad=True)
    outputs = [F.dropout(x, 0.4), F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), x.half().softmax(-1)]
    outputs += [x.half().softmax(-1, dtype=torch.float32), F.rms_norm(x, (16,)), F.max_pool1d(x[0], 2)]
    with torch.autocast("cpu"):
        outputs += [F.group_norm(x.bfloat16(), 3), x.bfloat16().sum(), torch.einsum("bhsd,bhtd->bhst", x, x)]
        outputs += [
            F.binary_cross_entropy(x.sigmoid(), x.sigmoid().detach()),
            F.cross_entropy(x[0, 0], x[0, 0].detach()),
        ]
    sum(o.double().sum() for o in outputs).backward()
    keys = ("AutocastCPU", "AutogradCPU", "CPU")
    tables = [torch._C._dispatch_get_registrations_for_dispatch_key(key) for key in keys]
    names = ["dropout", "scaled_dot_product_attention", "softmax.int", "grid_sampler", "cat", "exp", "_fused_rms_norm"]
    tables = [sorted(t) for t in tables] + [torch._C._dispatch_dump(f"aten::{name}") for name in names]
    state = [torch.backends.mha.get_fastpath_enabled(), torch.get_autocast_dtype("cpu"), torch.autocast.__init__]
    state += [list(optimizers._foreach_supported_types), len(nn.modules.module._global_forward_pre_hooks)]
    state += [optimizers._get_foreach_kernels_supported_devices]
    state += [len(optimizers._global_optimizer_pre_hooks)]
    state += [len(optimizers._global_optimizer_post_hooks)]
    return [o.detach() for o in outputs] + [x.grad], [o.dtype for o in outputs], tables + state


def assert_same(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


def test_nothing_is_left_behind():
    before = everything()
    with as_cuda(), torch.autocast("cpu"):
        assert F.group_norm(low(2, 4), 2).dtype == torch.float32
    assert_same(before, everything())


def test_nothing_is_left_behind_after_an_exception():
    before = everything()
    with pytest.raises(ZeroDivisionError), as_cuda(), torch.autocast("cpu"):
        raise ZeroDivisionError
    assert_same(before, everything())
    with pytest.raises(InputError):
        memory.profile(nn.Linear(3, 3), torch.zeros(2, 4), device="cuda")
    assert_same(before, everything())


def test_it_nests():
    before = everything()
    x = torch.zeros(4, requires_grad=True)
    with as_cuda() as outer:
        with cuda.kernels() as inner:
            assert inner is outer
        y = F.dropout(x * 1, 0.5)
        assert "NativeDropout" in type(y.grad_fn).__name__
    assert_same(before, everything())


def test_real_tensors_stay_as_they_are_inside():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 16)
    expected = F.dropout(x, 0.5), F.scaled_dot_product_attention(x, x, x), F.rms_norm(x, (16,)), x.softmax(-1)
    torch.manual_seed(0)
    with cuda.kernels():
        x = torch.randn(2, 3, 8, 16)
        found = F.dropout(x, 0.5), F.scaled_dot_product_attention(x, x, x), F.rms_norm(x, (16,)), x.softmax(-1)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_model_and_its_optimizer_stay_as_they_are():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    memory.profile(model, torch.zeros(2, 3), optimizer=optimizer, device="cuda")
    assert repr(before) == repr((model.state_dict(), optimizer.state_dict()))
    assert optimizer.param_groups[0]["foreach"] is None


@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize("case", ZOO.values(), ids=str)
def test_every_model_of_the_zoo(case, train):
    if case.name == "data_dependent":
        with pytest.raises(MemoptError, match="needs the values"):
            memory.profile(case.build(), case.inputs(), train=train, device="cuda")
        return
    report = memory.profile(case.build(), case.inputs(), train=train, device="cuda")
    assert report.device == "cuda"
    assert report.peak % 512 == 0
    assert (report.kept > 0) is train
