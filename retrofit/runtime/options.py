"""How to decode, checked: what is of the wrong type, out of its range or without effect is one clear error.

Numbers may be numpy's; True and False are none.  Not here: prompts (`prompts.py`), what a request asks for
(`params.py`), what the options do.  This file imports nothing heavy.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UsageError

MODES = ("ar", "diffusion", "self_spec")
STRATEGIES = ("auto", "fused", "two_forward", "prompt_lookup", "hybrid")
MOST_NODES = 1024
LARGEST_SEED = 2**63 - 1
SURE = 0.0
"""Diffusion: confidence from which a token is filled in."""
SHORT = 0.1
"""Diffusion: by how much a token may fall short of the base's own choice to be kept.  Unit: nats."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([KMGT])(i?))?B?", re.IGNORECASE)


@dataclass(frozen=True)
class Decoding:
    """How the requests of a call are decoded; what was not given has its default."""

    mode: str
    strategy: str
    prepare: str | int
    tree: int | None
    batch_size: int
    threshold: float
    tolerance: float

    @property
    def name(self) -> str:
        """`ar`, `diffusion`, or the strategy of `self_spec`."""
        return self.strategy if self.mode == "self_spec" else self.mode


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number of `low` to `high`.  Raises UsageError, naming the option and what it may be."""
    number = as_int(value)
    if number is None or number < low or (high is not None and number > high):
        span = f"from {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name} is {shown(value)}; it must be a whole number {span}")
    return number


def as_int(value: Any) -> int | None:
    """The whole number that a value is, numpy's and a tensor's of one included; None for everything else."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        return None


def number(name: str, value: Any) -> float:
    """A number, perhaps not a finite one.  Raises UsageError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} is {shown(value)}; it must be a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # outside every range


def bytes_of(name: str, text: str) -> int:
    """Bytes of `24GB`, `22.5GiB`, `800MB` or a plain number.  Raises UsageError."""
    found = _SIZE.fullmatch(text.strip())
    amount = float(found[1]) if found else math.inf
    if found is None or amount == math.inf:
        raise UsageError(
            f"{name} {shown(text)}: no amount of memory", "write a number and KB, MB, GB, TB, KiB, MiB, GiB or TiB"
        )
    unit = (found[2] or "").upper()
    return int(amount * (BINARY[unit + "i"] if found[3] else UNITS[unit]))


def flag(name: str, value: Any) -> bool:
    """Raises UsageError for anything but True and False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {shown(value)}; it must be True or False")
    return value


def shown(value: Any) -> str:
    """A value as an error message shows it: on one line, not endless."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def each(name: str, value: Any, count: int) -> list[Any]:
    """One value for all of so many prompts, or one each.  Raises UsageError."""
    values = as_list(value)
    if values is None:
        return [value] * count
    if len(values) != count:
        raise UsageError(f"{len(values)} {name} for {count} prompts; give one for all or one each")
    return values


def as_list(value: Any) -> list[Any] | None:
    """The values of a list, tuple, array or tensor; None for a single one."""
    if isinstance(value, str | bytes | dict) or not (isinstance(value, Sequence) or hasattr(value, "tolist")):
        return None
    values = value.tolist() if hasattr(value, "tolist") else list(value)
    return values if isinstance(values, list) else None  # numpy's and torch's single numbers are none


def check_options(
    mode: Any,
    layout: DraftLayout,
    strategy: Any,
    prepare: Any,
    tree: Any,
    batch_size: Any,
    threshold: Any,
    tolerance: Any = None,
) -> Decoding:
    """How to decode, with the defaults of what was not given.

    Raises UsageError naming the option and what it may be, and for one that means nothing beside the others.
    """
    for name, value, known in (("mode", mode, MODES), ("strategy", strategy, STRATEGIES)):
        if (value is not None or name == "mode") and (not isinstance(value, str) or value not in known):
            raise UsageError(f"{name} {shown(value)} does not exist", f"it is one of {', '.join(known)}")
    if not (prepare is None or (isinstance(prepare, str) and prepare in ("all", "last", "none"))):
        lengths = as_int(prepare)
        if lengths is None or lengths < 1:
            raise UsageError(
                f"prepare is {shown(prepare)}; it may be all, last, none, or a number of accept lengths >= 1"
            )
        prepare = lengths
    nodes = None if tree is None else whole("tree", tree, 0, MOST_NODES)
    requests = whole("batch_size", batch_size, 1)
    sure = SURE if threshold is None else number("threshold", threshold)
    if not 0 <= sure <= 1:
        raise UsageError(f"threshold is {shown(threshold)}; it is a probability, 0 to 1")
    short = SHORT if tolerance is None else number("tolerance", tolerance)
    if not short >= 0:
        raise UsageError(f"tolerance is {shown(tolerance)}; it is a number of nats from 0, or inf")
    given = {"strategy": strategy, "prepare": prepare, "tree": tree, "threshold": threshold, "tolerance": tolerance}
    _check_meaning(mode, given)
    if strategy in ("fused", "hybrid") and not layout.anchored:
        raise UsageError(f"strategy {strategy} needs an artifact with draft.seed_row base", "use two_forward or auto")
    return Decoding(mode, strategy or "auto", "all" if prepare is None else prepare, nodes, requests, sure, short)


def _check_meaning(mode: str, given: dict[str, Any]) -> None:
    """Raises UsageError for an option that was given and changes nothing."""
    for name in ("threshold", "tolerance"):
        if mode != "diffusion" and given[name] is not None:
            raise UsageError(f"{name} means nothing in mode {mode}", "it is diffusion's; leave it out")
    for name in ("strategy", "prepare", "tree"):
        if mode != "self_spec" and given[name] is not None:
            raise UsageError(f"{name} means nothing in mode {mode}", "it is self_spec's; leave it out")
        takers = ("fused", "hybrid") if name == "tree" or given["prepare"] == "none" else ("fused",)
        if name != "strategy" and given[name] is not None and given["strategy"] not in takers:
            strategy, whose = given["strategy"] or "auto", " and ".join(f"{taker}'s" for taker in takers)
            raise UsageError(
                f"{name} means nothing with strategy {strategy}", f"it is {whose}; leave it out, or ask for fused"
            )
    if given["strategy"] == "hybrid" and given["tree"] == 0:
        raise UsageError("tree 0 means nothing with strategy hybrid", "its drafts branch where that pays; leave it out")
    if given["strategy"] == "fused" and given["prepare"] == "none":
        raise UsageError(
            "prepare none means nothing with strategy fused", "it draws up no block beside drafts; ask for two_forward"
        )
    if given["prepare"] == "last" and given["tree"]:
        raise UsageError("tree means nothing with prepare last", "drafts branch with prepare all or a number")
