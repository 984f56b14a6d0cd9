"""The zoo itself: its models repeat to the bit, learn everywhere, and leave no change of theirs unseen."""

import copy
import math

import pytest
import torch
from torch import nn

from .zoo import ZOO, Case, differences, fingerprint, guided, loss_of, nasty, reseeded, run

# Parameters that the mathematics gives no gradient, by the end of their names: softmax ignores a shift of all keys.
BLIND = ("to_k.bias", "k_proj.bias")
NO_GRADIENT = {
    "data_dependent": ("blocks.1.",),
    "frozen_stem": ("stem.", "blocks.0."),
    "sd3": ("transformer_blocks.2.attn.add_q_proj.", "transformer_blocks.2.attn.norm_added_q."),
}


@pytest.fixture(params=ZOO.values(), ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        (one[key] is None and two[key] is None) or torch.equal(one[key], two[key]) for key in one
    )


def test_repeats_to_the_bit_and_survives_deepcopy(case):
    before = torch.get_rng_state()
    model = case.build()
    assert torch.equal(torch.get_rng_state(), before)
    copied = copy.deepcopy(model)
    loss, grads, buffers = run(model, case)
    for other in (case.build(), copied):
        assert other is not model
        loss_again, grads_again, buffers_again = run(other, case)
        assert torch.equal(loss, loss_again)
        assert same(grads, grads_again)
        assert same(buffers, buffers_again)


def test_every_gradient_is_finite_and_alive(case):
    model = case.build()
    assert sum(parameter.numel() for parameter in model.parameters()) < 5_000_000
    loss, grads, _ = run(model, case)
    assert math.isfinite(loss)
    dead = []
    for name, grad in grads.items():
        assert grad is None or grad.isfinite().all(), name
        if (grad is None or not grad.any()) and not name.endswith(BLIND):
            dead.append(name)
    assert [name for name in dead if not name.startswith(NO_GRADIENT.get(case.name, ()))] == []


def test_inputs_are_new_each_time_and_equal(case):
    one, two = case.inputs(), case.inputs()
    assert fingerprint(holder(one)) != fingerprint(holder(two))
    model, other = case.build(), case.build()
    torch.manual_seed(0)
    first = loss_of(model(*one[0], **one[1]))
    torch.manual_seed(0)
    assert torch.equal(first, loss_of(other(*two[0], **two[1])))


def holder(inputs) -> nn.Module:
    module = nn.Module()
    module.inputs = inputs
    return module


def test_fingerprint_of_the_same_model_is_equal(case):
    model = case.build()
    before = fingerprint(model)
    assert differences(before, fingerprint(model)) == []
    assert fingerprint(model) == before
    run(model, case)
    if not any(True for _ in model.buffers()) and case.name != "generator_dropout":
        assert differences(before, fingerprint(model)) == []  # gradients are no part of it
    assert fingerprint(copy.deepcopy(model)) != before


def hook(*args):
    return None


def rename(model):
    base = type(model)
    model.__class__ = type(base.__name__, (base,), {})


def swap_value(model):
    first = next(model.parameters())
    with torch.no_grad():
        first.view(-1)[0] += 1


def replace_parameter(model):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def remove_and_readd(model):
    first = model._modules.pop("stem")
    model._modules["stem"] = first


PLANTED = {
    "class": rename,
    "weight": swap_value,
    "parameter object": replace_parameter,
    "order of children": remove_and_readd,
    "requires_grad": lambda model: model.head.weight.requires_grad_(False),
    "train mode": lambda model: model.blocks[0].eval(),
    "plain attribute": lambda model: setattr(model.blocks[0].drop, "p", 0.2),
    "new attribute": lambda model: setattr(model.blocks[0], "note", None),
    "own forward": lambda model: setattr(model.head, "forward", model.head.forward),
    "swapped block": lambda model: model.blocks.__setitem__(0, nasty.Block()),
    "moved to bfloat16": lambda model: model.head.to(torch.bfloat16),
    "buffer": lambda model: model.register_buffer("extra", torch.zeros(1)),
    "forward hook": lambda model: model.stem.register_forward_hook(hook),
    "forward hook with kwargs": lambda model: model.stem.register_forward_hook(hook, with_kwargs=True),
    "forward hook always called": lambda model: model.stem.register_forward_hook(hook, always_call=True),
    "forward pre-hook": lambda model: model.stem.register_forward_pre_hook(hook, with_kwargs=True),
    "backward hook": lambda model: model.stem.register_full_backward_hook(hook),
    "backward pre-hook": lambda model: model.stem.register_full_backward_pre_hook(hook),
    "state_dict hook": lambda model: model.stem.register_state_dict_post_hook(hook),
    "state_dict pre-hook": lambda model: model.stem.register_state_dict_pre_hook(hook),
    "load_state_dict pre-hook": lambda model: model.stem.register_load_state_dict_pre_hook(hook),
    "load_state_dict hook": lambda model: model.stem.register_load_state_dict_post_hook(hook),
    "gradient hook": lambda model: model.head.weight.register_hook(hook),
    "accumulation hook": lambda model: model.head.weight.register_post_accumulate_grad_hook(hook),
    "attribute of a parameter": lambda model: setattr(model.head.weight, "note", 1),
}


@pytest.mark.parametrize("name", PLANTED)
def test_fingerprint_sees(name):
    model = ZOO["frozen_stem"].build()
    before = fingerprint(model)
    PLANTED[name](model)
    assert fingerprint(model) != before
    assert differences(before, fingerprint(model))


def test_fingerprint_sees_a_hook_that_was_removed_but_for_a_trace():
    model = ZOO["frozen_stem"].build()
    before = fingerprint(model)
    model.stem.register_forward_hook(hook).remove()
    assert differences(before, fingerprint(model)) == []
    model.stem.register_full_backward_hook(hook).remove()
    (found,) = differences(before, fingerprint(model))
    assert "_is_full_backward_hook" in found


def test_fingerprint_sees_a_changed_config():
    model = ZOO["gpt2"].build()
    before = fingerprint(model)
    model.config.use_cache = not model.config.use_cache
    assert differences(before, fingerprint(model))


def test_fingerprint_sees_global_hooks():
    model = ZOO["single_linear"].build()
    before = fingerprint(model)
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert fingerprint(model) != before
    finally:
        handle.remove()
    assert fingerprint(model) == before


def test_tied_and_shared_parts_are_one():
    tied = ZOO["tied_weights"].build()
    assert tied.head.weight is tied.embedding.weight
    assert {"head.weight", "embedding.weight"} <= tied.state_dict().keys()
    gpt2 = ZOO["gpt2"].build()
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    listed = ZOO["shared_listed"].build()
    assert listed.blocks[0] is listed.blocks[2]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_legacy_checkpoint_is_right_only_without_dropout(dropout):
    case = ZOO["guided_unet"]
    plain = reseeded(1, lambda: guided.UNetModel(use_checkpoint=False, dropout=dropout)).double()
    legacy = reseeded(1, lambda: guided.UNetModel(use_checkpoint=True, dropout=dropout)).double()
    loss, grads, _ = run(plain, case)
    loss_legacy, grads_legacy, _ = run(legacy, case)
    assert torch.equal(loss, loss_legacy)
    # Not to the bit: the gradients of the embedding, which all blocks share, are added up in another order.
    close = all(torch.allclose(grads[name], grads_legacy[name], rtol=1e-12, atol=1e-15) for name in grads)
    assert close == (dropout == 0.0)


def test_legacy_checkpoint_allows_one_backward_only():
    case = ZOO["guided_unet"]
    args, kwargs = case.inputs()
    loss = loss_of(case.build()(*args, **kwargs))
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError, match="inputs"):
        loss.backward()


@pytest.mark.parametrize("name", ["running_stats", "power_iteration", "generator_dropout", "inplace_input"])
def test_a_second_run_of_a_block_differs(name):
    block = ZOO[name].build().blocks[0]
    x = torch.linspace(-1, 1, 2 * 9 * nasty.WIDTH).reshape(2, 9, nasty.WIDTH)
    torch.manual_seed(0)
    first = block(x)
    torch.manual_seed(0)
    assert not torch.equal(first, block(x))


def test_loss_weighs_every_floating_leaf():
    a, b, c = (torch.full((3,), value) for value in (1.0, 2.0, 4.0))
    nested = {"a": a, "more": (b, [c, None, 7, torch.ones(2, dtype=torch.long)])}
    assert loss_of(nested) == pytest.approx(1 + 4 / 2 + 16 / 3)
    assert loss_of(a.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="no floating tensor"):
        loss_of({"n": 1})
