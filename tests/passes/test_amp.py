import pytest
import torch
from torch import nn

import memopt
from memopt import NothingToDo
from memopt.passes import AMP, Checkpoint
from tests.zoo import guided


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x)
        self.seen = y.dtype
        return {"out": y, "ids": torch.arange(3), "pair": (y.double(), y)}


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_inside_half_outside_float32(name, dtype):
    model = Net()
    memopt.apply(model, [AMP(dtype=name)])
    out = model(torch.randn(2, 8))
    assert model.seen == dtype
    assert out["out"].dtype == torch.float32
    assert out["ids"].dtype == torch.int64
    assert [t.dtype for t in out["pair"]] == [torch.float64, torch.float32]
    assert not torch.is_autocast_enabled("cpu")


def test_output_can_stay_half():
    model = Net()
    memopt.apply(model, [AMP(float32_output=False)])
    assert model(torch.randn(2, 8))["out"].dtype == torch.bfloat16


def test_gradients_are_float32():
    model = Net()
    memopt.apply(model, [AMP()])
    model(torch.randn(2, 8))["out"].sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_only_fp16_has_a_scaler_and_the_report_says_so():
    handle = memopt.apply(Net(), [AMP(dtype="fp16")])
    assert isinstance(handle.scaler, torch.amp.GradScaler)
    assert "the loop must use handle.scaler" in str(handle.report())
    assert memopt.apply(Net(), [AMP()]).scaler is None


def test_the_scaler_keeps_tiny_gradients_that_fp16_alone_loses():
    def gradient(scale):
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        nn.init.constant_(model[0].weight, 0.1)
        nn.init.constant_(model[1].weight, 1e-3)
        handle = memopt.apply(model, [AMP(dtype="fp16")])
        loss = model(torch.ones(1, 8)).sum() * 1e-6
        if scale:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            handle.scaler.scale(loss).backward()
            handle.scaler.unscale_(optimizer)
        else:
            loss.backward()
        return model[0].weight.grad

    torch.testing.assert_close(gradient(True), torch.full((8, 8), 8e-9), rtol=0.02, atol=0)
    assert not torch.allclose(gradient(False), torch.full((8, 8), 8e-9), rtol=0.02, atol=0)


def test_a_model_without_float32_weights_is_refused():
    with pytest.raises(NothingToDo, match=r"amp: .* It needs floating-point parameters in float32"):
        memopt.apply(Net().bfloat16(), [AMP()])


@pytest.mark.parametrize("order", [[AMP(), Checkpoint()], [Checkpoint(), AMP()]], ids=["amp first", "amp last"])
def test_with_checkpoint_over_a_legacy_model(order):
    """Both rewrite the forward that calls the legacy function; in either order it ends as a plain call."""
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])

    def grads(passes):
        torch.manual_seed(0)
        model = guided.UNetModel(dropout=0.2)
        memopt.apply(model, passes)
        torch.manual_seed(1)
        model(x, t, y=y).square().mean().backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(grads([AMP(), Checkpoint()]), grads(order), strict=True):
        assert torch.equal(a, b)


def test_a_legacy_function_recomputes_in_autocast():
    model = guided.UNetModel(dropout=0.0)
    handle = memopt.apply(model, [AMP()])
    assert "its own checkpoint function now recomputes in bf16 too" in str(handle.report())
    model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), y=torch.tensor([0, 1])).sum().backward()
