"""The blocks that a model is made of."""

from __future__ import annotations

from torch import nn


def find_blocks(model: nn.Module) -> list[str]:
    """Names of a model's repeated blocks, found by structure.

    They are the members of the outermost ModuleLists, ModuleDicts and Sequentials. A member that itself holds such a
    list directly (a UNet level with its list of residual blocks) is not taken whole but searched, so that a block
    stays small. Single layers of torch are left out.
    """
    found: list[str] = []

    def search(module: nn.Module, prefix: str, member: bool) -> None:
        lists = [c for c in module.children() if isinstance(c, (nn.ModuleList, nn.ModuleDict))]
        if member and not lists:
            if _composite(module) and next(module.parameters(), None) is not None:
                found.append(prefix)
            return
        container = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        for name, child in module.named_children():
            search(child, f"{prefix}.{name}" if prefix else name, member=container)

    search(model, "", member=False)
    modules = dict(model.named_modules())
    return [name for name in found if name in modules]  # a shared block appears once


def _composite(module: nn.Module) -> bool:
    """More than one layer, or a forward that is not that of one of torch's layers."""
    if sum(1 for m in module.modules() if next(m.children(), None) is None) > 1:
        return True
    if isinstance(module, nn.Sequential):
        return any(map(_composite, module))
    return not any(c.__module__.startswith("torch.nn.") for c in type(module).__mro__ if c is not nn.Module)
