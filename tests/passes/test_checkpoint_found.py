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


class Noisy(nn.Module):
    """Multiplies with numbers of a generator that it holds in a dict, or is given."""

    def __init__(self, holds):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.generators = {"noise": torch.Generator().manual_seed(3)} if holds else {}

    def forward(self, x, generator):
        generator = self.generators.get("noise", generator)
        return torch.tanh(self.linear(x) * torch.randn(x.shape, generator=generator))


class Draws(nn.Module):
    def __init__(self, holds):
        super().__init__()
        self.blocks = nn.ModuleList([Noisy(holds) for _ in range(2)])

    def forward(self, x):
        generator = torch.Generator().manual_seed(5)
        if (own := self.blocks[0].generators.get("noise")) is not None:
            own.manual_seed(6)
        for block in self.blocks:
            x = block(x, generator)
        return x


@pytest.mark.parametrize("way", ["full", *CHEAP])
@pytest.mark.parametrize("holds", [True, False], ids=["held", "given"])
def test_generators_that_a_block_is_given_or_holds_in_a_dict(holds, way):
    both(lambda: Draws(holds), torch.randn(3, 16), CHEAP.get(way, [Checkpoint()]), steps=2)


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("way", ["full", *CHEAP])
def test_weights_that_are_frozen_or_thawed_between_forward_and_backward(way, needs):
    """As a discriminator's, while it judges for the generator."""

    def gradients(passes):
        torch.manual_seed(0)
        model, x = Net(), torch.randn(3, 16, requires_grad=True)
        memopt.apply(model, passes)
        for _ in range(2):  # the first call of a block is another
            x.grad = None
            model.requires_grad_(needs)
            out = model(x).square().sum()
            model.requires_grad_(not needs)
            out.backward()
            assert all(p.requires_grad is not needs for p in model.parameters())
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected, found = gradients([]), gradients(CHEAP.get(way, [Checkpoint()]))
    assert len(expected) == len(found)
    assert all(map(torch.equal, expected, found))


def test_a_weight_written_between_forward_and_backward_is_an_error():
    """Also one that autograd would not have saved, as a bias; what is computed again needs it."""
    model = Net()
    memopt.apply(model, [Checkpoint()])
    out = model(torch.randn(3, 16)).sum()
    with torch.no_grad():
        model.blocks[0].a.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
