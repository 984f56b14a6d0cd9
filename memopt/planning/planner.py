"""The search for a plan: sets of passes, and within a set a treatment for each block.

A *set* is a list of passes that act on the whole model (rewrites, offloading, another optimizer). Within a set, blocks
are kept, or recomputed cheaply, or in full, or what they keep waits in host memory (for a CPU, whose memory that is, in
files). Steps in which all blocks are treated alike are profiled on fake tensors, which gives the costs of any mixture
(costs.py); for sets with more passes one such step, with all blocks kept, says how these change the others' costs. A
program (solve.py) then picks a treatment for each block within the budget, and of the sets the one that looks fastest
is taken first: its mixture is profiled itself. What counts is that profile: where it shows more than the budget, the
program is asked again for less, where less, for more. A set that cannot be faster than what was found is not looked at.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from memopt.blocks import find_blocks
from memopt.errors import DoesNotFit, InputError, MemoptError
from memopt.hardware import Hardware
from memopt.memory.profiler import Work, watch_work
from memopt.memory.profiler import describe as describe_inputs
from memopt.memory.show import LABELS
from memopt.passes import Checkpoint, OffloadActivations, OffloadOptimizer
from memopt.planning.costs import StepCosts, carried, costs_of
from memopt.planning.plans import Plan, describe, fingerprint
from memopt.planning.solve import Program
from memopt.registry import Context, Pass, resolve
from memopt.units import format_bytes, parse_bytes

_INSTEAD = re.compile(
    r"(Profile it on|If the model runs with these inputs, profile) true tensors: real=True, or --real\."
)
Say = Callable[[str], None]
TREATMENTS = ("keep", "cheap", "full", "offload")
ROUNDS = 6
"""How often the program is asked again for one set and budget."""
CLOSE = 0.985
"""A plan that takes this share of the budget is not changed further."""
NEAR = 0.9
"""What saves most may take so much more than the budget for a mixture to be tried."""
WORTH = 1.01
"""Less than this factor in time is not worth another profile."""
PIECES = 8
"""In how many pieces an optimizer whose states are away steps at least."""
LADDER = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Shares of the plain peak that are tried besides the budget itself: a plan for less may be no slower."""

REWRITES = ("outer_product", "fused_attention")
EXACT_SETS: tuple[tuple[str, ...], ...] = (
    (),
    ("offload_optimizer",),
    ("lean_ops",),
    ("lean_ops", "offload_activations"),
    ("lean_ops", "offload_activations", "offload_optimizer"),
    ("lean_ops", "offload_activations", "offload_optimizer", "block_swap"),
)
"""Besides rewrites, in training."""
INFER_SETS: tuple[tuple[str, ...], ...] = (
    (),
    ("release",),
    ("offload_skips",),
    ("block_swap",),
    ("offload_skips", "block_swap"),
)
MOVING = ("offload_activations", "offload_optimizer", "offload_skips", "block_swap")
"""Passes that move bytes off the device: into host memory, or into files where that is the device's own."""
LOSSY = ("amp", "optimizer_8bit")
"""Passes that are not exact and may be allowed, by name."""


@dataclass(frozen=True)
class Set:
    """Passes for the whole model, and those among them with which each treatment of blocks is profiled."""

    root: tuple[Pass, ...]
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class Candidate:
    """Passes that were profiled."""

    passes: tuple[Pass, ...]
    costs: StepCosts

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.costs.peak

    @property
    def seconds(self) -> float:
        """Of the step, estimated."""
        return self.costs.seconds


class Search:
    """Plans of one step of one model, for any number of budgets; what was profiled is kept.

    Args:
        work: the step, without passes.
        train, device: as for ``memopt.profile``.
        hardware: what its time is estimated by.
        allow: ``exact``, and names of passes that are not.
        given: passes that are part of every plan.
        say: told what goes on.
    """

    def __init__(
        self,
        work: Work,
        *,
        train: bool,
        device: str,
        hardware: Hardware,
        allow: Sequence[str] = ("exact",),
        given: Sequence[Any] = (),
        say: Say = lambda text: None,
    ) -> None:
        self.work, self.train, self.device = work, train, device
        self.hardware, self.say = hardware, say
        self.allow = check_allow(allow)
        self.given = tuple(pass_ for like in given for pass_ in resolve(like))
        self.blocks = find_blocks(work.model) if train else []
        self.away: Literal["cpu", "disk"] = "disk" if device == "cpu" else "cpu"
        """Where passes move bytes to."""
        self.profiles = 0
        self._seen: dict[str, Candidate | MemoptError] = {}
        self._programs: dict[str, Program | None] = {}

    # --- profiles --------------------------------------------------------------------------------------------------

    def costs(self, passes: Sequence[Pass]) -> StepCosts:
        """A profile of the step with these passes and no others."""
        with torch.random.fork_rng():
            watched = watch_work(self.work, train=self.train, device=self.device, passes=passes, weigh=True)
        return costs_of(watched, self.blocks, self.hardware, passes)

    def look(self, passes: Iterable[Pass], given: bool = True) -> Candidate | None:
        """What a step with these passes, and those that were given, costs; None where they cannot be applied."""
        passes = tuple(passes)
        every = [*self.given, *passes] if given else list(passes)
        key = repr(every)
        if key not in self._seen:
            self.profiles += 1
            self.say(f"profile {self.profiles}: {', '.join(map(describe, every)) or 'no passes'}")
            try:
                self._seen[key] = Candidate(passes, self.costs(every))
            except MemoptError as error:
                self._seen[key] = error
        found = self._seen[key]
        return None if isinstance(found, MemoptError) else found

    def plain(self) -> Candidate:
        """The step without passes, but those that were given."""
        found = self.look(())
        if found is None:
            error = self._seen[repr([*self.given])]
            assert isinstance(error, MemoptError)
            raise type(error)(_INSTEAD.sub("Plans are made on fake tensors alone.", str(error))) from error
        return found

    def bare(self) -> Candidate:
        """The step without any passes; with those that were given where it cannot be profiled without."""
        return self.look((), given=False) or self.plain()

    # --- sets ------------------------------------------------------------------------------------------------------

    def sets(self, lossy: bool) -> list[Set]:
        """The sets of passes to look at, the least drastic first."""
        extras = EXACT_SETS if self.train else INFER_SETS
        rewrites = self._rewrites()
        allowed = [name for name in LOSSY if name in self.allow] if lossy else []
        known = {type(pass_).name for pass_ in (*self.given, *rewrites)}
        useless = set() if self._moves_activations() else {"offload_activations"}
        root = (*rewrites, *(p for p in map(self._make, allowed) if type(p).name not in known and self._finds(p)))
        found = [Set(root, root)]
        for names in extras:
            skipped = known | useless | ({"offload_optimizer"} if "optimizer_8bit" in allowed else set())
            made = (p for p in map(self._make, names) if type(p).name not in skipped and self._finds(p))
            if (each := Set(root, (*root, *made))) not in found:
                found.append(each)
        if rewrites and not lossy:
            found.insert(0, Set((), ()))
        return found

    def _moves_activations(self) -> bool:
        """Whether there is anything as large as what offload_activations moves."""
        return any(t.bytes >= parse_bytes(OffloadActivations().min_bytes) for t in self.plain().costs.story.largest)

    def _make(self, name: str) -> Pass:
        """A pass of a set."""
        options: dict[str, Any] = {"to": self.away} if name in MOVING else {}
        if name == "offload_optimizer":  # small models step by smaller pieces: all at once, nothing would be away
            weights = sum(p.nbytes for p in self.work.model.parameters())
            pieces = max(1, weights // PIECES >> 20)
            if pieces << 20 < parse_bytes(OffloadOptimizer().at_once):
                options["at_once"] = f"{pieces}MiB"
        (made,) = resolve({name: options} if options else name)
        return made

    def _finds(self, pass_: Pass) -> bool:
        """Whether a pass has anything to do in this model, in this kind of step."""
        if ("train" if self.train else "infer") not in type(pass_).modes:
            return False
        optimizers = (self.work.optimizer,) if self.work.optimizer is not None else ()
        try:
            return bool(pass_.plan(self.work.model, Context(optimizers=optimizers)))
        except MemoptError:
            return False

    def _rewrites(self) -> tuple[Pass, ...]:
        """Those rewrites that lower the peak or the time here."""
        found: tuple[Pass, ...] = ()
        known = {type(pass_).name for pass_ in self.given}
        for name in REWRITES:
            (pass_,) = resolve(name)
            if name in known or not self._finds(pass_):
                continue
            before, after = self.look(found), self.look((*found, pass_))
            if before and after and (after.peak < before.peak or after.seconds < before.seconds):
                found = (*found, pass_)
        return found

    def program(self, of: Set) -> Program | None:
        """The program for a set of passes, from steps in which all blocks are treated alike."""
        key = repr(of)
        if key not in self._programs:
            root, keep = self.look(of.root), self.look(of.passes)
            steps = {}
            if root is not None and keep is not None:
                steps["keep"] = keep.costs
                for treatment in self._treatments(of):
                    alike = self.look((*of.root, *self.treated({treatment: self.blocks})))
                    if alike is not None:
                        more = of.root != of.passes
                        steps[treatment] = carried(alike.costs, root.costs, keep.costs) if more else alike.costs
            self._programs[key] = Program(steps) if steps else None
        return self._programs[key]

    def _treatments(self, of: Set) -> tuple[str, ...]:
        """What can be done with a block in a set of passes, but to keep it."""
        if not self.blocks:
            return ()
        # Where what is kept is away already, nothing is left to move.
        away = any(isinstance(pass_, OffloadActivations) for pass_ in (*self.given, *of.passes))
        return TREATMENTS[1:-1] if away or not self._moves_activations() else TREATMENTS[1:]

    def treated(self, by: dict[str, list[str]]) -> list[Pass]:
        """The passes that treat blocks so."""
        found: list[Pass] = []
        for policy in ("cheap", "full"):
            if paths := by.get(policy):
                found.append(Checkpoint(blocks=self._globs(paths), policy=policy))
        if paths := by.get("offload"):
            found.append(OffloadActivations(blocks=self._globs(paths), to=self.away))
        return found

    def _globs(self, paths: Sequence[str]) -> tuple[str, ...]:
        return tuple(map(glob.escape, paths))

    # --- plans -----------------------------------------------------------------------------------------------------

    def best(self, budget: int) -> Candidate | None:
        """The fastest that was found within a budget: exact ones first, lossy ones where these do not fit."""
        for lossy in (False, True) if any(name in LOSSY for name in self.allow) else (False,):
            if (found := self._best(self.sets(lossy), budget)) is not None:
                return found
        return None

    def _best(self, sets: Sequence[Set], budget: int) -> Candidate | None:
        found: Candidate | None = None
        promising: list[tuple[float, int, Set, Program]] = []
        for number, each in enumerate(sets):
            if found is not None and set(found.passes) <= set(each.passes):
                continue  # with more passes of the same kinds it takes no less time
            keep = self.look(each.passes)
            if keep is not None and keep.peak <= budget:
                found = _faster(found, keep)
            elif keep is not None and (program := self._may_fit(each, keep, budget)) is not None:
                modelled = program.solve(budget)
                promising.append((modelled.seconds if modelled else float("inf"), number, each, program))
        for _, _, each, program in sorted(promising, key=lambda one: one[:2]):
            keep = self.look(each.passes)
            if keep is not None and (found is None or keep.seconds < found.seconds):
                found = _faster(found, self._mixture(each, program, budget, found))
        return found

    def _may_fit(self, of: Set, keep: Candidate, budget: int) -> Program | None:
        """The program of a set, if the optimizer's step is within the budget, which no treatment changes, and mixtures
        come near it."""
        if max((n for (phase, *_), n in keep.costs.moments.items() if phase == "optimizer"), default=0) > budget:
            return None
        program = self.program(of) if self.blocks else None
        return program if program is not None and program.least * NEAR <= budget else None

    def _mixture(self, of: Set, program: Program, budget: int, best: Candidate | None) -> Candidate | None:
        """The fastest mixture of treatments whose profile is within the budget, asked for one after another."""
        found: Candidate | None = None
        if of.passes == of.root:  # all blocks alike is a mixture, too, and known
            for name in program.names:
                alike = self.look((*of.passes, *self.treated({name: self.blocks})))
                if alike is not None and alike.peak <= budget:
                    found = _faster(found, alike)
        low, high, target = 0.0, float("inf"), float(budget)  # what was asked for and fitted, or did not
        bound = 0.0  # the modelled time of what did not fit, which nothing that fits can be much below
        for _ in range(ROUNDS):
            choice = program.solve(int(target))
            if choice is None:  # nothing is that small by the model; by the profile something may be
                low = max(low, target)
                guess = max(target * 1.03, float(program.least))
            else:
                if any(c is not None and choice.seconds >= c.seconds for c in (found, best)):
                    break
                tried = self.look((*of.passes, *self.treated(self._by(choice.treatments))))
                if tried is None:
                    return found
                if tried.peak <= budget:
                    found = _faster(found, tried)
                    low = max(low, target)
                    if tried.peak >= CLOSE * budget:
                        break
                else:
                    high, bound = min(high, target), max(bound, choice.seconds)
                if found is not None and found.seconds <= bound * WORTH:
                    break
                # As much too low as the profile was too high, or the other way about.
                guess = target * budget / tried.peak * (0.999 if tried.peak <= budget else 0.997)
            if not low < guess < high:
                guess = (low + high) / 2 if high < float("inf") else low * 1.03
            if high - low < 0.003 * budget or guess > 1.3 * budget:
                break
            target = guess
        return found

    def _by(self, treatments: Sequence[str]) -> dict[str, list[str]]:
        """The blocks of each treatment."""
        by: dict[str, list[str]] = {}
        for path, treatment in zip(self.blocks, treatments, strict=True):
            by.setdefault(treatment, []).append(path)
        return by

    def plan(self, budget: int) -> Plan:
        """The plan for a budget of so many bytes.

        Raises:
            DoesNotFit: nothing does; the message has the smallest budget that would, what holds it, and what helps.
        """
        plain = self.plain()
        found = self.best(budget)
        for share in LADDER:  # a plan for less that is faster than this one shows that this one is not the best
            smaller = int(share * plain.peak)
            if found is None or smaller >= budget:
                continue
            if self._estimate(smaller) >= found.seconds:
                break
            found = _faster(found, self.best(smaller))
        if found is None:
            least = self.smallest(lossy=any(name in LOSSY for name in self.allow))
            if least.peak > budget:
                raise DoesNotFit(self._why_not(least, budget))
            found = least
        return self._made(found, budget)

    def _estimate(self, budget: int) -> float:
        """The least modelled time for a budget among the sets whose programs are there."""
        times = [choice.seconds for p in self._programs.values() if p and (choice := p.solve(budget))]
        return min(times, default=float("inf"))

    def _made(self, found: Candidate, budget: int) -> Plan:
        bare = self.bare()
        counts = {"cheap": 0, "full": 0, "offload": 0}
        for pass_ in found.passes:
            if isinstance(pass_, Checkpoint):
                counts[str(pass_.policy)] += len(pass_.blocks)
            elif isinstance(pass_, OffloadActivations) and pass_.blocks:
                counts["offload"] += len(pass_.blocks)
        steps = {"without passes": bare}
        if self.given:
            steps[f"with {', '.join(map(describe, self.given))}"] = self.plain()
        reasons = [
            f"{format_bytes(each.peak)} {how} is {'within' if each.peak <= budget else 'above'} the budget of "
            f"{format_bytes(budget)}"
            for how, each in steps.items()
        ]
        if found.passes:
            words = {
                "cheap": "recomputed but for products",
                "full": "recomputed in full",
                "offload": "in host memory" if self.away == "cpu" else "in files",
            }
            treated = [f"{n} {words[name]}" for name, n in counts.items() if n]
            rest = len(self.blocks) - sum(counts.values())
            if treated:
                reasons.append(f"of {len(self.blocks)} blocks {', '.join(treated)}, {rest} kept")
            reasons.append(
                f"of what was profiled ({self.profiles} steps on fake tensors), this is the fastest within the budget"
            )
        return Plan(
            passes=(*self.given, *found.passes),
            peak=found.peak,
            seconds=found.seconds,
            budget=budget,
            plain_peak=bare.peak,
            plain_seconds=bare.seconds,
            fingerprint=fingerprint(self.work.model),
            inputs=describe_inputs(self.work.batch),
            train=self.train,
            device=self.device,
            hardware=self.hardware.name,
            reasons=tuple(reasons),
        )

    # --- what does not fit -----------------------------------------------------------------------------------------

    def smallest(self, lossy: bool = False) -> Candidate:
        """The lowest peak among the most drastic sets, with all blocks treated alike."""
        found = self.plain()
        for each in [*self.sets(False)[-2:], *(self.sets(True)[-2:] if lossy else ())]:
            for treatment in ("keep", "full"):
                tried = self.look((*each.passes, *self.treated({treatment: self.blocks})))
                if tried is not None and tried.peak < found.peak:
                    found = tried
        return found

    def _why_not(self, least: Candidate, budget: int) -> str:
        story = least.costs.story
        held = {name: values[story.peak_point] for name, values in story.timeline.bytes.items()}
        order = sorted(((n, name) for name, n in held.items() if n), reverse=True)[:3]
        parts = ", ".join(f"{format_bytes(n)} of {LABELS[name]}" for n, name in order)
        tensors = "; ".join(
            f"{format_bytes(t.bytes)} {'x'.join(map(str, t.shape)) or 'scalar'} {t.dtype} ({LABELS[t.category]}"
            + (f" of {t.module})" if t.module else ")")
            for t in story.largest[:3]
        )
        lines = [
            f"no plan fits {format_bytes(budget)}. The smallest budget that one fits is {format_bytes(least.peak)}, "
            f"with {', '.join(map(describe, (*self.given, *least.passes))) or 'no passes'}. It is held by {parts}; the "
            f"largest tensors: {tensors}."
        ]
        helps = []
        for name in LOSSY:
            if name in self.allow or (name == "optimizer_8bit" and not self.train):
                continue
            (pass_,) = resolve(name)
            others = tuple(
                p for p in least.passes if not (name == "optimizer_8bit" and type(p).name == "offload_optimizer")
            )
            tried = self.look((*others, pass_)) if self._finds(pass_) else None
            if tried is not None and tried.peak < least.peak:
                fits = ", which fits" if tried.peak <= budget else ""
                helps.append(f"{name} lowers it to {format_bytes(tried.peak)}{fits}")
        if helps:
            lines.append(f"Not exact, if allowed: {'; '.join(helps)}.")
        smaller = "a smaller batch or microbatch" if self.train else "a smaller batch"
        lines.append(f"Else give a larger budget or {smaller}.")
        return " ".join(lines)


def check_allow(allow: Sequence[str]) -> tuple[str, ...]:
    """Names of what a plan may use, checked."""
    if isinstance(allow, str):
        allow = (allow,)
    for name in allow:
        if name != "exact" and name not in LOSSY:
            raise InputError(f"allow={name!r}: a plan can be allowed exact, {', '.join(LOSSY)}")
    return tuple(dict.fromkeys(("exact", *allow)))


def _faster(a: Candidate | None, b: Candidate | None) -> Candidate | None:
    """The faster of two, the first where they are alike."""
    if a is None or b is None:
        return a or b
    return b if b.seconds < a.seconds else a
