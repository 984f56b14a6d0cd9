"""Jobs that tests run in processes of their own: a training run to be killed, and gradients under torchrun."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset

from memopt import recipe as recipes
from memopt.training import Trainer, train

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "recipes" / "tiny"
KILLED = {"steps": 30, "save_every": 2, "log_every": 2, "keep": 3, "lr_anneal": True, "passes": ("checkpoint",)}


def killable(out: str, resume: bool) -> None:
    """A run that saves every other step."""
    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    tiny = recipes.load_recipe(TINY)
    train(tiny, recipes.configure(tiny, None, KILLED), out=Path(out), resume=resume)


class RandomSlices(Dataset):
    """Images of noise in the form of the prepared slices: gradients need no anatomy."""

    def __init__(self, size: int, pixels: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.rand(size, 4, pixels, pixels, generator=generator) * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": torch.tensor(index % 2)}


def hae_trainer(null_rows: tuple[int, ...] | None = None, double: bool = True, **changes) -> Trainer:
    """A trainer of a small HAE V2 on random slices; ``null_rows`` are the samples whose condition is dropped."""
    hae = recipes.load_recipe(ROOT / "examples" / "hae_v2")

    class OnNoise(type(hae)):
        def dataset(self, config, data, cache):
            return RandomSlices(32, config.image_size)

        def model(self, config):
            model = super().model(config)
            for parameter in model.parameters():  # zero-initialised layers would hide most gradients
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
            return model.double() if double else model

        def draw(self, config, n, generator):
            draws = super().draw(config, n, generator)
            if null_rows is not None:
                draws["null"] = torch.tensor([i in null_rows for i in range(n)])
            return draws

        def loss(self, config, model, batch):
            if double:
                batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
            return super().loss(config, model, batch)

    base = dataclasses.replace(hae.presets["quickstart"], batch_size=4, dropout=0.0, image_size=16, num_workers=0)
    base = dataclasses.replace(base, passes=())
    return Trainer(OnNoise(), dataclasses.replace(base, **changes), data=None, cache=Path("unused"))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gradients of the first step."""
    trainer.backward(next(iter(trainer.loader(range(1)))))
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def main(out: str, null_rows: str, passes: str) -> None:
    """Under torchrun: gradients of the first step, written by the first process."""
    torch.set_num_threads(1)
    rows = tuple(int(i) for i in null_rows.split(",") if i)
    trainer = hae_trainer(rows, passes=tuple(p for p in passes.split(",") if p))
    assert trainer.world == 2
    found = gradients(trainer)
    if trainer.is_main:
        torch.save(found, out)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
