"""Which keys of a draft tree attend together, so that each row's path is added up as the chain that it would be.

A kernel adds the keys of a piece up in groups of `GROUP`, one after another; zeros between the keys of a group can
change bits, groups of zeros between groups do not.  So a path's keys keep their places in their groups, next to the
committed ones, and a tree becomes copies of the piece, each with as many groups of different paths as there is room:

    the chain         c0 .. c31 | c32 c33 r0 a1    ..          a piece of 256 keys, 34 of them committed
    copy 0, paths     c0 .. c31 | c32 c33 r0 a1 .. | c32 c33 r0 b1 .. |  ..  six paths more
    copy 1            c0 .. c31 | c32 c33 r0 i1 ..

Every row attends in one copy.  Whether that suffices on a machine is for the self-test to say.  Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

GROUP = 32


@dataclass
class Copy:
    """Keys of a piece, and the rows that attend to them."""

    keys: list[int] = field(default_factory=list)
    """Of each place: a committed key, by its place in the piece, or behind those, a row's."""
    rows: list[int] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)
    """Of each of the rows: which of the places it sees."""


@dataclass
class _Open:
    """A copy that is being filled: its groups, by which number each has in the piece and what it holds."""

    groups: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    rows: dict[int, list[tuple[int, tuple[int, ...]]]] = field(default_factory=dict)
    """Row -> the groups that its path, or a path that goes on from it, lies in."""


def copies(paths: Sequence[Sequence[int]], first: int, piece: int, most: int) -> list[Copy]:
    """paths: of each row, the rows that it follows in this piece, itself last; empty where it has none here.

    first: the place in the piece of the first of them, behind so many committed keys.  most: rows of a copy.
    """
    whole = first // GROUP * GROUP
    room = (piece - whole) // GROUP
    opened: list[_Open] = []
    begun: dict[tuple[int, ...], tuple[_Open, list[tuple[int, tuple[int, ...]]]]] = {}
    for row in reversed(range(len(paths))):  # what a path goes on to comes behind it
        path = tuple(paths[row])
        if not path:
            continue
        if path not in begun or len(begun[path][0].rows) >= most:
            keys = (*range(whole, first), *(piece + r for r in path))
            groups = [(n, keys[a : a + GROUP]) for n, a in enumerate(range(0, len(keys), GROUP))]
            full = not opened or len(opened[-1].rows) >= most or len({*opened[-1].groups, *groups}) > room
            if full:
                opened.append(_Open())
            into = opened[-1]
            into.groups += [group for group in groups if group not in into.groups]
            for end in range(1, len(path) + 1):
                begun[path[:end]] = into, groups
        into, groups = begun[path]
        into.rows[row] = groups
    return [_closed(of, [len(path) for path in paths], first, whole) for of in opened]


def _closed(of: _Open, lengths: Sequence[int], first: int, whole: int) -> Copy:
    groups = sorted(of.groups, key=lambda group: group[0])
    at = {group: whole + GROUP * n for n, group in enumerate(groups)}
    made = Copy(keys=list(range(whole)))
    for _, keys in groups:
        made.keys += [*keys, *[0] * (GROUP - len(keys))]
    for row in sorted(of.rows):
        left = first - whole + lengths[row]
        seen = list(range(whole))
        for group in of.rows[row]:
            count = min(left, len(group[1]))
            seen += range(at[group], at[group] + count)
            left -= count
        made.rows.append(row)
        made.seen.append(seen)
    return made
