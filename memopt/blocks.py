"""The blocks that a model is made of."""

from __future__ import annotations

from torch import nn


def find_blocks(model: nn.Module, whole: bool = False) -> list[str]:
    """Names of a model's repeated blocks, found by structure.

    They are the members of the outermost ModuleLists, ModuleDicts and Sequentials. A member that itself holds such a
    list directly (a UNet level with its list of residual blocks) is not taken whole but searched, so that a block
    stays small, unless there is nothing but single layers of torch, which are left out.

    Args:
        model: the model.
        whole: take such a member whole, if it has a forward: what leaves it are skip connections and its output.
    """
    found: list[str] = []

    def search(module: nn.Module, prefix: str, member: bool) -> None:
        is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        lists = any(isinstance(child, (nn.ModuleList, nn.ModuleDict)) for child in module.children())
        before = len(found)
        if not member or is_list or (lists and not (whole and _has_forward(module))):
            container = is_list or isinstance(module, nn.Sequential)
            for name, child in module.named_children():
                search(child, f"{prefix}.{name}" if prefix else name, member=container)
        taken = member and not is_list and len(found) == before and (_has_forward(module) or not lists)
        if taken and _composite(module) and next(module.parameters(), None) is not None:
            found.append(prefix)

    search(model, "", member=False)
    modules = dict(model.named_modules())
    return [name for name in found if name in modules]  # a shared block appears once


def find_layers(block: nn.Module, prefix: str) -> list[str]:
    """Names of the layers inside a block: the outermost modules below it that are made of several and are no lists.

    A residual block, an attention, an MLP of a transformer's block. None where they hold less than half of the block's
    parameters: then most of the block's work is its own.
    """
    found: dict[str, nn.Module] = {}

    def search(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                search(child, path)
            elif _composite(child) and _has_forward(child) and not any(child is other for other in found.values()):
                found[path] = child

    search(block, prefix)
    found = {path: module for path, module in found.items() if next(module.parameters(), None) is not None}
    inside = {id(p): p.numel() for module in found.values() for p in module.parameters()}
    return list(found) if 2 * sum(inside.values()) >= sum(p.numel() for p in block.parameters()) else []


def _has_forward(module: nn.Module) -> bool:
    lists = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return not lists and type(module).forward is not nn.Module.forward


def _composite(module: nn.Module) -> bool:
    """More than one layer, or a forward that is not that of one of torch's layers."""
    if sum(1 for m in module.modules() if next(m.children(), None) is None) > 1:
        return True
    if isinstance(module, nn.Sequential):
        return any(map(_composite, module))
    return not any(c.__module__.startswith("torch.nn.") for c in type(module).__mro__ if c is not nn.Module)
