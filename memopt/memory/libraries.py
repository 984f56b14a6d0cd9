"""What libraries do otherwise where tensors are fake, put right.

transformers looks at the positions of tokens to see whether several sequences are packed into one, for then attention
needs a mask. Fake tensors have no values to look at, so it makes the mask to be safe, and each layer a copy of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from memopt.tensors import storage_of


@contextlib.contextmanager
def corrected(given: Iterable[Tensor]) -> Iterator[None]:
    """While active, positions that are none of the ``given`` tensors, but counted by the model, are of one sequence."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    inner = getattr(masking, "find_packed_sequence_indices", None)
    if inner is None:
        yield
        return
    known = {storage_of(tensor) for tensor in given}

    def find(position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(position_ids, *args, **kwargs) if storage_of(position_ids) in known else None

    masking.find_packed_sequence_indices = find
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = inner
