"""The tiny recipe, which keeps something of every step."""

from dataclasses import dataclass

import torch

from memopt.recipe import TrainConfig, load_recipe
from tests.training_jobs import TINY

tiny = load_recipe(TINY)
kept = []


@dataclass(frozen=True, kw_only=True)
class LeakingConfig(type(tiny.presets["small"])):
    steps: int = 40
    batch_size: int = 8
    log_every: int = 2
    num_workers: int = 0
    ema_decay: float | None = 0.9
    leak: str = "nothing"


class Leaking(type(tiny)):
    kept = kept
    presets: dict[str, TrainConfig] = {"default": LeakingConfig()}

    def loss(self, config, model, batch):
        loss = super().loss(config, model, batch)
        if config.leak == "tensor" or (config.leak == "cache" and len(kept) < 11):
            kept.append(torch.zeros(2560, 1024))  # 10 MiB
        elif config.leak == "loss":
            kept.append(loss)
        elif config.leak == "output":
            kept.append(model(batch["x"].repeat(256, 1)))
        return loss


def recipe():
    kept.clear()
    return Leaking()
