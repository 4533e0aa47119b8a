"""Items put to several models, each answer scored and held against the original's on the same item.

One plain dict comes back: every item with its id, category and each model's result, paired statistics by category,
and what was left out with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from retrofit.errors import UsageError
from retrofit.tasks import execution, scoring
from retrofit.tasks.against import Scored, by_category
from retrofit.tasks.answering import Answers, Asked
from retrofit.tasks.items import Item, digest
from retrofit.tasks.tokens import Pair, pair_of, prefix_of, windows

METRICS = {
    "choice": ("accuracy",),
    "text": ("nats_per_token",),
    "number": ("accuracy",),
    "format": ("accuracy",),
    "code": ("parses", "passes"),
}
"""What an item is scored by, by its kind."""
LOWER_IS_BETTER = ("nats_per_token",)
RIGHT_OR_WRONG = ("accuracy", "passes")
"""Metrics that say whether an item is right: code that was only parsed may still do anything."""
BY_LIKELIHOOD = ("choice", "text")
NO_CODE = "the tests of code are not run unless that is allowed"

Told = Callable[[str, int, int], None]
"""(name of the model, items done, of so many)"""


def run(
    models: Mapping[str, Answers],
    items: Sequence[Item],
    original: str = "original",
    allow_code: bool = False,
    told: Told | None = None,
) -> dict[str, Any]:
    """Put the items to every model and hold each against models[original].

    allow_code: run code that a model wrote, under limits; else it is only parsed.
    Keys of what comes back: items_sha256, original, items, categories, skipped; see docs/quality.md.
    Raises UsageError without an original, ResourceError where code cannot be run under limits.
    """
    if original not in models:
        raise UsageError(f"nothing is named `{original}` among {', '.join(models) or 'no models'}")
    asked, skipped = fitting(items, models[original])
    results: dict[str, dict[str, Scored]] = {
        name: answered(model, asked, allow_code, _for(name, told)) for name, model in models.items()
    }
    skipped += [
        {"what": f"{item.category} in {name}", "why": model.why_no_likelihood}
        for name, model in models.items()
        for item in _one_each(asked)
        if model.why_no_likelihood is not None and item.kind in BY_LIKELIHOOD
    ]
    if not allow_code and any(item.kind == "code" for item in asked):
        skipped.append({"what": "passes of code", "why": NO_CODE})
    return {
        "items_sha256": digest(items),
        "original": original,
        "items": [_row(item, results) for item in asked],
        "categories": by_category(
            {item.id: item.category for item in asked},
            results,
            original,
            lower_is_better=lambda category, metric: metric in LOWER_IS_BETTER,
            right_or_wrong=RIGHT_OR_WRONG,
        ),
        "skipped": skipped,
    }


def fitting(items: Sequence[Item], model: Answers) -> tuple[list[Item], list[dict[str, str]]]:
    """The items that a model's context holds, and of the others what they are and why they are left out."""
    kept, skipped = [], []
    for item in items:
        need = _length(item, model)
        if need > model.context:
            why = f"{need} tokens, of a context of {model.context}"
            skipped.append({"what": f"item {item.id}", "why": why})
        else:
            kept.append(item)
    return kept, skipped


def _length(item: Item, model: Answers) -> int:
    """Tokens that an item needs at once; a long text goes through in windows."""
    if item.kind == "text":
        return 2
    longest = max(item.fields.get("options", ("",)), key=len)
    return len(model.tokenizer(item.fields["prompt"] + longest)["input_ids"]) + item.max_new_tokens


def answered(
    model: Answers, items: Sequence[Item], allow_code: bool, told: Callable[[int, int], None]
) -> dict[str, Scored]:
    """Item id -> its result, for the items that this model can be asked."""
    found: dict[str, Scored] = {}
    for kind in METRICS:
        some = [item for item in items if item.kind == kind]
        if some and kind not in BY_LIKELIHOOD:
            found |= written(model, some, allow_code)
        elif some and model.why_no_likelihood is None:
            found |= chosen(model, some) if kind == "choice" else read(model, some)
        told(len(found), len(items))
    return found


def written(model: Answers, items: Sequence[Item], allow_code: bool) -> dict[str, Scored]:
    """Items whose answer is a text."""
    texts = model.texts([asked_of(model.tokenizer, item) for item in items])
    return {item.id: score(item, text, allow_code) for item, text in zip(items, texts, strict=True)}


def asked_of(tokenizer: Any, item: Item) -> Asked:
    """What a model is asked to continue, of an item whose answer is a text."""
    return Asked(list(tokenizer(item.fields["prompt"])["input_ids"]), item.max_new_tokens, item.stop)


def score(item: Item, text: str, allow_code: bool) -> Scored:
    """What a text that was written for an item is worth."""
    fields = item.fields
    if item.kind == "number":
        right = scoring.right_number(text, fields["answer"], fields["take"])
        return {"scores": {"accuracy": float(right)}, "text": text}
    if item.kind == "format":
        return {"scores": {"accuracy": float(scoring.follows(text, fields["rules"]))}, "text": text}
    program = scoring.program_of(fields["prompt"], text)
    scores, found = {"parses": float(scoring.parses(program))}, {"text": text}
    if allow_code:
        outcome = execution.run(program, fields["tests"]) if scores["parses"] else None
        scores["passes"] = float(outcome is not None and outcome.passed)
        found |= {"error": outcome.error} if outcome is not None and outcome.error is not None else {}
    return {"scores": scores, **found}


def chosen(model: Answers, items: Sequence[Item]) -> dict[str, Scored]:
    """Items whose answer is one of some options."""
    pairs = [
        pair_of(model.tokenizer, item.fields["prompt"], option) for item in items for option in item.fields["options"]
    ]
    totals = iter(model.likelihoods(pairs))
    found = {}
    for item in items:
        own = [next(totals).total for _ in item.fields["options"]]
        choice = scoring.likeliest(own)
        right = float(choice == item.fields["answer"])
        found[item.id] = {"scores": {"accuracy": right}, "choice": choice, "nats": [-total for total in own]}
    return found


def read(model: Answers, items: Sequence[Item]) -> dict[str, Scored]:
    """Texts that are given: the loss of each token but, without BOS and EOS, the first."""
    cut_up = {item.id: pieces(model, item.fields["text"]) for item in items}
    totals = iter(model.likelihoods([pair for pairs in cut_up.values() for pair in pairs]))
    found = {}
    for item in items:
        tokens = sum(len(pair[1]) for pair in cut_up[item.id])
        nats = -sum(next(totals).total for _ in cut_up[item.id])
        size = len(item.fields["text"].encode())
        found[item.id] = {
            "scores": {"nats_per_token": nats / tokens},
            "weight": tokens,
            "tokens": tokens,
            "nats_per_byte": nats / size,
        }
    return found


def pieces(model: Answers, text: str) -> list[Pair]:
    """The windows of a text."""
    tokens, prefix = list(model.tokenizer(text, add_special_tokens=False)["input_ids"]), prefix_of(model.tokenizer)
    if prefix is None:
        prefix, tokens = tokens[0], tokens[1:]
    return list(windows(tokens, prefix, model.context))


def _row(item: Item, results: Mapping[str, Mapping[str, Scored]]) -> dict[str, Any]:
    own = {name: found[item.id] for name, found in results.items() if item.id in found}
    return {"id": item.id, "category": item.category, "level": item.level, "kind": item.kind, "results": own}


def _one_each(items: Sequence[Item]) -> list[Item]:
    """The first item of each category."""
    return list({item.category: item for item in reversed(items)}.values())[::-1]


def _for(name: str, told: Told | None) -> Callable[[int, int], None]:
    return lambda done, of: None if told is None else told(name, done, of)
