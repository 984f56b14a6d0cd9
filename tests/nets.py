"""Models for `memopt profile tests.nets:NAME`, good ones and bad ones."""

import torch
from torch import nn

NOT_A_FACTORY = 5


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    """Blocks that can be checkpointed, and inputs of several kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))

    def forward(self, sample, timestep=None, scale=1.0, mode="plain"):
        assert mode in ("plain", "double")
        x = sample * scale
        if timestep is not None:
            x = x + self.embed(timestep)[:, None]
        for block in self.blocks:
            x = block(x)
        return 2 * x if mode == "double" else x


class Inner:
    Net = Net


def normed():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def reads_values_to_build():
    model = nn.Linear(8, 8)
    if model.weight.abs().sum().item() == 0:
        raise RuntimeError("no weights")
    return model


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


def no_parameters():
    return nn.ReLU()


def no_module():
    return "a text"


def raises():
    raise OSError("weights not found")


def needs(width):
    return nn.Linear(width, width)
