"""What classes' code is found to do, read from source or, where there is none, from compiled code."""

import inspect

import pytest
from torch import nn

from memopt import source
from tests.passes import test_fused_attention as attention
from tests.passes import test_outer_product_found as products
from tests.zoo import ZOO

SQUARES = {**dict.fromkeys(products.FOUND, "forward"), products.Apart: None, products.Checkpointed: "inner"}
ATTENDS = {
    **{key: ["forward"] for key in (attention.ViT, attention.CrossAttention, attention.Careful, attention.OwnSoftmax)},
    attention.RecomputesAMethod: ["attend", "forward"],  # which names a function that holds it
}


@pytest.fixture(params=["source", "compiled"])
def _how(request, monkeypatch):
    def gone(item):
        raise OSError("could not get source code")

    if request.param == "compiled":
        monkeypatch.setattr(inspect, "getsource", gone)
    caches = [value for value in vars(source).values() if hasattr(value, "cache_clear")]
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("_how")
def test_outer_products_and_their_methods():
    for cls, method in SQUARES.items():
        assert source.makes_outer_product(cls) == (method is not None), cls
        assert source.outer_products(cls) == [method] * (method is not None)


@pytest.mark.usefixtures("_how")
def test_attention_and_its_methods():
    for cls, methods in ATTENDS.items():
        assert source.writes_attention(cls), cls
        assert sorted(source.matrix_products(cls)) == methods
    for cls in (nn.Linear, nn.MultiheadAttention, nn.Softmax, attention.Softmax, products.Squares):
        assert not source.writes_attention(cls)
        assert not source.makes_outer_product(cls) or cls is products.Squares


def test_no_model_of_the_zoo_is_mistaken():
    expected = {
        "hae_v2": {"HAEUNetModelV2"},
        **{key: set() for key in ("unet2d_condition", "dit", "sd3", "gpt2", "vit", "monai_diffusion_unet")},
    }
    for name, found in expected.items():
        classes = {type(module) for module in ZOO[name].build().modules()}
        assert {cls.__name__ for cls in classes if source.makes_outer_product(cls)} == found
        assert not [cls for cls in classes if source.outer_products(cls) and cls.__name__ not in found]


def test_equations():
    for equation, is_one in {
        "ab,ac->abc": True,
        "b i, b j -> b j i": True,
        "...i,...j->...ij": True,
        "batch i, batch j -> batch i j": True,
        "ab,ab->ab": False,
        "ab,cb->acb": False,
        "ab,ac->abc,d": False,
        "batch i, other j -> batch i j": False,
        "ab,ac->acd": False,
        "i,j->ij": False,
    }.items():
        scope = {"torch": None, "__name__": "nowhere"}
        exec(f"class Module:\n  def forward(self, c):\n    return torch.einsum({equation!r}, c, c)", scope)
        assert source.makes_outer_product(scope["Module"]) == is_one, equation
