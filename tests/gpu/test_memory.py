"""Predictions made on the CPU against what CUDA's allocator gives out. Run on a GPU machine: make gpu."""

import gc

import pytest
import torch

from tests.zoo.scaled import for_a_gpu
from tests.zoo.witness import on_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize("case", for_a_gpu(), ids=str)
def test_predictions_are_within_three_percent(case, train):
    """Workspaces of libraries are counted apart: those that cuBLAS keeps, and what cuDNN and others take and give back
    inside an operator at the peak, which the profile names as an assumption."""
    predicted, account, peak = on_cuda(case.build(), case.inputs(), train=train)
    gc.collect()
    torch.cuda.empty_cache()
    assert predicted.device == "cuda"
    assert predicted.rounding == 512
    # The two readings of the allocator agree: its events as the profiler has them, and its own counter.
    assert account.peak == pytest.approx(peak - account.library, rel=0.005)
    without_workspaces = account.start + account.tensors
    assert predicted.peak == pytest.approx(without_workspaces, rel=0.03), account
    assert account.peak - without_workspaces <= sum(account.scratch.values()), account
