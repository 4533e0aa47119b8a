"""Draft trees: the best of their size against every tree there is, and of their size whatever was measured."""

import random
from collections.abc import Sequence
from itertools import combinations

import pytest
from decoding import random_prompts, randomise, tokens_of
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.device.lowering import lowered
from retrofit.runtime.engine import Engine
from retrofit.runtime.plan import cut_cycle, fixed_cycle
from retrofit.runtime.rules.tree import UNKNOWN_CHANCE, DraftTree, accepted_path, fixed_tree, grow

Path = tuple[int, ...]  # of a node: the rank of each step from the seed
Table = Sequence[Sequence[float]]

ZEROS = [[0.0, 0.0]] * 3
ZERO_FIRST = [[0.0, 0.3], [0.5, 0.0]]
RAGGED = [[0.5, 0.2, 0.1], [0.4], [0.0, 0.3]]
TABLES = {"zeros": ZEROS, "zero first": ZERO_FIRST, "ragged": RAGGED}


def paths_of(tree: DraftTree) -> list[Path]:
    found: list[Path] = [()]
    for parent, rank in list(zip(tree.parents, tree.ranks, strict=True))[1:]:
        found.append((*found[parent], rank))
    return found


def every_path(chance: Table) -> list[Path]:
    found: list[Path] = [()]
    for path in found:
        if len(path) < len(chance):
            found += [(*path, rank) for rank in range(len(chance[len(path)]))]
    return found[1:]


def survival(chance: Table, path: Path) -> float:
    alive = 1.0
    for slot, rank in enumerate(path):
        alive *= chance[slot][rank]
    return alive


def best_of_all_trees(chance: Table, nodes: int) -> float:
    """The largest expected accepted length of any tree of so many nodes: all sets of paths that hold their parents."""
    best = 0.0
    for some in combinations(every_path(chance), nodes):
        if all(len(path) == 1 or path[:-1] in some for path in some):
            best = max(best, sum(survival(chance, path) for path in some))
    return best


def checked(chance: Table, nodes: int) -> DraftTree:
    """The grown tree, once its parts fit together: no node twice, parents first, survivals those of the paths."""
    tree = grow(chance, nodes)
    paths = paths_of(tree)
    assert len(set(paths)) == len(paths) and set(paths[1:]) <= set(every_path(chance))
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert tree.survival == pytest.approx([survival(chance, path) for path in paths])
    assert sorted(tree.survival, reverse=True) == list(tree.survival), "the first n are the best n"
    assert tree.depths == tuple(map(len, paths))
    return tree


def random_table(rng: random.Random, falling: bool) -> Table:
    """Two or three slots of one to three candidates, some never seen; `falling`: none likelier than one before it."""
    rows = []
    for _ in range(rng.randint(2, 3)):
        row = [rng.choice([0.0, rng.random(), rng.random()]) for _ in range(rng.randint(1, 3))]
        total = max(1.0, sum(row))
        rows.append([c / total for c in (sorted(row, reverse=True) if falling else row)])
    return rows


@pytest.mark.parametrize("falling", [True, False])
def test_no_tree_of_the_same_size_has_a_larger_expected_length(falling: bool) -> None:
    rng = random.Random(0)
    for _ in range(40):
        chance = random_table(rng, falling)
        for nodes in range(1, 5):
            tree = checked(chance, nodes)
            assert tree.nodes == min(nodes, len(every_path(chance))), chance
            assert tree.expected == pytest.approx(best_of_all_trees(chance, tree.nodes)), (chance, nodes)


def test_a_tree_by_hand() -> None:
    """.5, then .5 * .6 = .3, .2, .15, .2 * .6 = .12, and only then .5 * .2 = .1."""
    tree = checked([[0.5, 0.2, 0.15], [0.6, 0.2]], 5)
    assert tree.parents == (-1, 0, 1, 0, 0, 3)
    assert tree.ranks == (0, 0, 0, 1, 2, 0)
    assert tree.survival == pytest.approx((1, 0.5, 0.3, 0.2, 0.15, 0.12))
    assert tree.expected == pytest.approx(0.5 + 0.3 + 0.2 + 0.15 + 0.12)


@pytest.mark.parametrize("name", TABLES)
def test_a_tree_has_the_nodes_it_was_asked_for_while_there_are_candidates(name: str) -> None:
    """A few samples measure many a chance as 0, which must not end the tree."""
    chance = TABLES[name]
    most = len(every_path(chance))
    for nodes in range(most + 2):
        assert checked(chance, nodes).nodes == min(nodes, most)
    assert grow(chance, most + 1).expected == pytest.approx(sum(survival(chance, path) for path in every_path(chance)))


def test_what_was_never_seen_comes_last_and_likely_ranks_first() -> None:
    # seen: (1,) .3 and (1, 0) .15.  never seen: (0,) is halved once, (0, 0) twice, (0, 1) three and (1, 1) four times
    assert paths_of(grow(ZERO_FIRST, 6)) == [(), (1,), (1, 0), (0,), (0, 0), (0, 1), (1, 1)]
    assert paths_of(grow(ZEROS, 4)) == [(), (0,), (1,), (0, 0), (0, 1)]  # equal ones in the order of their parents


def test_no_candidates_no_nodes() -> None:
    for chance in ([], [[]], [[], [0.5]]):
        assert grow(chance, 3) == DraftTree((-1,), (0,), (1.0,))
    assert grow([[0.5]], 0).nodes == 0


def test_cut_first_and_likeliest_ends_by_hand() -> None:
    # 0 - 1 (.5) - 2 (.3) and 0 - 3 (.2) - 5 (.12), 0 - 4 (.15)
    tree = grow([[0.5, 0.2, 0.15], [0.6, 0.2]], 5)
    assert tree.first(3) == DraftTree((-1, 0, 1, 0), (0, 0, 0, 1), tree.survival[:4])
    assert tree.first(5) is tree and tree.first(9) is tree
    assert tree.cut(1) == DraftTree((-1, 0, 0, 0), (0, 0, 1, 2), tuple(tree.survival[j] for j in (0, 1, 3, 4)))
    assert tree.cut(2) is tree
    # the path ends at 0 with 1 - .5 - .2 - .15 = .15, at 1 with .2, 2 .3, 3 .08, 4 .15, 5 .12
    assert [tree.likeliest_ends(n) for n in (1, 2, 3, 5)] == [(2,), (1, 2), (0, 1, 2), (0, 1, 2, 4, 5)]
    # 0 - 1 - 2 - 3 and 0 - 4 - 5: without 3, node 5 becomes 4 and its parent 3
    deep = DraftTree((-1, 0, 1, 2, 0, 4), (0, 0, 0, 0, 1, 0), (1.0, 0.5, 0.3, 0.2, 0.2, 0.1))
    assert deep.cut(2) == DraftTree((-1, 0, 1, 0, 3), (0, 0, 0, 1, 0), (1.0, 0.5, 0.3, 0.2, 0.1))


def test_the_accepted_path_follows_the_target_of_each_row() -> None:
    #   0 -> 1 (token 5) -> 3 (token 7);  0 -> 2 (token 6) -> 4 (token 7)
    tokens, parents = [9, 5, 6, 7, 7], [-1, 0, 0, 1, 2]
    assert accepted_path(tokens, parents, [6, 7, 7, 0, 3]) == [0, 2, 4]
    assert accepted_path(tokens, parents, [5, 8, 7, 0, 0]) == [0, 1]
    assert accepted_path(tokens, parents, [8, 7, 7, 7, 7]) == [0]
    assert accepted_path([9], [-1], [4]) == [0]
    # of siblings with one token either serves: the first is taken
    assert accepted_path([9, 5, 5], [-1, 0, 0], [5, 1, 1]) == [0, 1]


# Who grows trees


BLOCK = DraftLayout(block=4)


def test_which_tree_a_strategy_verifies() -> None:
    greedy, sampled = [[0.5, 0.2]] * 4, [[0.25, 0.2]] * 4
    measured = {"ranks": {"greedy": greedy, "sampled": sampled}}
    # 5 rows of a node and its block: 96 // 5 - 1 = 18 nodes beside the seed
    assert fixed_tree(BLOCK, measured, "all", None, False) == grow(greedy, 18)
    assert fixed_tree(BLOCK, measured, "all", None, True) == grow(sampled, 18)
    assert fixed_tree(BLOCK, measured, 3, None, False, 40) == grow(greedy, 40 - 1 - 3 * 4)
    assert fixed_tree(BLOCK, measured, "all", 7, False) == grow(greedy, 7)
    assert fixed_tree(BLOCK, {}, "all", 7, False) == grow(UNKNOWN_CHANCE * 4, 7)
    for prepare, tree, known, rows in (
        ("all", 0, measured, 96),  # chains were asked for
        ("last", 7, measured, 96),
        ("all", None, {}, 96),  # nothing measured, no size given
        ("all", None, measured, 29),  # 29 // 5 - 1 = 4 nodes: no more than a chain
        ("all", 7, {"ranks": {"greedy": [[]] * 4}}, 96),  # no candidates
    ):
        assert fixed_tree(BLOCK, known, prepare, tree, False, rows) is None
    assert fixed_tree(BLOCK, measured, "all", None, False, 30) == grow(greedy, 5)


@pytest.mark.parametrize("name", TABLES)
def test_trees_of_tables_with_zeros_are_drafted_and_verified(name: str) -> None:
    """`fused`, `auto` and the device's steps: none is left with a block that drafts nothing."""
    layout, acceptance = DraftLayout(block=len(TABLES[name])), {"ranks": {"greedy": TABLES[name]}}
    tree = fixed_tree(layout, acceptance, "all", 4, False)
    assert tree is not None and tree.nodes == 4
    costs = AutoPolicy(layout, acceptance).model(False)
    assert costs.trees and all(t.nodes for t in costs.trees)
    cycles = [cycle for cycle in costs.cycles() if cycle[-1].tree is not None]
    cycles += [
        cut_cycle(fixed_cycle("fused", prepare, layout, tree), layout, rows)
        for prepare in ("all", 2)
        for rows in (5, 9, None)
    ]
    one_block = lowered(cycles[-6][-1], layout.block, "cpu").parents
    assert one_block.tolist() == list(tree.first(5 - 1 - layout.block).parents), "one block and what fits beside it"
    for cycle in cycles:
        for plan in cycle:
            step = lowered(plan, layout.block, "cpu")
            assert step.base_rows == 1 + plan.verify
            assert step.blocks and len(step.draft_parents) > 1
    empty = {"ranks": {"greedy": [[]] * layout.block}}
    assert AutoPolicy(layout, empty).model(False).trees == []


@pytest.mark.parametrize("table", [[[0.0] * 4] * 4, [[0.0, 0.3, 0.0, 0.2], *[[0.0] * 4] * 3]], ids=["zeros", "holes"])
def test_fused_with_such_a_table_verifies_drafts_and_emits_what_ar_does(table: list[list[float]]) -> None:
    made = randomise(Engine.from_model(build("llama"), layout=DraftLayout(block=4)))
    engine = Engine(made.backend, made.layout, None, {"ranks": {"greedy": table, "sampled": table}})
    prompts = random_prompts((5, 9))
    for temperature in (0.0, 0.8):
        options = {"max_new_tokens": 12, "temperature": temperature}
        results = engine.generate(prompts, strategy="fused", **options)
        assert [r.tokens for r in results] == tokens_of(engine, prompts, "ar", **options)
        for r in results:
            assert 1 <= max(r.stats.verified) <= 4 < r.stats.widest, "slots that were verified, not nodes"
