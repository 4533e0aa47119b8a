"""The cost model behind `strategy="auto"`: which cycle of plans emits most tokens per second on this machine, now.

Time: what steps of so many rows took (`times.py`).  Tokens: the chance c_i that draft i is accepted given those before
it, a running mean that starts at what training measured.  With survival s_i = c_1 .. c_i and S_k = sum_{i<=k} s_i,
K rows a block, B requests:

    ar             1                          / T(B)
    two_forward    (2 + S_k)                  / (T(B (1 + K)) + D + T(B (1 + k)))
    fused, all     (1 + S_k)                  / (T(B (1 + k + (k+1) K)) + D)
    fused, h       (1 + S_k + (1 - m_h))      / (T_h + D + (1 - m_h) (T(B (1 + K)) + D))
    fused tree     (1 + r S)                  / (T(B (1 + n) (1 + K)) + D)
    prompt lookup  what it would have emitted in these texts / T(its rows)
    hybrid         what it has emitted a step here, at first what tree and prompt lookup would together / T(its rows),
                   in one forward or in two, whose mean counts

where m_h is the chance that the accept length was among the h prepared; if not, the next step only drafts.  A tree of n
nodes has S = the sum of their survivals as measured at conversion, and r, how much of that came true here so far.
D is part of a drafting step's measured time.  Not here: running anything (the steppers do), what is tried and for how
long it is kept (`policy.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto.times import StepTimes
from retrofit.runtime.plan import (
    AR,
    BEYOND_TEXT,
    Cycle,
    StepPlan,
    fused,
    hybrid,
    hybrid_in_turn,
    lookup,
    num_rows,
    two_forward,
)
from retrofit.runtime.rules.tree import DraftTree

PRIOR_WEIGHT = 16.0
"""Observations the prior acceptance counts for."""
MOST_WEIGHT = 512.0
"""Observations that are remembered: texts change."""
REMEMBERED = 64.0
"""Steps of `hybrid` that its mean is made of."""
MARGIN = 1.02
"""A cycle must promise this much more than `ar` to be chosen: near break-even, noise decides and `ar` is safe."""
MOST_ROWS = 256
"""Rows of one request and forward beyond which no plan is considered."""
REPEATS = 5
"""How often a plan is tried on a device."""


@dataclass(frozen=True)
class Looked:
    """What prompt lookup would do in the texts that run: tokens a step of each, and rows a step of all."""

    emitted: float
    rows: int


@dataclass
class CostModel:
    """Learned step times and acceptance of one engine."""

    layout: DraftLayout
    acceptance: list[float]
    """Prior chance that draft i is accepted, given those before it were."""
    trees: list[DraftTree] = field(default_factory=list)
    """Draft trees worth comparing."""
    times: StepTimes = field(default_factory=StepTimes)
    in_turn: list[DraftTree] = field(default_factory=list)
    """Draft trees worth verifying with no block beside them."""
    tried: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    branched: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT, PRIOR_WEIGHT])
    """Accepted and expected drafts of trees so far; begins at a ratio of 1."""
    grafted: dict[Cycle, list[float]] = field(default_factory=dict)
    """Of each `hybrid`: tokens emitted, and steps."""

    def __post_init__(self) -> None:
        self.tried = [PRIOR_WEIGHT] * len(self.acceptance)
        self.hits = [PRIOR_WEIGHT * a for a in self.acceptance]

    def observe(self, accepted: int, verified: int, expected: float | None) -> None:
        """What one verification accepted; expected: of a draft tree, None of a chain."""
        if expected is None:
            self.observe_acceptance(accepted, verified)
        else:
            self.observe_tree(accepted, expected)

    def observe_acceptance(self, accepted: int, verified: int) -> None:
        """Draft i was tried if all before it were accepted."""
        for i in range(min(verified, accepted + 1, len(self.tried))):
            self.tried[i] += 1
            self.hits[i] += i < accepted
            if self.tried[i] > MOST_WEIGHT:
                self.hits[i] *= MOST_WEIGHT / self.tried[i]
                self.tried[i] = MOST_WEIGHT

    def observe_tree(self, accepted: int, expected: float) -> None:
        self.branched[0] += accepted
        self.branched[1] += expected
        if self.branched[1] > MOST_WEIGHT:
            self.branched = [MOST_WEIGHT * self.branched[0] / self.branched[1], MOST_WEIGHT]

    def observe_hybrid(self, cycle: Cycle, emitted: float) -> None:
        """emitted: tokens of one of its steps, a request."""
        tokens, steps = self.grafted.get(cycle, (0.0, 0.0))
        kept = min(1.0, REMEMBERED / (steps + 1))
        self.grafted[cycle] = [kept * (tokens + emitted), kept * (steps + 1)]

    def conditional(self) -> list[float]:
        return [h / t for h, t in zip(self.hits, self.tried, strict=True)]

    def rate(self, cycle: Cycle, batch: int, context: int = 0, looked: Looked | None = None) -> float:
        """Expected tokens per second and request."""
        K, plan = self.layout.block, cycle[-1]
        if cycle == AR:
            return 1 / self.times.seconds(batch, False, context)
        if cycle == lookup(self.layout):
            return 0.0 if looked is None else looked.emitted / self.times.seconds(looked.rows, False, context)
        if plan.rows is not None:
            took = [self.times.seconds(batch * num_rows(p, self.layout), p.blocks > 0, context) for p in cycle]
            return self._emitted_by_hybrid(cycle, looked) / mean(took)
        if plan.tree is not None:
            realised = self.branched[0] / self.branched[1]
            rows = batch * (1 + plan.tree.nodes) * (1 + K)
            return (1 + realised * plan.tree.expected) / self.times.seconds(rows, True, context)
        k, h = plan.verify, plan.blocks
        survival, alive = [], 1.0
        for chance in self.conditional()[:k]:
            alive *= chance
            survival.append(alive)
        S = sum(survival)
        draft_only = self.times.seconds(batch * num_rows(StepPlan(0, "all"), self.layout), True, context)
        if len(cycle) == 2:
            verifying = self.times.seconds(batch * (1 + k), False, context)
            return ((2 if self.layout.anchored else 1) + S) / (draft_only + verifying)
        lengths = [1.0, *survival]
        chances = sorted((a - b for a, b in zip(lengths, [*survival, 0.0], strict=True)), reverse=True)
        missed = 1 - sum(chances[:h])
        step = self.times.seconds(batch * (1 + k + h * K), True, context)
        return (1 + S + missed) / (step + missed * draft_only)

    def _emitted_by_hybrid(self, cycle: Cycle, looked: Looked | None) -> float:
        """Tokens of a step; what its sources promise counts for PRIOR_WEIGHT steps.

        The tree's drafts come once a cycle, the text's in every forward.  Both add up: what the text knows is seldom
        what the drafter is sure of (LOG.md).
        """
        drafts = self.branched[0] / self.branched[1] * cycle[0].worth / BEYOND_TEXT
        promised = 1 + drafts / len(cycle) + (0.0 if looked is None else looked.emitted - 1)
        tokens, steps = self.grafted.get(cycle, (0.0, 0.0))
        return (PRIOR_WEIGHT * promised + tokens) / (PRIOR_WEIGHT + steps)

    def hybrids(self, rows: int | None = None) -> list[Cycle]:
        """`hybrid` in as many rows as each of the trees takes, of at most so many of a request and forward."""
        most = min(MOST_ROWS, rows or MOST_ROWS)
        cycles = [hybrid(self.layout, tree) for tree in self.trees]
        cycles += [hybrid_in_turn(self.layout, tree) for tree in self.in_turn]
        return [cycle for cycle in cycles if all(num_rows(plan, self.layout) <= most for plan in cycle)]

    def cycles(self, rows: int | None = None) -> list[Cycle]:
        """All cycles of drafts of ours worth comparing, of plans of at most so many rows of a request and forward."""
        most, counts = min(MOST_ROWS, rows or MOST_ROWS), range(1, self.layout.drafts + 1)
        cycles = [two_forward(k) for k in counts if num_rows(StepPlan(0, "all"), self.layout) <= (rows or MOST_ROWS)]
        if self.layout.anchored:
            cycles += [fused(k, h if h <= k else "all") for k in counts for h in range(1, k + 2)]
            cycles += [fused(tree.nodes, "all", tree) for tree in self.trees]
        return [cycle for cycle in cycles if num_rows(cycle[-1], self.layout) <= most]

    def best(self, batch: int, rows: int | None = None, context: int = 0, looked: Looked | None = None) -> Cycle:
        """The cycle with the highest expected rate; `ar` unless another beats it by MARGIN.  rows: of a request."""
        cycles = [*self.cycles(rows), *([lookup(self.layout), *self.hybrids(rows)] if looked else [])]
        rates = [self.rate(cycle, batch, context, looked) for cycle in cycles]
        top = max(rates, default=0.0)
        return cycles[rates.index(top)] if top > MARGIN * self.rate(AR, batch, context) else AR

    def trials(self, room: int, rows: int | None = None) -> list[StepPlan]:
        """What a device times once for a batch size, as often as it is to be run: the corners and the middle of all.

        room: positions there are.  rows: most rows of a request.
        """
        D, K, most = self.layout.drafts, self.layout.block, min(MOST_ROWS, rows or MOST_ROWS)
        middle = max(1, D // 2)
        plans = [StepPlan(), StepPlan(middle), StepPlan(D), two_forward(D)[0]]
        if self.layout.anchored:
            cycles = [fused(1), fused(middle, middle), fused(D), *(fused(t.nodes, "all", t) for t in self.trees)]
            plans += [plan for (plan,) in cycles]
        different: dict[tuple[int, int], StepPlan] = {}
        for plan in plans:
            different.setdefault((plan.verify, plan.blocks), plan)
        fitting = [
            plan
            for (verify, blocks), plan in different.items()
            if max(verify, blocks - 1) + (K if blocks else 0) < room and 1 + verify + blocks * K <= most
        ]
        return fitting * REPEATS
