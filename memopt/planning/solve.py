"""Which treatment each block gets: a mixed-integer linear program, solved by HiGHS, or greedily where that is missing.

One binary variable for each block and treatment, exactly one of them set per block; for each moment of the step one
row: what is needed at that moment by the block at work, and what the waiting blocks keep, within the budget. The
objective is the time of the step. As in Checkmate (Jain et al., arXiv 1910.02653), but over the blocks of a model and
several kinds of treatment rather than over operations and recomputation alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memopt.planning.costs import Moment, StepCosts

GAP = 1e-3
"""How far from the best time a solution may be, as a share of it: proving the last of it takes the longest."""
NODES = 4000
"""Of the search tree; a bound by time would make plans depend on the machine's mood."""


@dataclass(frozen=True)
class Choice:
    """A treatment for each block, and what the program says of it."""

    treatments: tuple[str, ...]
    seconds: float
    peak: int


class Program:
    """The blocks, treatments and moments of one model; solved for one budget after another.

    Args:
        steps: the costs of a step for each treatment, all blocks treated alike. ``keep`` must be among them.
    """

    def __init__(self, steps: Mapping[str, StepCosts]) -> None:
        self.names = tuple(steps)
        self.steps = steps
        self.count = len(steps["keep"].blocks)
        self.fixed = steps["keep"].seconds - sum(block.seconds for block in steps["keep"].blocks)
        self.seconds = np.array([[self._seconds(name, i) for name in self.names] for i in range(self.count)])
        self.kept = np.array([[steps[name].blocks[i].kept for name in self.names] for i in range(self.count)])
        self.rows, self.base = self._rows()
        self._matrix: Any = None
        alike = [[o] * self.count for o in range(len(self.names))]
        self.least = int(min(max(self._peaks(picked), default=0) for picked in alike))
        """The lowest modelled peak with all blocks treated alike, bytes."""

    def _seconds(self, name: str, block: int) -> float:
        step, keep = self.steps[name], self.steps["keep"]
        # What a treatment costs outside the blocks, copies to the host, is shared among them by what it moves.
        inside = sum(b.seconds for b in step.blocks)
        more = (step.seconds - inside) - self.fixed
        less = [max(0, k.kept - b.kept) for k, b in zip(keep.blocks, step.blocks, strict=True)]
        share = less[block] / sum(less) if sum(less) else 1 / max(1, self.count)
        return step.blocks[block].seconds + max(0.0, more) * share

    def _rows(self) -> tuple[list[dict[tuple[int, int], float]], list[float]]:
        """For each moment the coefficients by (block, treatment), and what is there anyway."""
        found: dict[Moment, dict[str, int]] = {}
        for name, step in self.steps.items():
            for moment, size in step.moments.items():
                found.setdefault(moment, {})[name] = size
        rows, base = [], []
        for (_, worker, waiting), sizes in found.items():
            row: dict[tuple[int, int], float] = {}
            least = min(sizes.values())
            if worker >= 0:
                for o, name in enumerate(self.names):
                    # A treatment in whose step there was no such moment asks for nothing in it.
                    row[worker, o] = sizes.get(name, 0) - least
                base.append(float(least))
            else:
                base.append(float(max(sizes.values())))
            for i in waiting:
                for o in range(len(self.names)):
                    row[i, o] = row.get((i, o), 0.0) + self.kept[i, o]
            rows.append(row)
        return rows, base

    def solve(self, budget: int) -> Choice | None:
        """The fastest treatments whose modelled peak is within the budget; None if there are none."""
        if not self.count:
            peak = self.steps["keep"].peak
            return Choice((), self.steps["keep"].seconds, peak) if peak <= budget else None
        picked = self._milp(budget)
        if picked is None:
            return None
        return Choice(
            tuple(self.names[o] for o in picked),
            self.fixed + float(sum(self.seconds[i, o] for i, o in enumerate(picked))),
            int(max(self._peaks(picked))),
        )

    def _peaks(self, picked: Sequence[int]) -> list[float]:
        return [
            base + sum(row.get((i, o), 0.0) for i, o in enumerate(picked))
            for row, base in zip(self.rows, self.base, strict=True)
        ]

    def _milp(self, budget: int) -> list[int] | None:
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
            from scipy.sparse import csr_matrix
        except ImportError:
            return self.greedy(budget)
        n, k = self.count, len(self.names)
        one = csr_matrix((np.ones(n * k), (np.repeat(np.arange(n), k), np.arange(n * k))), shape=(n, n * k))
        if self._matrix is None:
            entries = [(size, r, i * k + o) for r, row in enumerate(self.rows) for (i, o), size in row.items()]
            sizes, at, columns = zip(*entries, strict=True) if entries else ((), (), ())
            self._matrix = csr_matrix((np.array(sizes, float), (at, columns)), shape=(len(self.rows), n * k))
        unit = max(budget, 1)
        scale = self.seconds.min(axis=1).sum() or 1.0
        # The last digits decide between equals, always alike.
        tie = np.arange(n * k).reshape(n, k) * 1e-9
        result = milp(
            (self.seconds / scale + tie / max(1, n * k)).ravel(),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint(self._matrix / unit, -np.inf, 1 - np.array(self.base) / unit),
            ],
            integrality=np.ones(n * k),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
        if result.x is None:
            return self.greedy(budget) if result.status == 1 else None  # the tree was too large
        return [int(o) for o in np.argmax(result.x.reshape(n, k), axis=1)]

    def greedy(self, budget: int) -> list[int] | None:
        """From the fastest treatments on, one change after another, always the one that saves most per second."""
        picked = [int(o) for o in np.argmin(self.seconds, axis=1)]
        peaks = self._peaks(picked)
        while max(peaks) > budget:
            over = sum(max(0.0, p - budget) for p in peaks)
            best: tuple[float, int, int] | None = None
            for i in range(self.count):
                for o in range(len(self.names)):
                    if o == picked[i]:
                        continue
                    less = over - sum(max(0.0, p - budget) for p in self._peaks([*picked[:i], o, *picked[i + 1 :]]))
                    more = self.seconds[i, o] - self.seconds[i, picked[i]]
                    if less > 0:
                        rate = less / max(more, 1e-12)
                        if best is None or rate > best[0]:
                            best = (rate, i, o)
            if best is None:
                return None
            picked[best[1]] = best[2]
            peaks = self._peaks(picked)
        return picked
