"""Entry points without autograd: forward in eval mode, other methods always; results in host memory, one by one."""

import copy
import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt import InputError, NothingToDo, PassConflict
from memopt.passes import AMP, InferenceMode


@dataclass(frozen=True)
class Sample:
    image: Tensor
    steps: int
    more: dict


class Sampler(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.vae = nn.Sequential(nn.Linear(4, 8))
        self.seen = []

    def forward(self, x):
        self.seen.append(torch.is_grad_enabled())
        return self.layer(x).tanh()

    def sample(self, x, steps=2):
        for _ in range(steps):
            x = self(x)
        return Sample(x, steps, {"both": [x, x + 1]})

    def stream(self, x):
        self.seen.append(torch.is_grad_enabled())
        for _ in range(3):
            x = self(x)
            heard = yield x
            if heard:
                x = x + heard
        return "done"

    async def later(self, x):
        return self(x)

    async def each(self, x):
        yield self(x)

    @staticmethod
    def noise(x):
        return torch.randn_like(x)

    @classmethod
    def made(cls):
        return cls()

    @property
    def size(self):
        return self.layer.in_features


x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_forward_is_without_autograd_in_eval_mode_only():
    model = Sampler()
    trained = model(x)
    memopt.apply(model, [InferenceMode()])
    found = model(x)
    assert found.requires_grad
    assert torch.equal(found, trained)
    found.sum().backward()
    found = model.eval()(x)
    assert not found.requires_grad
    assert not found.is_inference()
    assert torch.equal(found, trained)
    assert model.seen == [True, True, False]
    assert model.train()(x).requires_grad


def test_named_methods_are_without_autograd_in_either_mode():
    model = Sampler()
    expected = model.sample(x)
    assert expected.image.requires_grad
    handle = memopt.apply(model, [InferenceMode(methods=("sample",))])
    found = model.sample(x, steps=2)
    assert type(found) is Sample
    assert torch.equal(found.image, expected.image)
    assert not found.image.requires_grad
    assert torch.is_grad_enabled()
    assert model.eval()(x).requires_grad  # forward was not named
    handle.undo()
    assert type(model) is Sampler
    assert model.sample(x).image.requires_grad


@pytest.mark.parametrize(("grad", "inference"), [("no_grad", False), ("inference", True)])
def test_both_ways_to_do_without_autograd(grad, inference):
    model = Sampler().eval()
    memopt.apply(model, [InferenceMode(grad=grad)])
    assert model(x).is_inference() is inference


def test_methods_of_modules_inside():
    model = Sampler().eval()
    memopt.apply(model, [InferenceMode(methods=("vae.forward",))])
    assert model(x).requires_grad
    assert not model.vae(x).requires_grad
    assert model.vae.train()(x).requires_grad


def kept(train_mode, passes):
    """Bytes that autograd keeps of a forward whose result is held."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))).train(train_mode)
    memopt.apply(model, passes)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(32, 16))
    return len({t.untyped_storage().data_ptr() for t in saved if t.shape[0] == 32}) * 32 * 16 * 4


def test_nothing_is_kept_for_backward():
    assert kept(False, []) == kept(True, [InferenceMode()]) > 0
    assert kept(False, [InferenceMode()]) == 0


class OnDevice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return {"large": self.layer(x), "pair": (x.shape, "text")}


def test_results_leave_the_device_at_once():
    """Ten results of 256 KiB that a loop collects: the device holds one at a time."""

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = OnDevice()

        def forward(self, x):
            return [self.inner(x)["large"] for _ in range(10)]

    size = 1024 * 64 * 4
    results = {}
    for outputs in ("device", "cpu"):
        model = Loop()
        with memopt.apply(model.eval(), [InferenceMode(methods=("inner.forward",), outputs=outputs)]):
            report = memopt.profile(model, torch.empty(1024, 64), train=False, device="cuda")
        results[outputs] = report
    start = sum(results["cpu"].start_by_category.values())
    assert results["device"].peak == start + 10 * size
    assert results["cpu"].peak == start + size
    assert results["device"].off_device == {}
    assert results["cpu"].off_device == {"cpu": 10 * size}


def test_nested_results_keep_their_structure_and_aliases():
    model = Sampler()
    expected = model.sample(x)
    handle = memopt.apply(model, [InferenceMode(methods=("sample",), outputs="cpu")])
    found = model.sample(x)
    assert found.steps == 2
    assert torch.equal(found.more["both"][1], expected.more["both"][1])
    assert found.more["both"][0] is found.image
    assert handle.report().rows[0].counts["tensors moved"] == 2


def test_a_generator_yields_results_as_they_come():
    model = Sampler()
    memopt.apply(model, [InferenceMode(methods=("stream", "forward"), outputs="cpu")])
    stream = model.stream(x)
    assert model.seen == []  # nothing runs before it is asked
    first = next(stream)
    assert model.seen == [False, False]
    assert not first.requires_grad
    assert torch.is_grad_enabled()  # the caller's code between two results
    assert not stream.send(1.0).requires_grad
    next(stream)
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert end.value.value == "done"
    assert torch.is_grad_enabled()


def test_an_exception_that_is_thrown_into_a_generator_arrives_there():
    class Caught(Sampler):
        def stream(self, x):
            try:
                yield self(x)
            except KeyError:
                self.seen.append(torch.is_grad_enabled())
                yield self(x) * 2

    model = Caught()
    memopt.apply(model, [InferenceMode(methods=("stream",), outputs="cpu")])
    stream = model.stream(x)
    first = next(stream)
    second = stream.throw(KeyError())
    assert torch.equal(second, first * 2)
    assert not second.requires_grad
    assert model.seen == [False, False, False]
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="not caught"):
        stream.throw(ValueError("not caught"))
    assert torch.is_grad_enabled()


def test_a_generator_that_is_dropped_is_closed():
    model = Sampler()
    closed = []

    def stream(self, x):
        try:
            yield self(x)
        finally:
            closed.append(True)

    cls = type("Closing", (Sampler,), {"stream": stream})
    model = cls()
    memopt.apply(model, [InferenceMode(methods=("stream",))])
    results = model.stream(x)
    next(results)
    results.close()
    assert closed == [True]


def test_only_what_leaves_the_outermost_entry_point_is_moved():
    model = Sampler().eval()
    handle = memopt.apply(model, [InferenceMode(methods=("sample", "forward"), outputs="cpu")])
    model.sample(x, steps=5)
    assert handle.report().rows[0].counts == {"tensors moved": 2}
    model(x)
    assert handle.report().rows[0].counts == {"tensors moved": 3}


def test_an_exception_leaves_autograd_as_it_was():
    model = Sampler().eval()
    handle = memopt.apply(model, [InferenceMode(methods=("sample", "forward", "stream"), outputs="cpu")])
    for call in (model, model.sample, lambda x: next(model.stream(x))):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            call(torch.randn(2, 3))
        assert torch.is_grad_enabled()
    model(x)
    assert handle.report().rows[0].counts["tensors moved"] == 1  # the depth is 0 again


def test_a_deep_copy_has_it_too_and_holds_no_original():
    model = Sampler().eval()
    memopt.apply(model, [InferenceMode()])
    twin = copy.deepcopy(model)
    gone = weakref.ref(model)
    assert torch.equal(twin(x), model(x))
    del model
    gc.collect()
    assert gone() is None
    assert not twin(x).requires_grad


@pytest.mark.parametrize("grad", ["no_grad", "inference"])
def test_compiled(grad):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU()).eval()
    expected = model(x)
    memopt.apply(model, [InferenceMode(grad=grad, outputs="cpu")])
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_with_other_passes_and_with_itself():
    model = Sampler()
    memopt.apply(model, [InferenceMode(), AMP(), InferenceMode(methods=("sample",), outputs="cpu")])
    assert not model.sample(x).image.requires_grad
    with pytest.raises(PassConflict, match="sample of the whole model"):
        memopt.apply(model, [InferenceMode(methods=("sample",))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["sampel"]}, "Sampler has no method 'sampel'. Did you mean 'sample'"),
        ({"methods": ["seen"]}, "Sampler has no method 'seen'"),
        ({"methods": ["later"]}, "'later' of Sampler is async: other tasks run between its parts"),
        ({"methods": ["each"]}, "'each' of Sampler is async"),
        ({"methods": ["noise"]}, "'noise' of Sampler is a staticmethod, not a method of one model"),
        ({"methods": ["made"]}, "'made' of Sampler is a classmethod"),
        ({"methods": ["size"]}, "'size' of Sampler is a property"),
        ({"methods": ["decoder.decode"]}, "Sampler has no module 'decoder' (for decoder.decode)"),
        ({"methods": []}, "methods must be a tuple of names, not ()"),
        ({"grad": "off"}, "grad"),
        ({"outputs": "disk"}, "outputs"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(InputError) as error:
        memopt.apply(Sampler(), [{"inference_mode": options}])
    assert message in str(error.value)


def test_a_model_without_parameters():
    with pytest.raises(NothingToDo, match="a model with parameters"):
        memopt.apply(nn.ReLU(), ["inference_mode"])
