"""What happens to deferred values on the way: changes in place, hooks, recomputation, containers, threads."""

import collections
import copy
import dataclasses
import operator
import subprocess
import sys
import threading
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memopt import MemoptError
from memopt.deferred import Deferred, Products, counting, made, watched
from tests.test_deferred import D, by_matmul, inputs, joined, outcome


def test_a_condition_changed_in_place_afterwards_changes_nothing():
    def function(c, d, w, b, x):
        c, d = c * 2, d * 3
        M = torch.einsum("ab,ac->abc", c, d)
        c.add_(1)
        d.zero_()
        return by_matmul(*joined(x, F.linear(M, w, b))) + M.sum()

    given = [x.detach() for x in inputs()]
    with Products(counting(Counter())):
        found = function(*given)
    assert torch.allclose(found, function(*given), rtol=1e-12)


def test_an_origin_changed_where_nobody_looks_is_an_error_rather_than_a_wrong_result():
    with torch.no_grad():
        weight = torch.ones(4, D, dtype=torch.float64)
        with Products(counting(Counter())):
            M = torch.einsum("ab,ac->abc", *inputs()[:2])
            line = F.linear(M, weight)
        weight.mul_(2)
        with pytest.raises(MemoptError, match="relu needs a product's linear map whose origin was changed in"):
            line.relu()
        with Products(counting(Counter())):
            line = F.linear(M, weight)
            M.sum()
        M.made.mul_(2)
        with pytest.raises(MemoptError, match="relu needs a product's linear map whose origin was changed in"):
            line.relu()


def test_a_hook_that_comes_too_late_is_an_error():
    given = inputs()
    with Products(counting(Counter())):
        M = torch.einsum("ab,ac->abc", *given[:2])
        out = by_matmul(*joined(given[4], F.linear(M, given[2], given[3])))
        with pytest.raises(MemoptError, match="register_hook comes too late for a whole product that was used"):
            M.register_hook(lambda g: 2 * g)
        with pytest.raises(MemoptError, match="retain_grad comes too late"):
            M.retain_grad()
    assert out.requires_grad


def test_nothing_begins_below_transforms_of_torch_func():
    c, d, w, b, x = (t.detach() for t in inputs())

    def function(c):
        return by_matmul(*joined(x, F.linear(torch.einsum("ab,ac->abc", c, d), w, b))).square().sum()

    expected = torch.func.grad(function)(c), torch.func.jacrev(torch.func.grad(function))(c)
    counts = Counter()
    with Products(counting(counts)), watched():
        assert torch.equal(torch.func.grad(function)(c), expected[0])
        assert torch.equal(torch.func.jacrev(torch.func.grad(function))(c), expected[1])
    assert not counts


def test_what_a_checkpoint_makes_it_makes_for_all():
    """The recomputation finds the product made, and must save the same tensors all the same."""

    def function(c, d, *_):
        M = torch.einsum("ab,ac->abc", c, d)
        return checkpoint(lambda m: (m.exp() * m).sum(), M, use_reentrant=False) + M.sum()

    for mode in (None, Products):
        result, grads, _ = outcome(function, inputs(), mode)
        assert grads[0].any()
    assert torch.equal(result, outcome(function, inputs())[0])


class Pair(NamedTuple):
    left: object
    right: object


@dataclasses.dataclass(frozen=True)
class Output:
    value: object
    count: int = 1


def test_results_keep_their_containers():
    from transformers.modeling_outputs import BaseModelOutput

    with Products(counting(Counter())):
        M = torch.einsum("ab,ac->abc", *inputs()[:2])
    result = made(
        {
            "pair": Pair(M, 1),
            "list": [M, (M, None)],
            "ordered": collections.OrderedDict(b=M, a=2),
            "output": Output(M),
            "model": BaseModelOutput(last_hidden_state=M),
        }
    )
    whole = M.make("a test")
    assert type(result["pair"]) is Pair
    assert result["pair"].left is result["list"][0] is result["list"][1][0] is whole
    assert list(result["ordered"]) == ["b", "a"]
    assert result["output"] == Output(whole)
    assert type(result["model"]) is BaseModelOutput
    assert result["model"].last_hidden_state is result["model"]["last_hidden_state"] is result["model"][0] is whole
    for value in ([1, torch.ones(1)], {"a": (1,)}, Pair(1, 2), Output(3), torch.Size([1]), "text", None):
        assert made(value) is value
    assert torch.equal(copy.copy(M), whole)


def test_functions_of_autograd_are_as_before_afterwards():
    before = vars(torch.autograd.Function)["apply"]
    barrier = threading.Barrier(2)

    def enter():
        with watched():
            barrier.wait()

    thread = threading.Thread(target=enter)
    with watched():
        thread.start()
        barrier.wait()
        with watched():
            pass
        thread.join()
        assert vars(torch.autograd.Function)["apply"] is not before
    assert vars(torch.autograd.Function)["apply"] is before


def test_the_operators_of_tensors_are_all_there():
    names = {name for name in dir(operator) if name.startswith("__") and name in dir(Tensor)}
    names |= {f"__{kind}{name[2:]}" for name in names for kind in "ri" if f"__{kind}{name[2:]}" in dir(Tensor)}
    assert len(names) > 50
    assert not [name for name in names if name not in dir(Deferred)]


def test_importing_memopt_does_not_import_the_compiler():
    code = (
        "import sys, torch; print('torch._dynamo' in sys.modules); import memopt; print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    before, after = done.stdout.split()
    assert before == after
