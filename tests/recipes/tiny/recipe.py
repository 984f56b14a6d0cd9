"""A recipe as small as can be: it proves that the loop knows nothing of HAE."""

from dataclasses import dataclass

import torch
from torch import nn

from memopt.recipe import Grid, Recipe, TrainConfig

from .net import Net


@dataclass(frozen=True, kw_only=True)
class TinyConfig(TrainConfig):
    width: int = 16
    dropout: float = 0.1
    samples: int = 64


class Points(torch.utils.data.Dataset):
    def __init__(self, n):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 8, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "name": f"point {index}"}


class Tiny(Recipe[TinyConfig]):
    name = "tiny"
    presets = {
        "small": TinyConfig(
            steps=12, batch_size=8, lr=1e-2, ema_decay=0.9, save_every=4, keep=2, log_every=3, num_workers=0
        ),
        "wide": TinyConfig(steps=12, batch_size=8, lr=1e-2, width=32, num_workers=0, lr_anneal=True),
    }

    def model(self, config):
        return Net(config.width, config.dropout)

    def dataset(self, config, data, cache):
        return Points(config.samples)

    def draw(self, config, n, generator):
        return {"noise": torch.randn(n, 8, generator=generator)}

    def loss(self, config, model, batch):
        assert len(batch["name"]) == len(batch["x"]) == len(batch["noise"])
        return nn.functional.mse_loss(model(batch["x"] + batch["noise"]), batch["x"])

    def sample(self, config, model, generator):
        x = model(torch.randn(6, 8, generator=generator)).tanh()
        return Grid(x.view(2, 3, 2, 4), rows=("a", "b"), columns=("1", "2", "3"))


def recipe():
    return Tiny()
