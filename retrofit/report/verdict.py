"""The verdict: gates that a converted model must pass, and three lines for whoever has to decide.

    lossless_bugs       no token differs from the original's by more than rounding explains
    lossless_near       few differ by so much that only a wide rounding explains it, or no more than in the original's
                        own noise
    lossless_texts      above level `off`, where every text is promised to be the original's: every one is
    quality_answers     no answer of `ar` or `self_spec` to a task differs from the original's by more than rounding
                        explains
    quality_not_worse   in no task is one of them worse than the original, the whole interval of the difference being
                        on that side; what `diffusion` costs is reported, and judged by a bound of `--fail-under`
    claimed_greedy, claimed_sampled    decoding accepts at least half of what the artifact says its drafts are worth
    never_slower        `auto` takes hardly longer than `ar`, at any batch size and context; beyond what it promises,
                        the steps it may try things out in and the noise between turns of this run are allowed, but
                        no more of that than NOISIEST

What was not measured passes no gate and fails none, but for a figure that was asked for: that fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from retrofit.artifact.own import told
from retrofit.eval.differences import CLASSES
from retrofit.report.headline import Sections, first_cells, headline, overall
from retrofit.report.sections.quality import LOSSLESS
from retrofit.runtime.auto.policy import FREE

SLOWER = 1.02
"""Seconds per token of `auto` over those of `ar` that are allowed anywhere."""
SIGMAS = 2.5
"""Standard deviations of its noise that a run cannot tell from nothing."""
NOISIEST = 1.25
"""How many times longer noise may excuse at most: a run that can tell nothing lets nothing pass."""
NEAR_SHARE = 0.001
"""Of all positions, those that may be `near`."""
KEPT = 0.5
"""Of the drafts that an artifact claims are accepted, those that must be: other text is drafted less well."""


ROUNDING = 1e-3
"""Of a figure: in half precision losses of two forwards over the same tokens differ by about as much."""


@dataclass(frozen=True)
class Gate:
    """One condition.  value, bound: what was measured, and the most or the least it may be.  says: a sentence."""

    name: str
    ok: bool
    value: float | None
    bound: float
    better: Literal["lower", "higher"]
    says: str


def verdict(sections: Sections, fail_under: Mapping[str, float]) -> dict[str, Any]:
    """`ok` (None: nothing was measured), `lines` and `gates` of what the finished sections found."""
    gates = [
        *_lossless(sections),
        *_quality(sections),
        *_claims(sections),
        *_never_slower(sections),
        *_asked(sections, fail_under),
    ]
    ok = all(gate.ok for gate in gates) if gates else None
    return {"ok": ok, "lines": lines(sections), "gates": [asdict(gate) for gate in gates]}


def _lossless(sections: Sections) -> Iterator[Gate]:
    if "losslessness" not in sections:
        return
    found = sections["losslessness"]
    parts = [found["greedy"], found["sampled"]]
    positions = sum(part[name] for part in parts for name in CLASSES)
    bugs, near = (sum(part[name] for part in parts) for name in ("bug", "near"))
    said = f"{bugs} of {positions} tokens differ from {reference(sections)}'s by more than rounding explains"
    yield Gate("lossless_bugs", bugs == 0, bugs, 0, "lower", f"{said}; none may" if bugs else said)
    of, floors = reference(sections), [part["noise_floor"] for part in parts]
    floor = sum(one["near"] for one in floors) / max(1, sum(one[name] for one in floors for name in CLASSES))
    share, most = near / max(1, positions), max(NEAR_SHARE, floor)
    said = f"{share:.3%} of tokens are near misses; {most:.3%} may be, {of}'s own noise is {floor:.3%}"
    yield Gate("lossless_near", share <= most, round(share, 6), round(most, 6), "lower", said)
    if found["exact"] != "off":
        other = sum(part["texts"] - part["equal_texts"] for part in parts)
        texts = sum(part["texts"] for part in parts)
        said = f"{other} of {texts} texts differ from {of}'s; exact={found['exact']} promises that none does"
        yield Gate("lossless_texts", other == 0, other, 0, "lower", said)


def _quality(sections: Sections) -> Iterator[Gate]:
    if "quality" not in sections:
        return
    found, of = sections["quality"], reference(sections)
    if found["answers"]:
        asked, other = (sum(one[name] for one in found["answers"].values()) for name in ("items", "other"))
        modes = " and ".join(found["answers"])
        said = f"{other} of {asked} answers of {modes} differ from {of}'s by more than rounding explains"
        if asked:
            yield Gate("quality_answers", other == 0, other, 0, "lower", f"{said}; none may" if other else said)
    held = [(one, mode, one["modes"][mode]) for one in found["tasks"] for mode in LOSSLESS if mode in one["modes"]]
    if held:
        worse = [(one["task"], mode, stat) for one, mode, stat in held if _worse(stat, one["lower_is_better"])]
        said = f"{len(worse)} of {len(held)} results of tasks are worse than {of}'s, beyond the interval"
        named = "".join(
            f"; {task} in {mode}: {stat['value']:.4g} for {stat['original']:.4g}" for task, mode, stat in worse
        )
        yield Gate("quality_not_worse", not worse, len(worse), 0, "lower", said + named)


def _worse(stat: Mapping[str, Any], lower_is_better: bool) -> bool:
    """Whether the whole interval of the difference lies on the worse side, and by more than rounding."""
    if stat["ci95"] is None:
        return False
    low, high = stat["ci95"]
    nearest = -low if lower_is_better else high
    return bool(nearest < -ROUNDING * max(1.0, abs(stat["original"])))


def _claims(sections: Sections) -> Iterator[Gate]:
    for name, claim in sections.get("acceptance", {}).get("claimed", {}).items():
        share = claim["kept_share"]
        if share is None:
            continue
        said = (
            f"a cycle accepts {claim['measured_drafts_per_cycle']:.3f} drafts, {share:.0%} of the"
            f" {claim['claimed_drafts_per_cycle']:.3f} that the artifact claims; {KEPT:.0%} must hold"
        )
        yield Gate(f"claimed_{name}", share >= KEPT, share, KEPT, "higher", said)


def _never_slower(sections: Sections) -> Iterator[Gate]:
    if "speed" not in sections:
        return
    speed = sections["speed"]
    timed = [cell for cell in speed["cells"] if "auto" in cell["ratio_to_ar"]]
    if timed:
        worst = max(timed, key=lambda cell: cell["ratio_to_ar"]["auto"])
        ratio = worst["ratio_to_ar"]["auto"]
        tried = FREE / (speed["repeats"] * speed["new_tokens"])
        noise = math.exp(SIGMAS * turn_noise(timed) / math.sqrt(speed["repeats"]))
        most = round((SLOWER + tried) * min(noise, NOISIEST), 4)
        where = f"at batch {worst['batch_size']} and {worst['context_tokens']} tokens of context"
        said = f"{where} auto takes {ratio:.3f} times as long as ar; {SLOWER:g} is promised, this run can tell {most:g}"
        if noise > NOISIEST:
            said += "; its turns differ by more than that: measure on a machine that does nothing else"
        yield Gate("never_slower", ratio <= most, ratio, most, "lower", said)


def turn_noise(cells: Sequence[Mapping[str, Any]]) -> float:
    """Standard deviation of log(time of `auto` / time of `ar`) between the turns of a cell, over all cells.

    0 where every way was timed once, so that nobody knows.
    """
    squares, free = 0.0, 0
    for cell in cells:
        auto, ar = (cell["ways"][name]["seconds_per_token"] for name in ("auto", "ar"))
        logs = [math.log(a / b) for a, b in zip(auto, ar, strict=True)]
        squares += sum((value - sum(logs) / len(logs)) ** 2 for value in logs)
        free += len(logs) - 1
    return math.sqrt(squares / free) if free else 0.0


def _asked(sections: Sections, fail_under: Mapping[str, float]) -> Iterator[Gate]:
    found = headline(sections)
    for name, bound in fail_under.items():
        value = found.get(name)
        ok = value is not None and value >= bound
        said = f"{name} was not measured" if value is None else f"{name} is {value:g}; {bound:g} is the least"
        yield Gate(f"asked_{name}", ok, value, bound, "higher", said)


def lines(sections: Sections) -> list[str]:
    """Does it answer the same, is it faster, where does it stop paying: three lines, whatever was measured.

    Of the profile `joint` a fourth: what it is held beside, and how far that is from the model it was trained from.
    """
    return [_same(sections), _faster(sections), _pays(sections), *_drifted(sections)]


def reference(sections: Sections) -> str:
    """What the report holds the artifact beside: the model it has of its own, where its base was trained along."""
    return "the original" if "drift" not in sections.get("compared", {}) else "its own model"


def _drifted(sections: Sections) -> Iterator[str]:
    found = sections.get("compared", {})
    if "drift" in found:
        yield (
            "Its base was trained along: everything here is held beside the model that came of that, its own. From"
            f" {found['original']['model']}, the original, it drifted: {told(found['drift'])}."
        )


def _same(sections: Sections) -> str:
    answers = sections.get("quality", {}).get("answers", {})
    other = sum(one["other"] for one in answers.values())
    if other:
        differ = "answer to tasks differs" if other == 1 else "answers to tasks differ"
        return f"It does NOT answer as {reference(sections)} does: {other} {differ} by more than rounding explains."
    if "losslessness" not in sections:
        return f"Whether it answers as {reference(sections)} does was not measured.{_solved(sections)}"
    parts = [sections["losslessness"][name] for name in ("greedy", "sampled")]
    texts, equal, bugs = (sum(part[name] for part in parts) for name in ("texts", "equal_texts", "bug"))
    if bugs:
        return f"It does NOT answer as {reference(sections)} does: {bugs} tokens differ by more than rounding explains."
    how = "" if equal == texts else " up to rounding"
    said = f"It answers as {reference(sections)} does{how}: {equal} of {texts} texts are the same, token for token."
    return said + _solved(sections)


def _solved(sections: Sections) -> str:
    """How many tasks it solves, and the original: by the mode that writes what the original writes."""
    modes = overall(sections)
    stat = next((modes[mode] for mode in ("self_spec", "ar") if mode in modes), None)
    if stat is None:
        return ""
    own, theirs = (round(stat[name] * stat["n"]) for name in ("value", "original"))
    return f" It solves {own} of {stat['n']} tasks, {reference(sections)} {theirs}."


def _faster(sections: Sections) -> str:
    rates = [
        f"{1 / cell['ratio_to_ar']['auto']:.2f} times as fast as plain decoding at batch {cell['batch_size']}"
        f" ({1 / cell['ratio_to_transformers']['auto']:.2f} times transformers' generate)"
        for cell in first_cells(sections)
        if "auto" in cell["ratio_to_ar"]
    ]
    return f"On this machine it is {', '.join(rates)}." if rates else "Its speed was not measured."


def _pays(sections: Sections) -> str:
    contexts: Sequence[Mapping[str, Any]] = sections.get("break_even", {}).get("by_context", [])
    ways = contexts[0]["ways"] if contexts else {}
    speculating = {name: way for name, way in ways.items() if name in ("fused", "two_forward")}
    if not speculating:
        return "Up to which batch size speculation pays was not measured."
    way = next(iter(speculating.values()))
    if way["pays_up_to"] is None:
        lookup = ways.get("prompt_lookup", {}).get("pays_up_to")
        if lookup is not None:
            return f"The adapter's drafts do not pay here; prompt lookup does, up to batch {lookup}, and auto takes it."
        if way["stops_at"] is not None and way["stops_at"] > 1:
            return f"Speculation does not pay at batch {way['stops_at']}, the smallest that was measured."
        return f"Speculation does not pay on this machine, so it decodes as {reference(sections)} does."
    if way["stops_at"] is None:
        return f"Speculation pays at every batch size that was measured, up to {way['pays_up_to']}."
    return f"Speculation pays up to batch {way['pays_up_to']} and no longer at {way['stops_at']}."
