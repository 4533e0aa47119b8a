"""The cost model behind `strategy="auto"`: which cycle of plans emits most tokens per second on this machine, now.

Time: the fastest step seen for each (rows, whether it drafts), interpolated in rows; minima, because noise only adds.
Tokens: the chance c_i that draft i is accepted given those before it, a running mean that starts at what training
measured.  With survival s_i = c_1 .. c_i and S_k = sum_{i<=k} s_i, K rows a block, B requests:

    ar             1                          / T(B)
    two_forward    (2 + S_k)                  / (T(B (1 + K)) + D + T(B (1 + k)))
    fused, all     (1 + S_k)                  / (T(B (1 + k + (k+1) K)) + D)
    fused, h       (1 + S_k + (1 - m_h))      / (T_h + D + (1 - m_h) (T(B (1 + K)) + D))

    fused tree     (1 + r S)                  / (T(B (1 + n) (1 + K)) + D)

where m_h is the chance that the accept length was among the h prepared; if not, the next step only drafts.  A tree of n
nodes has S = the sum of their survivals as measured at conversion, and r, how much of that came true here so far.
D is part of a drafting step's measured time.  A trial is a step that is run to be timed, for no request.  Not here:
running anything (the steppers do), keeping what was chosen (`policy.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.plan import AR, Cycle, StepPlan, fused, num_rows, two_forward
from retrofit.runtime.rules.tree import DraftTree

PRIOR_WEIGHT = 32.0
"""Observations the prior acceptance counts for."""
MARGIN = 1.02
"""A cycle must promise this much more than `ar` to be chosen: near break-even, noise decides and `ar` is safe."""
REAL_STEPS = 3
"""Timed steps of one kind that outweigh its trials."""
MOST_ROWS = 256
"""Rows of one request and forward beyond which no plan is considered."""
REPEATS = 5
"""How often a plan is tried: the fastest counts."""


@dataclass
class CostModel:
    """Learned step times and acceptance of one engine."""

    layout: DraftLayout
    acceptance: list[float]
    """Prior chance that draft i is accepted, given those before it were."""
    trees: list[DraftTree] = field(default_factory=list)
    """Draft trees worth comparing."""
    times: dict[bool, dict[int, float]] = field(default_factory=lambda: {False: {}, True: {}})
    """drafts? -> rows -> fastest seconds."""
    real: dict[tuple[bool, int], tuple[int, float]] = field(default_factory=dict)
    """(drafts?, rows) -> how many real steps were timed, and the fastest of them."""
    tried: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    branched: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT, PRIOR_WEIGHT])
    """Accepted and expected drafts of trees so far; begins at a ratio of 1."""

    def __post_init__(self) -> None:
        self.tried = [PRIOR_WEIGHT] * len(self.acceptance)
        self.hits = [PRIOR_WEIGHT * a for a in self.acceptance]

    def observe_time(self, rows: int, drafts: bool, seconds: float, *, trial: bool = False) -> None:
        """A trial runs over little or no context: the real steps of the same rows take its place, once there are some.

        One would not do: it may be the step that the machine stumbled over.
        """
        known = self.times[drafts]
        if trial:
            known[rows] = min(known.get(rows, seconds), seconds)
            return
        count, fastest = self.real.get((drafts, rows), (0, seconds))
        self.real[drafts, rows] = count + 1, min(fastest, seconds)
        if count + 1 >= REAL_STEPS or rows not in known:
            known[rows] = min(fastest, seconds)

    def observe_acceptance(self, accepted: int, verified: int) -> None:
        """Draft i was tried if all before it were accepted."""
        for i in range(min(verified, accepted + 1, len(self.tried))):
            self.tried[i] += 1
            self.hits[i] += i < accepted

    def observe(self, accepted: int, verified: int, expected: float | None) -> None:
        """What one verification accepted; expected: of a draft tree, None of a chain."""
        if expected is None:
            self.observe_acceptance(accepted, verified)
        else:
            self.observe_tree(accepted, expected)

    def observe_tree(self, accepted: int, expected: float) -> None:
        self.branched[0] += accepted
        self.branched[1] += expected

    def conditional(self) -> list[float]:
        return [h / t for h, t in zip(self.hits, self.tried, strict=True)]

    def time(self, rows: int, drafts: bool) -> float:
        """Seconds of a step of so many rows, interpolated between the measured row counts."""
        known = sorted(self.times[drafts].items())
        counts = [n for n, _ in known]
        at = bisect_left(counts, rows)
        if at < len(known) and counts[at] == rows:
            return known[at][1]
        if at == 0:
            return known[0][1]
        if at == len(known):
            (n0, t0), (n1, t1) = known[max(0, at - 2)], known[-1]
            slope = max(0.0, (t1 - t0) / (n1 - n0)) if n1 > n0 else 0.0
            return t1 + slope * (rows - n1)
        (n0, t0), (n1, t1) = known[at - 1], known[at]
        return t0 + (t1 - t0) * (rows - n0) / (n1 - n0)

    def rate(self, cycle: Cycle, batch: int) -> float:
        """Expected tokens per second and request."""
        c, K, plan = self.conditional(), self.layout.block, cycle[-1]
        if plan.tree is not None:
            realised = self.branched[0] / self.branched[1]
            return (1 + realised * plan.tree.expected) / self.time(batch * (1 + plan.tree.nodes) * (1 + K), True)
        if cycle == AR:
            return 1 / self.time(batch, False)
        k, h = plan.verify, plan.blocks
        survival, alive = [], 1.0
        for i in range(k):
            alive *= c[i]
            survival.append(alive)
        S = sum(survival)
        draft_only = self.time(batch * num_rows(StepPlan(0, "all"), self.layout), True)
        if len(cycle) == 2:
            return ((2 if self.layout.anchored else 1) + S) / (draft_only + self.time(batch * (1 + k), False))
        lengths = [1.0, *survival]
        chance = sorted((a - b for a, b in zip(lengths, [*survival, 0.0], strict=True)), reverse=True)
        missed = 1 - sum(chance[:h])
        step = self.time(batch * (1 + k + h * K), True)
        return (1 + S + missed) / (step + missed * draft_only)

    def cycles(self, rows: int | None = None) -> list[Cycle]:
        """All cycles worth comparing, of plans of at most so many rows of a request and forward."""
        most, counts = min(MOST_ROWS, rows or MOST_ROWS), range(1, self.layout.drafts + 1)
        cycles = [two_forward(k) for k in counts if num_rows(StepPlan(0, "all"), self.layout) <= (rows or MOST_ROWS)]
        if self.layout.anchored:
            cycles += [fused(k, h if h <= k else "all") for k in counts for h in range(1, k + 2)]
            cycles += [fused(tree.nodes, "all", tree) for tree in self.trees]
        return [cycle for cycle in cycles if num_rows(cycle[-1], self.layout) <= most]

    def best(self, batch: int, rows: int | None = None) -> Cycle:
        """The cycle with the highest expected rate; `ar` unless another beats it by MARGIN.  rows: of a request."""
        if not self.times[True]:
            return AR
        top = max(self.cycles(rows), key=lambda cycle: self.rate(cycle, batch), default=AR)
        return top if self.rate(top, batch) > MARGIN * self.rate(AR, batch) else AR

    def trials(self, room: int, rows: int | None = None) -> list[StepPlan]:
        """What to time once for a batch size, as often as it is to be run: the corners and the middle of all plans.

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
