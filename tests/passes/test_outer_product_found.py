"""The conditional outer product is found in whatever form modules write it, and what cannot be followed is given it."""

import einops
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memopt
from memopt import MemoptError
from memopt.passes import OuterProduct
from tests.passes.test_outer_product import F64, MODES


class Tokens(nn.Module):
    """Plain tokens attend to each other and to what is made of a product."""

    def __init__(self, width=6, size=9):
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.condition = nn.Linear(size, 2 * width)

    def attend(self, x, product):
        k, v = torch.cat([self.condition(product), self.to_kv(x)], dim=1).chunk(2, dim=-1)
        return x + torch.softmax(self.to_q(x) @ k.mT / 3, dim=-1) @ v


class Einsum(Tokens):
    def forward(self, x, c, d):
        return self.attend(x, torch.einsum("b i, b j -> b i j", c, d))


class Broadcast(Tokens):
    def forward(self, x, c, d):
        return self.attend(x, c[:, :, None] * d[:, None, :])


class Unsqueezed(Tokens):
    def forward(self, x, c, d):
        return self.attend(x, torch.bmm(c.unsqueeze(2), d.unsqueeze(1)))


class Matmul(Tokens):
    def forward(self, x, c, d):
        return self.attend(x, torch.matmul(c[:, :, None], d[:, None]))


class Operator(Tokens):
    def forward(self, x, c, d):
        return self.attend(x, c.unsqueeze(-1) @ d.unsqueeze(-2))


class Squares(nn.Module):
    def forward(self, c, d):
        return torch.einsum("ab,ac->acb", d, c).mT


class Apart(nn.Module):
    """The product is made in one child and read in another."""

    def __init__(self):
        super().__init__()
        self.product, self.reader = Squares(), Reader()

    def forward(self, x, c, d):
        return self.reader(x, tokens={"product": self.product(c, d)})


class Reader(Tokens):
    def forward(self, x, tokens):
        return self.attend(x, tokens["product"])


class Ellipsis(Tokens):
    def forward(self, x, c, d):
        return self.attend(x, torch.einsum("...i,...j->...ij", c, d))


class Einops(Tokens):
    def forward(self, x, c, d):
        return self.attend(x, einops.einsum(c, d, "batch i, batch j -> batch i j"))


class Vmap(Tokens):
    def forward(self, x, c, d):
        return self.attend(x, torch.vmap(torch.outer)(c, d))


class VmapLambda(Tokens):
    def forward(self, x, c, d):
        outer = torch.func.vmap(lambda i, j: torch.outer(j, i), in_dims=(0, 0), randomness="different")
        return self.attend(x, outer(d, c))


class Checkpointed(Tokens):
    """The product is made again in backward."""

    def forward(self, x, c, d):
        return checkpoint(self.inner, x, c, d, use_reentrant=False)

    def inner(self, x, c, d):
        return self.attend(x, torch.einsum("bi,bj->bij", c, d))


FOUND = dict.fromkeys((Einsum, Ellipsis, Einops, Broadcast, Unsqueezed, Matmul, Operator, Vmap, VmapLambda), "")
FOUND |= {Apart: "product", Checkpointed: ""}


def three(grad=True):
    generator = torch.Generator().manual_seed(2)
    tensors = (torch.randn(s, generator=generator, dtype=F64) for s in ((3, 4, 6), (3, 9), (3, 9)))
    x, c, d = (t.requires_grad_(grad) for t in tensors)
    return x, c, d


def outcome(model, given):
    output = model(*given)
    wanted = [t for t in (*model.parameters(), *given) if t.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("kind", FOUND)
def test_every_form_is_found_and_exact(kind, same):
    model, (x, c, d) = kind().double(), three()
    given = (x, c, c) if same else (x, c, d)
    expected = outcome(model, given)
    for mode in MODES:
        handle = memopt.apply(model, [OuterProduct(mode=mode)])
        for a, b in zip(outcome(model, given), expected, strict=True):
            assert (a - b).abs().max() <= 1e-12 * b.abs().max()
        row = handle.report().rows[0]
        assert [claim.path for claim in row.claims] == [FOUND[kind]]
        if mode == "rank_one":
            times = 1 + (kind is Checkpointed)
            steps = ("products not made", "linear maps by rank one", "attentions by rank one")
            assert row.counts == dict.fromkeys(steps, times)
        handle.undo()


class Legacy(Tokens):
    """Checkpoints as guided diffusion does, by an autograd function that gets the product as an argument."""

    def forward(self, x, c, d):
        from tests.zoo.guided import checkpoint

        product = torch.einsum("bi,bj->bij", c, d)
        for _ in range(2):
            x = checkpoint(self.attend, (x, product), self.parameters(), True)
        return x


class Hooked(Einsum):
    def __init__(self):
        super().__init__()
        self.seen = []
        self.condition.register_forward_pre_hook(lambda module, args: self.seen.append(args[0].norm().item()))


class Returns(nn.Module):
    def forward(self, x, c, d):
        self.kept = c[:, :, None] * d[:, None]
        return x.sum() * self.kept


@pytest.mark.parametrize("kind", [Legacy, Hooked, Returns])
@pytest.mark.parametrize("mode", ["rank_one", "sparse"])
def test_what_cannot_be_followed_is_given_the_product(kind, mode):
    model = kind().double()
    expected = outcome(model, three())
    handle = memopt.apply(model, [OuterProduct(mode=mode)])
    for a, b in zip(outcome(model, three()), expected, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    why = {Legacy: "CheckpointFunction", Hooked: "norm", Returns: "mul"}[kind]
    assert f"made a whole product for {why}" in str(handle.report())
    if kind is Hooked:
        assert model.seen[0] == pytest.approx(model.seen[1], rel=1e-12)


class FactorsChange(Tokens):
    """One factor is changed in place where autograd does not mind."""

    def forward(self, x, c, d):
        c, d = 1.0 * c, d.detach()
        product = c[:, :, None] * d[:, None, :]
        c.add_(1)
        return self.attend(x, product) + c.sum()


class TokensChange(Tokens):
    def forward(self, x, c, d):
        plain = self.to_kv(x)
        more = torch.cat([self.condition(torch.einsum("bi,bj->bij", c, d)), plain], dim=1)
        plain.mul_(3)
        k, v = more.chunk(2, dim=-1)
        return torch.softmax(self.to_q(x) @ k.mT, dim=-1) @ v


class MapChanges(Tokens):
    def forward(self, x, c, d):
        more = self.condition(torch.einsum("bi,bj->bij", c, d))
        turned = more.permute(0, 2, 1)
        more.mul_(2)
        k, v = turned.permute(0, 2, 1).chunk(2, dim=-1)
        return torch.softmax(self.to_q(x) @ k.mT, dim=-1) @ v + 0 * self.to_kv(x).sum()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", [FactorsChange, TokensChange, MapChanges])
@pytest.mark.parametrize("mode", ["rank_one", "sparse"])
def test_changes_in_place_have_their_effect(mode, kind, grad):
    model = kind().double()
    expected = outcome(model, three()) if grad else [model(*three(False)).detach()]
    memopt.apply(model, [OuterProduct(mode=mode)])
    if grad:
        found = outcome(model, three())
    else:
        with torch.no_grad():
            found = [model(*three(False))]
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert b is None or (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_a_module_called_by_itself_gives_tensors():
    model = Apart().double()
    memopt.apply(model, ["outer_product"])
    _, c, d = three()
    assert type(model.product(c, d)) is torch.Tensor


@pytest.mark.parametrize("i", [0, 1])
def test_a_row_of_zeros_times_what_is_not_finite(i):
    model, given = Einsum().double(), list(three(grad=False))
    given[1 + i][0, 3] = float("inf")
    given[2 - i][0] = 0
    expected = model(*given)
    memopt.apply(model, [OuterProduct(mode="sparse")])
    assert torch.equal(model(*given).isnan(), expected.isnan())
    assert expected.isnan().any()


def test_backward_hooks_of_modules_see_what_they_saw():
    model, seen = Einsum().double(), []
    model.condition.register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[0]))
    expected = outcome(model, three())
    memopt.apply(model, ["outer_product"])
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, three()), expected, strict=True))
    assert torch.equal(*seen)


class Writes(nn.Module):
    def forward(self, x, c, d):
        product = torch.einsum("bi,bj->bij", c, d)
        product.mul_(2)
        product[0] = 1
        return product


@pytest.mark.parametrize("mode", MODES)
def test_writing_into_the_product(mode):
    model = Writes()
    expected = model(*three())
    memopt.apply(model, [OuterProduct(mode=mode)])
    output = model(*three())
    assert type(output) is torch.Tensor
    assert torch.equal(output, expected)


@pytest.mark.parametrize("mode", MODES)
def test_check_finite_names_the_place(mode):
    model = Apart().double()
    memopt.apply(model, [OuterProduct(mode=mode, check_finite=True)])
    x, c, d = three(grad=False)
    model(x, c, d)
    for bad, what in ((float("nan"), "NaN"), (float("inf"), "an infinite value")):
        for i in (1, 2):
            given = [x, c.clone(), d.clone()]
            given[i][1, 3] = bad
            with pytest.raises(MemoptError, match=f"{what} detected in the condition that product squares"):
                model(*given)
    root = Einsum().double()
    memopt.apply(root, [OuterProduct(mode=mode, check_finite=True)])
    with pytest.raises(MemoptError, match="NaN detected in the condition that the model squares"):
        root(x, c * float("nan"), d)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_not_a_number_is_not_taken_for_zero(mode):
    model, (x, c, d) = Einsum().double(), three(grad=False)
    c[1] = float("nan")
    memopt.apply(model, [OuterProduct(mode=mode)])
    assert model(x, c, d)[1].isnan().all()
    assert model(x, c, d)[[0, 2]].isfinite().all()
