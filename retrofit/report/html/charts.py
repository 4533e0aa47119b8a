"""Pictures of few numbers, each with what it means written beside it: bars, spans, lines, curves.

A picture is 380 pixels wide, as wide as a phone shows; a page sets several beside each other.  Where matplotlib is not
installed there is none, and the functions return an empty text.  It is imported here alone, when something is drawn.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from retrofit.report.html.colours import paper
from retrofit.report.html.svg import inline
from retrofit.report.html.words import clean, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 380
"""Pixels; so are all sizes here, for a figure's inch has as many as SVG's has points."""
PER_INCH = 72
ROW, BAR = 38, 11
"""Height of a bar with its name above it, and of the bar."""
VALUE, RANGE = 74, 140
"""Room for the number behind a bar, and for the two behind a span."""
NAME = 128
"""Room for the names behind the ends of lines."""
TICKS = 5
"""Places below lines that have room for a name; of more of them every second is named, or third."""
APART = 14
"""Between two lines of text."""
PLOT = 210
"""Height of lines and curves."""
MOST, AT_END = 44, 18
"""Letters of a name above a bar, and at the end of a line."""
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "retrofit", "text.parse_math": False, "font.family": "DejaVu Sans",
    "font.size": 13, "text.color": paper("ink"), "lines.solid_capstyle": "round",
}  # fmt: skip
"""Text stays text, a dollar sign a dollar sign, and the same numbers give the same picture."""


@dataclass(frozen=True)
class Mark:
    """A bar, a span (two values) or a line.  None is a value that was not measured.  faint: beside the point."""

    name: str
    colour: str
    values: Sequence[float | None]
    faint: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Point:
    """One of a curve."""

    x: float
    y: float
    name: str
    colour: str


@cache
def missing() -> bool:
    """Whether there is nothing to draw with: matplotlib is not there, or not fit for what else is installed."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells where it keeps what it knows of fonts
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return True
    return False


@contextmanager
def canvas(
    height: float, box: tuple[float, float, float, float], width: float = WIDTH
) -> Iterator[tuple[Figure, Axes]]:
    """A figure and its axes, without a frame.  box: margins left, top, right and bottom."""
    import matplotlib
    import matplotlib.figure

    left, top, right, bottom = box
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # people have settings of their own
        matplotlib.rcParams.update(SETTINGS)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # whoever shows the page brings the letters
        figure = matplotlib.figure.Figure(figsize=(width / PER_INCH, height / PER_INCH), dpi=PER_INCH)
        place = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
        axes = figure.add_axes(place)
        axes.set_axis_off()
        yield figure, axes


def _rows(marks: Sequence[Mark], title: str, room: float, draw: Callable[[Axes, float, Mark], None]) -> str:
    """A row for each mark, its name above; `draw` draws the rest of it at a height.  room: behind its end."""
    marks = [mark for mark in marks if None not in mark.values]
    if missing() or not marks:
        return ""
    height = ROW * len(marks)
    with canvas(height, (6, 0, room, 0)) as (figure, axes):
        known = [float(value) for mark in marks for value in mark.values if value is not None]
        low, high = min(0.0, *known), max(0.0, *known)
        axes.set_xlim(low, high if high > low else low + 1)
        axes.set_ylim(height, 0)
        for number, mark in enumerate(marks):
            _write(axes, mark.name, (low, number * ROW + 14), weight="normal" if mark.faint else "bold")
            draw(axes, number * ROW + 27, mark)
        return inline(figure, title)


def bars(marks: Sequence[Mark], title: str) -> str:
    """A bar from 0 for each, its value behind it."""

    def draw(axes: Axes, y: float, mark: Mark) -> None:
        (value,) = mark.values
        assert value is not None
        axes.barh(y, value, BAR, color=paper(mark.colour), alpha=0.55 if mark.faint else 1, clip_on=False)
        _write(axes, short(value) + mark.unit, (value, y), (6, -4))

    return _rows(marks, title, VALUE, draw)


def spans(marks: Sequence[Mark], title: str) -> str:
    """From a low value to a high one, both behind it."""

    def draw(axes: Axes, y: float, mark: Mark) -> None:
        low, high = mark.values
        assert low is not None and high is not None
        axes.plot([low, high], [y, y], color=paper(mark.colour), linewidth=4, alpha=0.45, clip_on=False)
        axes.plot([low], [y], "o", color=paper(mark.colour), markersize=9, clip_on=False)
        axes.plot([high], [y], "|", color=paper(mark.colour), markersize=11, markeredgewidth=3, clip_on=False)
        _write(axes, f"{short(low)} to {short(high)}{mark.unit}", (high, y), (7, -4))

    return _rows(marks, title, RANGE, draw)


def intervals(marks: Sequence[Mark], title: str) -> str:
    """(low, value, high) of each, on both sides of a line at 0."""

    def draw(axes: Axes, y: float, mark: Mark) -> None:
        low, value, high = mark.values
        assert low is not None and value is not None and high is not None
        axes.plot([0, 0], [y - 9, y + 9], color=paper("faint"), linewidth=1, clip_on=False)
        axes.plot([low, high], [y, y], color=paper(mark.colour), linewidth=4, alpha=0.45, clip_on=False)
        axes.plot([value], [y], "o", color=paper(mark.colour), markersize=9, clip_on=False)
        _write(axes, short(value), (max(high, 0), y), (10, -4))

    return _rows(marks, title, VALUE, draw)


def lines(marks: Sequence[Mark], places: Sequence[str], title: str, *, even: str = "", below: str = "") -> str:
    """A line for each mark over the same places, its name at its end; the values of what is not faint beside it.

    even: what a value of 1 means, which then has a line of its own, and doubling is as far as halving.  below: what
    the places are.
    """
    marks = [mark for mark in marks if any(value is not None for value in mark.values)]
    if missing() or not marks:
        return ""
    with canvas(PLOT, (14, 22, NAME, 40)) as (figure, axes):
        values = [float(value) for mark in marks for value in mark.values if value is not None]
        axes.set_xlim(0, max(1, len(places) - 1))
        if even:
            axes.set_yscale("log")
            axes.set_ylim(min(*values, 0.9) / 1.05, max(*values, 1.1) * 1.05)
            axes.axhline(1, color=paper("faint"), linewidth=1, linestyle=(0, (4, 3)), clip_on=False)
        else:
            axes.set_ylim(0, max(values) * 1.05 or 1)
            axes.axhline(0, color=paper("rule"), linewidth=1, clip_on=False)
        named = range(len(places) - 1, -1, -math.ceil(len(places) / TICKS))
        for mark in marks:
            _line(axes, mark, named)
        _names_at_ends(axes, marks, even)
        for number in named:
            _write(axes, places[number], (number, 0), (0, -18), colour="faint", across="center", floor=True)
        _write(axes, below, (0, 0), (-8, -36), colour="faint", floor=True)
        return inline(figure, title)


def _line(axes: Axes, mark: Mark, named: Container[int]) -> None:
    """named: places whose values are written where the line is not faint; that of its end stands beside its name."""
    known = _known(mark)
    axes.plot(
        *zip(*known, strict=True), "-o", color=paper(mark.colour), linewidth=1.5 if mark.faint else 2.5,
        markersize=3 if mark.faint else 6, alpha=0.6 if mark.faint else 1, clip_on=False,
    )  # fmt: skip
    for (x, value), (_, then) in pairwise(known):
        if mark.faint or x not in named:
            continue
        falls = then < value
        _write(axes, short(value), (x, value), (5, 5) if falls else (0, 9), across="left" if falls else "center")


def _known(mark: Mark) -> list[tuple[int, float]]:
    return [(x, float(value)) for x, value in enumerate(mark.values) if value is not None]


def _names_at_ends(axes: Axes, marks: Sequence[Mark], even: str) -> None:
    """Names beside the ends of their lines, moved apart where two would overlap."""
    right = axes.get_xlim()[1]
    ends = [(mark, *_known(mark)[-1]) for mark in marks]
    ends += [(Mark(even, "faint", (), faint=True), int(right), 1.0)] if even else []
    heights = [float(axes.transData.transform((right, value))[1]) for _, _, value in ends]
    box = axes.get_window_extent()
    moved = apart(heights, APART, box.y0, box.y1 + APART)
    for (mark, _, value), before, after in zip(ends, heights, moved, strict=True):
        name = clean(mark.name, AT_END) if mark.faint else f"{clean(mark.name, AT_END)} {short(value)}"
        weight = "normal" if mark.faint else "bold"
        _write(axes, name, (right, value), (12, after - before - 4), colour=mark.colour, weight=weight)


def apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The same heights in their order, none closer to the next than `gap`; between low and high where there is room."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    found = [float(heights[number]) for number in order]
    for below, above in pairwise(range(len(found))):
        found[above] = max(found[above], found[below] + gap)
    top = high
    for number in reversed(range(len(found))):
        found[number] = max(min(found[number], top), low + number * gap)
        top = found[number] - gap
    return [height for _, height in sorted(zip(order, found, strict=True))]


def curve(points: Sequence[Point], title: str, *, across: str, up: str) -> str:
    """Points in their order, those of one colour on a line; the axes say their ends and no more.

    across, up: what x and y are.
    """
    if missing() or not points:
        return ""
    with canvas(PLOT + 40, (56, 38, 40, 44)) as (figure, axes):
        xs, ys = [point.x for point in points], [point.y for point in points]
        axes.set_xlim(*_widened(min(xs), max(xs)))
        axes.set_ylim(*_widened(min(ys), max(ys)))
        for value in dict.fromkeys((min(ys), max(ys))):
            axes.axhline(value, color=paper("rule"), linewidth=1, zorder=0, clip_on=False)
            left = axes.get_xlim()[0]
            _write(axes, short(value), (left, value), (-8, -4), colour="faint", across="right")
        for tint in dict.fromkeys(point.colour for point in points):
            line = [(point.x, point.y) for point in points if point.colour == tint]
            axes.plot(*zip(*line, strict=True), "-o", color=paper(tint), linewidth=1.5, markersize=8, clip_on=False)
        for x, y in dict.fromkeys(zip(xs, ys, strict=True)):
            names = [point.name for point in points if (point.x, point.y) == (x, y)]
            _write(axes, ", ".join(names), (x, y), (0, 10), across="center")
        for value in dict.fromkeys((min(xs), max(xs))):
            _write(axes, short(value), (value, 0), (0, -20), colour="faint", across="center", floor=True)
        _write(axes, across, (axes.get_xlim()[1], 0), (36, -38), colour="faint", across="right", floor=True)
        _write(axes, up, (axes.get_xlim()[0], 1), (-50, 24), colour="faint", floor=True)
        return inline(figure, title)


def _widened(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1
    return low - room, high + room


def _write(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    away: tuple[float, float] = (0, 0),
    *,
    colour: str = "ink",
    across: str = "left",
    weight: str = "normal",
    floor: bool = False,
) -> None:
    """away: pixels.  floor: the height of `at` is a share of that of the axes, from their lower edge."""
    axes.annotate(
        clean(text, MOST), at, away, xycoords=("data", "axes fraction") if floor else "data",
        textcoords="offset points", ha=across, color=paper(colour), weight=weight, annotation_clip=False,
    )  # fmt: skip
