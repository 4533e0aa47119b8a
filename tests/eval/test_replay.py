"""The auditor's own parts: trees it cuts and follows, prompt lookup, crossings of a longrope boundary, bad rows."""

import random

import pytest
import torch
from decoding import Oracle, random_prompts, randomise
from tiny_models import CONTEXT, ORIGINAL_CONTEXT, build

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import Block, SequenceRows
from retrofit.eval import audit
from retrofit.eval.recording import Proposal, Recorded
from retrofit.eval.replay import Asked, Auditor, Sampling, cut, looked_up, paths_of
from retrofit.runtime import plan
from retrofit.runtime.engine import Engine
from retrofit.runtime.rules.lookup import Lookup
from retrofit.runtime.rules.tree import accepted_path, grow

V = 16
TREE = [-1, 0, 0, 1, 3]
"""A seed with two candidates, and two more in a row behind the first."""


def test_prompt_lookup_is_the_engines():
    drawn = random.Random(0)
    for length in range(1, 40):
        tokens = [drawn.randrange(4) for _ in range(length)]
        assert looked_up(tokens, 5) == Lookup(tokens, 5).proposal(), tokens


def test_cut_is_the_engines():
    shape = grow([[0.5, 0.3, 0.1], [0.4, 0.3], [0.3, 0.2]], 14)
    tokens = list(range(100, 100 + shape.nodes))
    for deep in range(4):
        kept = shape.cut(deep)
        got = cut(Proposal(tokens, list(shape.parents)), deep)
        assert got == ([t for t, d in zip(tokens, shape.depths[1:], strict=True) if d <= deep], list(kept.parents))


def test_paths():
    assert paths_of([-1, 0, 0, 1]) == [[0], [0, 1], [0, 2], [0, 1, 3]]
    for parents in ([0], [-1, 1], [-1, 2, 0], [-1, -1]):
        assert paths_of(parents) is None


def logits(*targets):
    """Of rows that have these targets."""
    return torch.nn.functional.one_hot(torch.tensor(targets), V).float()


def one_step(
    tokens, parents, targets, *, positions=(3, 4, 4, 5, 6), paths=None, proposal=None, eos=(), limit=9, start=3
):
    """(auditor, texts) of a prompt, a forward that drafts, and one over a tree whose rows have these targets."""
    prompt, newest = [1, 2], 3
    drafts = proposal or Proposal(list(tokens[1:]), list(parents))
    own = paths or [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 3, 4]]
    seed = SequenceRows(0, 2, [9], [Block(3, [-1] * 4, 0)])
    forwards = [
        Recorded([SequenceRows(0, 0, prompt, last_logits_only=True)], logits(9), [0, 1], None),
        Recorded([seed], logits(newest), [2], None, {(0, 2): drafts}),
        Recorded([SequenceRows(0, start, tokens, parents=parents)], logits(*targets), list(positions), own),
    ]
    auditor = Auditor(Asked([prompt], [0], [limit], Sampling(), "fused", frozenset(eos), 64, None, 4, 0))
    for forward in forwards:
        auditor.replay(forward)
    return auditor, auditor.texts()


def test_a_tree_is_followed_by_its_own_targets():
    """Row 1 is right, row 3 after it as well, row 4 is not; row 2 is the sibling that was not to be."""
    tokens, targets = [3, 5, 6, 7, 8], [5, 7, 0, 9, 0]
    auditor, (text,) = one_step(tokens, TREE, targets)
    assert not auditor.problems
    assert text == [9, 3, 5, 7, 9]
    assert text[2:] == [targets[j] for j in accepted_path(tokens, TREE, targets)]
    assert (auditor.verified, auditor.accepted, auditor.branched) == (4, 2, 1)


def test_a_tree_ends_with_the_text():
    tokens, targets = [3, 5, 6, 7, 8], [5, 7, 0, 9, 0]
    assert one_step(tokens, TREE, targets, eos=(7,))[1] == [[9, 3, 5, 7]]
    assert one_step(tokens, TREE, targets, limit=4)[1] == [[9, 3, 5, 7]]


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"parents": [-1, 0, 3, 1, 3]}, "(rows)"),
        ({"positions": [3, 4, 5, 6, 7]}, "(rows)"),
        ({"paths": [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4]]}, "(rows)"),
        ({"start": 4}, "(rows)"),
        ({"tokens": [4, 5, 6, 7, 8]}, "(rows)"),
        ({"proposal": Proposal([5, 6, 7, 1], TREE)}, "(draft)"),
        ({"proposal": Proposal([5, 6, 7, 8], [-1, 0, 0, 2, 3])}, "(draft)"),
        ({"proposal": Proposal([5, 6], [-1, 0, 0])}, "(length)"),
        ({"limit": 4}, "(length)"),
    ],
)
def test_what_is_wrong_with_a_tree_is_said(changed, rule):
    given = {"tokens": [3, 5, 6, 7, 8], "parents": TREE, "targets": [5, 7, 0, 9, 0], **changed}
    auditor, _ = one_step(**given)
    assert any(problem.endswith(rule) for problem in auditor.problems), auditor.problems


def test_rows_after_the_end():
    forwards = [
        Recorded([SequenceRows(0, 0, [1], last_logits_only=True)], logits(5), [0], None),
        Recorded([SequenceRows(0, 1, [5])], logits(5), [1], None),
    ]
    auditor = Auditor(Asked([[1]], [0], [1], Sampling(), "auto", frozenset(), 64, None, 4, 0))
    for forward in forwards:
        auditor.replay(forward)
    assert auditor.texts() == [[5]]
    assert auditor.problems == ["slot 0: rows where no text is being written (rows)"]


@pytest.mark.parametrize("strategy", ["two_forward", "fused", "prompt_lookup", "hybrid", "in turn", "auto"])
def test_a_longrope_crossing(strategy, monkeypatch):
    """Prompts on either side of the boundary, more than run at once; drafts that are right about it and wrong."""
    engine = randomise(Engine.from_model(build("phi3_longrope"), layout=DraftLayout(block=4)))
    lengths = (ORIGINAL_CONTEXT - 5, ORIGINAL_CONTEXT + 3, 2, ORIGINAL_CONTEXT - 1, CONTEXT - 4)
    prompts, limits = random_prompts(lengths), [12] * len(lengths)
    truth = engine.generate(prompts, "ar", max_new_tokens=12, ignore_eos=True)
    Oracle({1000 + r.index: r.tokens for r in truth}).plant(monkeypatch)
    ways = {"fused": {"tree": 6}, "in turn": {"strategy": "hybrid", "prepare": "none"}}
    options = {"strategy": strategy, "batch_size": 3, **ways.get(strategy, {})}
    with audit.every_plan(engine):
        found = audit.audit_run(engine, prompts, limits, audit.GREEDY, **options)
    assert not found.problems
    assert found.texts == [r.tokens for r in truth]
    assert found.auditor.accepted > 0 or strategy == "prompt_lookup"
    right = plan.Limits.end
    monkeypatch.setattr(plan.Limits, "end", lambda self, request: max(right(self, request), ORIGINAL_CONTEXT + 3))
    with audit.every_plan(engine):
        crossed = audit.audit_run(engine, prompts, limits, audit.GREEDY, **options)
    assert crossed.problems or strategy == "prompt_lookup"
