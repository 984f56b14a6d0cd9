import os
import sys
from pathlib import Path

import pytest
import torch

from memopt import registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # examples are imported as examples.hae_v2

# Subprocesses of tests share the machine with the other test worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _passes_defined_in_a_test_end_with_it():
    """Others list all the passes there are; memopt's own may be imported at any time and stay."""
    before = set(registry._REGISTRY)
    yield
    for name in set(registry._REGISTRY) - before:
        if not registry._REGISTRY[name].__module__.startswith("memopt."):
            del registry._REGISTRY[name]


@pytest.fixture
def root() -> Path:
    return ROOT
