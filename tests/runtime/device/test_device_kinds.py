"""Kinds of forward a plan needs on the device, and that they fit its rows."""

import pytest

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto.cost import Template
from retrofit.runtime.device.kinds import Kind, chain, fixed_template, kinds_of
from retrofit.runtime.kernels.state import ALL, GIVEN, LAST
from retrofit.runtime.rules.tree import grow


def test_kinds_of_a_plan() -> None:
    assert kinds_of(Template("ar")) == [Kind("ar", (-1,))]
    draft, verify = kinds_of(Template("two_forward", 2))
    assert (draft.rows, draft.blocks, draft.draft_parents) == (1, 1, chain(2))
    assert (verify.rows, verify.blocks, verify.parents) == (3, 0, draft.draft_parents)
    for template, hang in (
        (Template("fused", 2, 3), ALL),
        (Template("fused", 2, 2), GIVEN),
        (Template("last", 2, 1), LAST),
    ):
        (kind,) = kinds_of(template)
        assert (kind.parents, kind.blocks, kind.hang, kind.anchors) == (chain(2), template.prepare, hang, None)
        assert kind.draft_parents == kind.parents
    shape = grow(((0.5, 0.4), (0.5, 0.4)), 4)
    (kind,) = kinds_of(Template("fused", 4, 2, shape))
    assert (kind.parents, kind.draft_ranks) == (shape.parents, shape.ranks)
    assert (kind.hang, kind.anchors) == (GIVEN, shape.likeliest_ends(2))


@pytest.mark.parametrize("rows", [None, 1, 2, 3, 4, 5, 8, 16, 40])
@pytest.mark.parametrize("prepare", ["all", "last", 1, 2, 9])
@pytest.mark.parametrize("strategy", ["ar", "two_forward", "fused"])
def test_fixed_plans_fit_their_rows(strategy: str, prepare: str | int, rows: int | None) -> None:
    layout = DraftLayout(block=3)
    template = fixed_template(strategy, prepare, layout, None, rows)
    for kind in kinds_of(template):
        assert rows is None or kind.rows + kind.blocks * layout.block <= max(rows, 1)
        assert kind.hang != ALL or kind.blocks in (0, kind.rows)
    if rows is None and strategy == "fused":
        assert template.verify == layout.drafts
        assert template.prepare == (1 if prepare == "last" else 4 if prepare == "all" else min(int(prepare), 4))
    if rows is not None and rows < 4:
        assert template.strategy == "ar"
