"""Blocks that reviews of the checkpoint pass found to go wrong or to be missed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memopt
from memopt.blocks import find_blocks
from memopt.passes import Checkpoint, LeanOps
from tests.passes.test_checkpoint import Net
from tests.passes.test_checkpoint_policies import both

CHEAP = {
    "cheap": [Checkpoint(policy="cheap")],
    "everything": [Checkpoint(policy=lambda op, *args, **kwargs: True)],
    "lean": [Checkpoint(policy="cheap"), LeanOps(min_bytes=1)],
}


class Scales(nn.Module):
    """Attention that scales its scores in place. matmul gives its kernel's result by another name (aten::_unsafe_view),
    which counts changes for itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        scores = self.a(x) @ self.b(x).mT
        scores *= 0.1
        return scores.softmax(-1) @ x


class Gated(nn.Module):
    """Its gates are parts of one linear map's result (aten::unsafe_split), each changed in place."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(16, 16, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return F.silu(self.cell(x)[0])


class Hands(nn.Module):
    """Gives a product itself, which the next block changes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(torch.sin(x.relu_())) @ self.weight


@pytest.mark.parametrize("way", CHEAP)
@pytest.mark.parametrize("block", [Scales, Gated, Hands])
def test_kept_results_that_are_changed_by_another_name(block, way):
    class Begins(Net):
        def forward(self, x):
            return super().forward(x + 0)

    both(lambda: Begins(block(), block()), torch.randn(3, 5, 16), CHEAP[way])


class Differentiates(nn.Module):
    """Takes a gradient in forward, as a learned energy's force."""

    def __init__(self, changes=False):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.changes = changes

    def forward(self, x):
        if self.changes:
            x.mul_(2)
        h = F.silu(self.a(x))
        (force,) = torch.autograd.grad(self.b(h).square().sum(), h, create_graph=True)
        return h + 0.1 * force


@pytest.mark.parametrize("way", ["full", *CHEAP])
def test_a_block_that_takes_a_gradient_itself(way):
    both(lambda: Net(Differentiates(), Differentiates()), torch.randn(3, 16), CHEAP.get(way, [Checkpoint()]))


def test_a_block_that_takes_a_gradient_of_what_it_has_changed_is_an_error():
    class Changes(Net):
        def forward(self, x):
            return super().forward(x + 0)

    model = Changes(Differentiates(changes=True))
    memopt.apply(model, [Checkpoint()])
    with pytest.raises(RuntimeError, match=r"an input of a Differentiates was changed in place .* before it took"):
        model(torch.randn(3, 16))


class Layers(nn.Module):
    """A block that holds its layers in a list, as HiFi-GAN's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(torch.sin(x))
        return x


def test_blocks_of_single_layers_in_a_list():
    assert find_blocks(Net(Layers(), Layers())) == ["blocks.0", "blocks.1"]
    assert find_blocks(Net(nn.ModuleList([nn.Linear(16, 16), nn.ReLU()]))) == []  # nobody calls a list
    both(lambda: Net(Layers(), Layers()), torch.randn(3, 16), [Checkpoint()])
