"""The cost model behind `strategy="auto"`: which plan emits most tokens per second on this machine, now.

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
D is part of a drafting step's measured time.  Not here: running anything but the probe forwards it is given.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.rules.tree import Shape

PRIOR_WEIGHT = 32.0
"""Observations the prior acceptance counts for."""
MARGIN = 1.02
"""A plan must promise this much more than `ar` to be chosen: near break-even, noise decides and `ar` is safe."""


REAL_STEPS = 3
"""Timed steps of one kind that outweigh its probes."""
MOST_ROWS = 256
"""Rows of one request and forward beyond which no plan is considered."""


@dataclass(frozen=True)
class Template:
    """One kind of plan: drafts verified, accept lengths prepared, draft tree.

    strategy: `ar | two_forward | fused`, or `last`, which is `fused` with a block on the last draft only.
    """

    strategy: str
    verify: int = 0
    prepare: int = 0
    shape: Shape | None = None


@dataclass
class CostModel:
    """Learned step times and acceptance of one engine."""

    layout: DraftLayout
    acceptance: list[float]
    """Prior chance that draft i is accepted, given those before it were."""
    shapes: list[Shape] = field(default_factory=list)
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

    def observe_time(self, rows: int, drafts: bool, seconds: float, *, probe: bool = False) -> None:
        """A probe runs over little or no context: the real steps of the same rows take its place, once there are some.

        One would not do: it may be the step that the machine stumbled over.
        """
        known = self.times[drafts]
        if probe:
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

    def rate(self, template: Template, batch: int) -> float:
        """Expected tokens per second and request."""
        c, K = self.conditional(), self.layout.block
        if template.shape is not None:
            realised = self.branched[0] / self.branched[1]
            rows = batch * (1 + template.shape.nodes) * (1 + K)
            return (1 + realised * template.shape.expected) / self.time(rows, True)
        k, h = template.verify, template.prepare
        survival, alive = [], 1.0
        for i in range(k):
            alive *= c[i]
            survival.append(alive)
        S = sum(survival)
        if template.strategy == "ar":
            return 1 / self.time(batch, False)
        anchored = self.layout.anchored
        draft_only = self.time(batch * ((1 if anchored else 0) + K), True)
        if template.strategy == "two_forward":
            return ((2 if anchored else 1) + S) / (draft_only + self.time(batch * (1 + k), False))
        lengths = [1.0, *survival]
        chance = sorted((a - b for a, b in zip(lengths, [*survival, 0.0], strict=True)), reverse=True)
        missed = 1 - sum(chance[:h])
        fused = self.time(batch * (1 + k + h * K), True)
        return (1 + S + missed) / (fused + missed * draft_only)

    def templates(self, rows: int | None = None) -> list[Template]:
        """All plans worth comparing, of at most so many rows of a request and forward."""
        D = self.layout.drafts
        drafting = (1 if self.layout.anchored else 0) + self.layout.block
        plans = [Template("two_forward", k) for k in range(1, D + 1) if drafting <= (rows or MOST_ROWS)]
        if self.layout.anchored:
            plans += [Template("fused", k, h) for k in range(1, D + 1) for h in range(1, k + 2)]
            plans += [Template("fused", shape.nodes, shape.nodes + 1, shape) for shape in self.shapes]
        return [p for p in plans if 1 + p.verify + p.prepare * self.layout.block <= min(MOST_ROWS, rows or MOST_ROWS)]

    def best(self, batch: int, rows: int | None = None) -> Template:
        """The plan with the highest expected rate; `ar` unless another beats it by MARGIN.  rows: of a request."""
        ar = Template("ar")
        if not self.times[True]:
            return ar
        top = max(self.templates(rows), key=lambda t: self.rate(t, batch), default=ar)
        return top if self.rate(top, batch) > MARGIN * self.rate(ar, batch) else ar


def probe_rows(model: CostModel) -> list[tuple[int, int]]:
    """(verified, prepared) pairs per request to time once for a batch size: the corners and the middle of all plans."""
    layout = model.layout
    D = layout.drafts
    pairs = [(0, 0), (max(1, D // 2), 0), (D, 0), (0, 1)]
    if layout.anchored:
        pairs += [(1, 2), (max(1, D // 2), max(1, D // 2)), (D, D + 1)]
        pairs += [(shape.nodes, shape.nodes + 1) for shape in model.shapes]
    return list(dict.fromkeys(pairs))


def calibrate(
    model: CostModel,
    batch: int,
    step: Callable[[int, int], float],
    room: int,
    rows: int | None = None,
    repeats: int = 5,
) -> None:
    """Time the probe plans that fit into `room` positions, and into `rows` rows of a request.

    `step(verified, prepared)` runs one and returns its seconds.
    """
    K = model.layout.block
    pairs = [
        (verified, prepared)
        for verified, prepared in probe_rows(model)
        if max(verified, prepared - 1) + (K if prepared else 0) < room
        and 1 + verified + prepared * K <= min(MOST_ROWS, rows or MOST_ROWS)
    ]
    for _ in range(repeats):
        for verified, prepared in pairs:
            base = 1 if (model.layout.anchored or not prepared) else 0
            rows = batch * (base + verified + prepared * model.layout.block)
            model.observe_time(rows, prepared > 0, step(verified, prepared), probe=True)
