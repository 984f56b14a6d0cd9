"""Small modules, each of which breaks something that a careless pass takes for granted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 12


class Block(nn.Module):
    """A plain residual block with dropout: what the modules below are made of."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.1):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(F.gelu(self.up(self.norm(x)))))


class Chain(nn.Module):
    """Stem, blocks one after another, head: the frame that most of the modules below fill in."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.stem = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TiedWeights(nn.Module):
    """A language model in small: the output matrix is the embedding matrix."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(17, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 17, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class KeywordBlock(Block):
    """A block that takes its arguments by keyword, in a nested dict, and returns a dict."""

    def forward(self, x: Tensor, *, context: dict, scale: float = 1.0) -> dict:
        mask = context["meta"]["mask"]
        y = super().forward(x * mask) * scale
        return {"x": x + y + context["bias"], "seen": {"masked": y * mask}}


class NestedIO(nn.Module):
    """Nested dicts and keywords in, dict of tuples, lists, numbers and None out."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(7, WIDTH)
        self.labels = nn.Embedding(4, WIDTH)
        self.blocks = nn.ModuleList([KeywordBlock(), KeywordBlock()])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, batch: dict, *, options: dict) -> dict:
        x = self.stem(batch["image"]) + self.labels(batch["meta"]["ids"])[:, None]
        context = {"meta": {"mask": batch["meta"]["mask"]}, "bias": options["bias"]}
        hidden = []
        for block in self.blocks:
            out = block(x=x, context=context, scale=options["scale"])
            x = out["x"]
            hidden.append(out["seen"]["masked"])
        aux = {"pair": (x.mean(dim=1), x.detach()), "count": len(hidden), "nothing": None}
        return {"prediction": self.head(x), "hidden": hidden, "aux": aux}


class SharedCalled(Chain):
    """One block, listed once and called three times."""

    def __init__(self):
        super().__init__(Block())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.blocks[0](x)
        return self.head(x)


class SharedListed(Chain):
    """The same block object listed twice, with another one between."""

    def __init__(self):
        shared = Block()
        super().__init__(shared, Block(), shared)


class BatchNormBlock(nn.Module):
    """A residual convolution block with batch norm: a second forward updates the running statistics again."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout2d(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.silu(self.norm(self.conv(x))))


class BatchNormNet(nn.Module):
    """Batch norm inside and outside the blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList([BatchNormBlock(8), BatchNormBlock(8)])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class RunningBlock(Block):
    """Counts its calls in place, and rebinds a running mean that the output depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.mean = 0.75 * self.mean + 0.25 * x.detach().mean(dim=(0, 1))
        return super().forward(x - self.mean) / (1 + 0.1 * self.count)


class RunningStats(Chain):
    """Own buffers, updated in forward: one in place, one replaced by a new tensor."""

    def __init__(self):
        super().__init__(RunningBlock(), RunningBlock())


class PowerBlock(nn.Module):
    """Divides its weight by an estimate of its largest singular value, one power iteration better with each forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("u", F.normalize(torch.randn(WIDTH), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            v = F.normalize(self.weight.t() @ self.u, dim=0)
            if self.training:
                self.u.copy_(F.normalize(self.weight @ v, dim=0))
            u = self.u.clone()
        sigma = (u * (self.weight @ v)).sum()
        return x + F.gelu(F.linear(x, self.weight / sigma, self.bias))


class PowerIteration(Chain):
    """Spectral norm in small: a buffer written by forward that forward reads."""

    def __init__(self):
        super().__init__(PowerBlock(), PowerBlock())


class InplaceBlock(Block):
    """Starts by writing into its own input, so that running it twice on one tensor gives two results."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5).add_(self.shift)
        return super().forward(x)


class InplaceInput(Chain):
    """Blocks that change their input in place."""

    def __init__(self):
        super().__init__(InplaceBlock(), InplaceBlock())


class InplaceReLU(Chain):
    """Blocks that begin with `nn.ReLU(inplace=True)`, which a second run leaves as it is."""

    def __init__(self):
        super().__init__(*(nn.Sequential(nn.ReLU(inplace=True), Block()) for _ in range(2)))


class DataDependent(Chain):
    """Values decide which block runs and how often: no graph holds for all inputs."""

    def __init__(self):
        super().__init__(Block(), Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.blocks[0](x) if x.detach().mean() > 0 else self.blocks[1](x)
        for _ in range(1 + int(x.detach().abs().sum().item()) % 2):
            x = self.blocks[2](x)
        return self.head(x)


class FrozenStem(Chain):
    """First layers that take no gradient: what enters the first trained block does not require one."""

    def __init__(self):
        super().__init__(Block(), Block(), Block())
        self.stem.requires_grad_(False)
        self.blocks[0].requires_grad_(False)


class GeneratorBlock(nn.Module):
    """Draws its dropout mask from a generator of its own, which no checkpoint of the global state covers."""

    def __init__(self, seed: int):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            keep = torch.rand(x.shape, generator=self.generator) > 0.25
            x = x * keep.to(x) / 0.75
        return x + F.gelu(self.linear(x))


class GeneratorDropout(Chain):
    """Dropout from an explicit `torch.Generator`."""

    def __init__(self):
        super().__init__(GeneratorBlock(1), GeneratorBlock(2))


class SingleLinear(nn.Linear):
    """A model without children: the root is the only module."""

    def __init__(self):
        super().__init__(7, 5)


class TupleBlock(Block):
    """Takes and returns two tensors and a number."""

    def forward(self, x: Tensor, state: Tensor, step: int) -> tuple[Tensor, Tensor, int]:
        x = super().forward(x + state)
        return x, 0.5 * state + torch.tanh(x), step + 1


class TupleBlocks(Chain):
    """Blocks that return tuples; the model returns a tuple too."""

    def __init__(self):
        super().__init__(TupleBlock(), TupleBlock())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        x = self.stem(x)
        state, step = torch.zeros_like(x), 0
        for block in self.blocks:
            x, state, step = block(x, state, step)
        return self.head(x), state, step


class OwnAutocast(Chain):
    """Opens an autocast region of its own: recompute outside of it would run in another dtype."""

    def __init__(self):
        super().__init__(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return super().forward(x)
