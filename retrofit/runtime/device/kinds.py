"""The kinds of step that a plan takes on the device, in turn: what each verifies, drafts and hangs blocks on.

    ar            {seed}
    two_forward   {seed} + block  |  {seed, d_1 .. d_k}
    fused         {seed, d_1 .. d_k} + blocks on all rows, on the last, or on the likeliest h; drafts may branch

A kind is static: it is recorded once for a number of lanes.  Not here: running it (`device_loop.py`), which plan pays.
"""

from __future__ import annotations

from dataclasses import dataclass

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto.cost import Template
from retrofit.runtime.kernels.state import ALL, GIVEN, LAST
from retrofit.runtime.rules.tree import Shape


@dataclass(frozen=True)
class Kind:
    """One kind of step: what is verified, where blocks hang, what is drafted from the block that comes true."""

    name: str
    parents: tuple[int, ...]
    blocks: int = 0
    hang: int = ALL
    draft_parents: tuple[int, ...] = (-1,)
    draft_ranks: tuple[int, ...] = (0,)
    anchors: tuple[int, ...] | None = None
    """Rows that blocks hang on, where they are always the same; None with GIVEN: where the confidence head says."""

    @property
    def rows(self) -> int:
        """Base rows of a request."""
        return len(self.parents)


def chain(nodes: int) -> tuple[int, ...]:
    return tuple(range(-1, nodes))


def kinds_of(template: Template) -> list[Kind]:
    """The steps that a plan of `auto`, or a fixed strategy, takes in turn."""
    k, h = template.verify, template.prepare
    if template.strategy == "ar":
        return [Kind("ar", chain(0))]
    if template.strategy == "two_forward":
        drafts = {"draft_parents": chain(k), "draft_ranks": (0,) * (k + 1)}
        return [Kind("draft", chain(0), 1, ALL, **drafts), Kind("verify", chain(k))]
    if template.shape is not None:
        shape = template.shape
        every = h == len(shape.parents)
        anchors = None if every else shape.likeliest_ends(h)
        return [Kind("fused", shape.parents, h, ALL if every else GIVEN, shape.parents, shape.ranks, anchors)]
    hang = LAST if template.strategy == "last" else ALL if h == k + 1 else GIVEN
    return [Kind("fused", chain(k), h, hang, chain(k), (0,) * (k + 1))]


def fixed_template(
    strategy: str, prepare: str | int, layout: DraftLayout, shape: Shape | None, rows: int | None
) -> Template:
    """The plan of a fixed strategy, cut to `rows` rows of a request: blocks go first, then drafts, down to `ar`."""
    most = rows or 1 << 30
    if strategy == "ar" or 1 + layout.block > most:
        return Template("ar")
    if strategy == "two_forward":
        return Template("two_forward", min(layout.drafts, most - 1))
    verify = min(layout.drafts, most - 1 - layout.block)
    if verify < 1:  # no room to verify beside a block, only in turn with it
        return Template("two_forward", min(layout.drafts, most - 1))
    if prepare == "last":
        return Template("last", verify, 1)
    if shape is not None:
        shape = shape.first(most - 1 - layout.block)
        wanted = len(shape.parents) if prepare == "all" else min(int(prepare), len(shape.parents))
        return Template("fused", shape.nodes, min(wanted, (most - 1 - shape.nodes) // layout.block), shape)
    wanted = verify + 1 if prepare == "all" else min(int(prepare), verify + 1)
    return Template("fused", verify, min(wanted, (most - 1 - verify) // layout.block))


def name_of(kind: Kind, verified: int) -> str:
    """The kind of forward that a step was for one request, as the statistics count them."""
    if kind.blocks:
        return "fused" if verified else "draft"
    return "verify" if verified else "ar"
