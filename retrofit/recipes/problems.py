"""Say what is wrong with a recipe for a person to put right: `dotted.path: what is wrong; what to do`.

`fields` maps every key's dotted path to its field: `annotation` (its type) and `metadata` (its limits).
Not here: finding the problems, which is the schema's work.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import NoneType
from typing import Any, get_args

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
OUT_OF_RANGE = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
}
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    str | None: "text or null",
    int | None: "a whole number or null",
    float | None: "a number or null",
    tuple[int, ...]: "a list of whole numbers",
    tuple[str, ...]: "a list of texts",
    dict[str, Any]: "names and values",
}


def listed(label: str, problems: Sequence[str]) -> str:
    """One line for one problem; for more, a line that counts them and one for each, none twice."""
    lines = list(dict.fromkeys(problems))
    if len(lines) == 1:
        return f"{label}: {lines[0]}"
    return "\n".join([f"{label} has {len(lines)} problems", *(f"  {line}" for line in lines)])


def nothing_trained(alpha: float, beta: float, share: float, anchors: int, block: int) -> list[str]:
    """What is wrong where no block trains the drafts, as its part of the loss weighs nothing; at most one line."""
    masked = round(share * anchors) if block > 1 else 0  # as `blocks.shares` has it
    if (alpha and masked) or (beta and anchors > masked):
        return []
    return [
        f"objective: nothing trains the drafts: {masked} of train.anchors {anchors} blocks train L_diff, whose weight "
        f"objective.alpha is {alpha:g}, and {anchors - masked} L_draft, whose weight objective.beta is {beta:g}; "
        "change the weights or objective.diffusion_share"
    ]


def infill_faults(share: float, diffusion_share: float, draft: Any) -> list[str]:
    """What keeps blocks from learning to fill a gap; at most one line.  draft: the recipe's section of that name."""
    if not share:
        return []
    if draft.attention == "causal":
        return [
            "objective.infill_share: with draft.attention causal no row sees what stands behind it, so there is "
            "nothing to learn; set it to 0 or draft.attention to bidirectional"
        ]
    if draft.input == "noise":
        return [
            "objective.infill_share: with draft.input noise a row cannot tell a missing token from a known one; "
            "set it to 0 or draft.input to mask"
        ]
    if not diffusion_share:
        return ["objective.infill_share: is a share of L_diff's rows, and objective.diffusion_share is 0; raise that"]
    return []


def curriculum_faults(lengths: Sequence[int], block: int, shift: int) -> list[str]:
    """What is wrong with the lengths that blocks have before `draft.block`; at most one line."""
    least = 2 - shift  # with shift 0 the first row drafts nothing
    rising = [least - 1, *lengths, block]
    wrong = next((after for before, after in pairwise(rising) if after <= before), None)
    if not lengths or wrong is None:
        return []
    return [
        f"train.curriculum: the lengths {', '.join(map(str, lengths))} do not rise from {least} or more to less than "
        f"draft.block {block}; leave out what does not, or raise draft.block"
    ]


def explain(detail: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Lines for one entry of pydantic's `ValidationError.errors()`."""
    kind, value = detail["type"], detail["input"]
    path = ".".join(str(part) for part in detail["loc"] if not isinstance(part, int))
    if kind == "value_error":  # checks between keys name the keys themselves
        return str(detail["ctx"]["error"]).splitlines()
    if kind == "extra_forbidden":
        return [unknown_key(path, fields)]
    if kind in ("model_type", "model_attributes_type"):
        return [is_section(path, fields)]
    if kind == "missing":
        return [f"{path}: is missing; must be {_wanted(fields[path])}"]
    if kind == "literal_error":
        options = _options(fields[path].annotation)
        return [f"{path}: {kind_of(value)} is not one of {', '.join(options)}{did_you_mean(str(value), options)}"]
    if kind in OUT_OF_RANGE:
        return [f"{path}: {_shown(value)} is out of range; must be {_wanted(fields[path])}"]
    is_text = fields[path].annotation in (str, str | None)
    quote = "; quote it" if is_text and isinstance(value, bool | int | float | dict | list) else ""
    return [f"{path}: must be {_wanted(fields[path])}, not {kind_of(value)}{quote}"]


def unknown_key(path: str, fields: Mapping[str, Any]) -> str:
    """Suggests a key of the same section, else that key elsewhere, else what looks alike, else lists all."""
    section, _, key = path.rpartition(".")
    own = {known.rpartition(".")[2]: known for known in fields if known.rpartition(".")[0] == section}
    elsewhere = [known for known in fields if known.rpartition(".")[2] == key or path.startswith(f"{known}.")]
    top = list(dict.fromkeys(known.partition(".")[0] for known in fields))
    # Whole paths share their section's name, so they have to look more alike than bare keys.
    meant = [own[name] for name in _close(key, list(own))] or elsewhere or _close(path, [*fields, *top], cutoff=0.8)
    if meant:
        return f"{path}: unknown key; did you mean `{meant[0]}`?"
    if section in top and own:
        return f"{path}: unknown key; `{section}` has {', '.join(own)}"
    return f"{path}: unknown key; a recipe has {', '.join(top)}"


def is_section(path: str, fields: Mapping[str, Any]) -> str:
    """A section that was given a value."""
    keys = ", ".join(known for known in fields if known.startswith(f"{path}."))
    return f"{path}: is a section, not a value; set its keys one by one: {keys}"


def steps_fault(steps: int, warmup: int, schedule: str, decay: int | None) -> str | None:
    """Why no learning rate can have these of `train`; None where one can."""
    if warmup > steps:
        return f"train.warmup: {warmup} steps are more than train.steps {steps}; lower the warm-up"
    if decay is not None and schedule != "wsd":
        return f"train.decay: with train.schedule {schedule} there is none; leave it out, or set train.schedule to wsd"
    if warmup + (decay or 0) > steps:
        return f"train.decay: {decay} steps and train.warmup {warmup} are more than train.steps {steps}; lower one"
    return None


def did_you_mean(word: str, options: Sequence[str]) -> str:
    """The end of a message; empty when nothing looks alike."""
    close = _close(word, options)
    return f"; did you mean `{close[0]}`?" if close else ""


def kind_of(value: Any) -> str:
    """A value as a person would name it."""
    if value is None or value == "" or value == []:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    return _shown(value)


def _wanted(field: Any) -> str:
    """What a value of this key must be, with its range."""
    if field.annotation not in WORDS:
        options = ", ".join(_options(field.annotation))
        is_list = get_args(field.annotation)[-1] is Ellipsis
        return f"a list of one or more of {options}" if is_list else f"one of {options}"
    limits = {name: getattr(rule, name) for rule in field.metadata for name in SIGNS if hasattr(rule, name)}
    bounds = " and ".join(f"{sign} {limits[name]}" for name, sign in SIGNS.items() if name in limits)
    return f"{WORDS[field.annotation]} {bounds}".rstrip()


def _options(annotation: Any) -> list[str]:
    """The words a key may take, `null` among them where it may be empty; of a list, the words its items may take."""
    args = get_args(annotation)
    if args[-1] is NoneType:
        return [*_options(args[0]), "null"]
    return [str(option) for option in (get_args(args[0]) if args[-1] is Ellipsis else args)]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = f"`{value}`" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _close(word: str, options: Sequence[str], cutoff: float = 0.6) -> list[str]:
    return difflib.get_close_matches(word, options, n=1, cutoff=cutoff)
