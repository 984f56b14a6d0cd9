"""Every pair of passes, in each order that differs, and random larger sets: no pass breaks the promises of another.

- Results: a pass that is bitwise exact changes no bit beside any others, whether these are exact or not. Those that
  round, or are not exact, stay within their tolerances together.
- Memory: the peak of a training step with two passes is at most that with either alone. Passes that buy time with
  memory (``COSTS``) add at most what they add to the untouched model. ``ABOVE`` has the exceptions and their reasons.
- Or ``apply`` refuses them, and the table in docs/passes.md says so.

Passes are applied by stage, so that two of different stages have one order, whatever order they are given in.
"""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memopt
from memopt import NothingToDo, PassConflict
from memopt.cli import main
from memopt.conflicts import conflicts
from memopt.passes import AMP, OptimizerInBackward
from tests.pairs import HAE, MONAI, PASSES, SUBJECTS, in_order
from tests.zoo import differences, fingerprint

# torch says so under plain autocast too, where a norm in float32 meets half-precision input.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

PAIRS = sorted({in_order(names) for names in itertools.permutations(PASSES, 2)})

COSTS = {
    "channels_last": "kernels take copies of what is not in their layout, and their results have it",
    "fused_optimizer": "its kernels take the count of steps of each parameter on the device",
}
"""Passes with which the peak is above that of the untouched model: what takes the memory."""
EVERYWHERE = ("hae_v2", "monai_unet", "dit", "gpt2")
RECOMPUTED = "what is computed again is on the device until its backward; offloading alone brings back one by one"
COPIED = "group norms of CUDA save copies in their own layout, which lean_ops does not see being made"
ABOVE = {
    ("checkpoint", "offload_activations"): (EVERYWHERE, RECOMPUTED),
    ("grad_accumulation", "offload_activations"): (EVERYWHERE, RECOMPUTED),
    ("lean_ops", "offload_activations"): (
        EVERYWHERE,
        "what several tensors are made from comes back once, and stays for the last of them",
    ),
    ("fused_attention", "offload_activations"): (
        ("hae_v2",),
        "the fused kernel's backward holds q, k, v and their gradients at once; written out, they come back in turn",
    ),
    ("amp", "lean_ops"): (
        ("gpt2",),
        "autocast casts the argument of a power to float32 inside the call, where lean_ops does not see it",
    ),
    ("channels_last", "lean_ops"): (("hae_v2", "monai_unet"), COPIED),
    ("channels_last", "offload_skips"): (
        ("hae_v2", "monai_unet"),
        "the copies for kernels make the peak, at a moment when no skip connection waits",
    ),
    ("lean_ops", "offload_skips"): (
        ("monai_unet",),
        "lean_ops does not know the tensor of a skip connection that came back, and keeps the concatenation with it",
    ),
}
"""Pairs whose peak is above that of one of the two alone: on which models, and why that is as it must be."""


def above(subject, names):
    return any(subject.name in models and {*pair} <= {*names} for pair, (models, _) in ABOVE.items())


def peak_and_bound(subject, names):
    """The peak with these passes, and the least of those with one of them and what the others cost."""
    stepping = bool(subject.about(names, "optimizer"))
    plain = subject.peak((), stepping)
    alone = {name: subject.peak((name,), stepping) for name in names}
    costs = {name: alone[name] - plain for name in names if name in COSTS}
    bound = min(peak + sum(costs.values()) - costs.get(name, 0) for name, peak in alone.items())
    return subject.peak(names, stepping), bound


def to_rounding(a, b, relative=1e-4):
    return (a - b).norm() <= relative * a.norm() + 1e-6 * a.numel() ** 0.5


def check_results(subject, names):
    rest = tuple(name for name in names if PASSES[name].rounding or not PASSES[name].exact)
    expected, found = subject.results(rest).values(), subject.results(names).values()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    # Parts of a batch draw other dropout masks than the whole, and so do tensors of another layout.
    draws = () if subject in (HAE, MONAI) else ("grad_accumulation", "channels_last")
    reference = tuple(name for name in rest if name in draws)
    if rest == reference or len(rest) < 2:  # one alone: tests/test_contract.py
        return
    plain, found = subject.results(reference), subject.results(rest)
    assert found.grads[0].keys() == plain.grads[0].keys()
    if all(PASSES[name].exact for name in rest):
        for a, b in zip(plain.losses, found.losses, strict=True):
            assert to_rounding(a, b)
        for name, grad in plain.grads[0].items():
            assert to_rounding(grad, found.grads[0][name]), name
    else:
        for a, b in zip(plain.losses, found.losses, strict=True):
            assert abs(a - b) <= 0.05 * abs(a) + 1e-3
        a, b = (torch.cat([s.grads[0][name].flatten() for name in plain.grads[0]]) for s in (plain, found))
        assert torch.cosine_similarity(a, b, dim=0) > 0.98


def check_refused(subject, names, error, message):
    model, optimizer = subject.fresh()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        memopt.apply(model, [PASSES[name] for name in names], optimizer=optimizer)
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_pair(subject, names):
    if idle := [name for name in names if not subject.claims[name]]:
        check_refused(subject, names, NothingToDo, f"^({'|'.join(idle)}): found nothing to do")
    elif names in subject.conflicts:
        check_refused(subject, names, PassConflict, re.escape(str(subject.conflicts[names])))
    else:
        check_results(subject, names)


def peaks():
    """Where peaks are compared: all pairs on HAE V2, and on others those of passes that change what a model keeps."""
    for subject in SUBJECTS:
        for names in sorted({in_order(tuple(sorted(names))) for names in PAIRS}):
            others = {*HAE.about(names, "optimizer", "loop"), *({*names} & {"inference_mode", "release"})}
            if subject is HAE or (subject.name in EVERYWHERE and not others):
                yield pytest.param(subject, names, id=f"{subject}-{'-'.join(names)}")


@pytest.mark.parametrize(("subject", "names"), list(peaks()))
def test_peak_of_a_pair(subject, names):
    if not all(subject.claims[name] for name in names) or names in subject.conflicts:
        return  # test_pair asks why
    peak, bound = peak_and_bound(subject, names)
    assert (peak > bound) == above(subject, names)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_alone_costs_nothing_or_says_so(name):
    stepping = bool(HAE.about((name,), "optimizer"))
    assert (HAE.peak((name,), stepping) > HAE.peak((), stepping)) == (name in COSTS)


# Larger sets.


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_a_part_computed_again_finds_no_skip_connection_away(subject):
    check_results(subject, ("lean_ops", "grad_accumulation", "offload_skips"))


def agreeing(names):
    """Those of the names, in the order of application, that do not meet one before them."""
    chosen = []
    for name in in_order(tuple(names)):
        if not any(pair in HAE.conflicts for pair in itertools.product(chosen, [name])):
            chosen.append(name)
    return tuple(chosen)


SETS = st.lists(st.sampled_from(sorted(PASSES)), min_size=3, max_size=len(PASSES), unique=True)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(SETS)
def test_results_of_a_larger_set(names):
    if (chosen := agreeing(names)) != in_order(tuple(names)):
        check_refused(HAE, names, PassConflict, "both change the")
    check_results(HAE, chosen)


@settings(max_examples=12, derandomize=True, deadline=None, database=None)
@given(SETS)
def test_peak_of_a_larger_set(names):
    """At most that of the best of them alone and what others cost, where no two of them are an exception."""
    chosen = agreeing(names)
    if not above(HAE, chosen):
        peak, bound = peak_and_bound(HAE, chosen)
        assert peak <= bound


# What cannot be combined.


def test_the_table_in_the_docs_is_what_the_code_says(root, capsys):
    main(["passes", "--conflicts", str(root / "examples" / "hae_v2")])
    assert capsys.readouterr().out in (root / "docs" / "passes.md").read_text()


def test_a_printed_conflict_is_what_apply_says():
    model, optimizer = HAE.fresh()
    (conflict,) = conflicts(model, [AMP(dtype="fp16"), "optimizer_in_backward", "checkpoint"], optimizer=optimizer)
    assert (conflict.first, conflict.second) == (AMP(dtype="fp16"), OptimizerInBackward())
    assert str(conflict.claim) == "gradients of step"
    with pytest.raises(PassConflict, match=re.escape(str(conflict))):
        memopt.apply(model, [conflict.first, conflict.second], optimizer=optimizer)


def test_no_optimizer_no_conflict():
    assert conflicts(HAE.build(), [AMP(dtype="fp16"), "optimizer_in_backward"]) == []
