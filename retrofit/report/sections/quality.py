"""Quality: tasks with answers that can be checked, item by item beside the original, and whether answers are the same.

Both decode greedily and raw, without the base's generation settings; they are part of neither model.  Log-probabilities
belong to the model, not to a way of decoding, so they are asked of `ar` alone.  Not here: the tasks (`tasks/`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from retrofit.errors import DataError, ResourceError, UsageError
from retrofit.eval.differences import NEAR_ULP, class_differences, ulp
from retrofit.report.setting import Data, Earlier, Setting, Skipped
from retrofit.tasks import harness, packaged, suite
from retrofit.tasks.answering import EngineAnswers, OriginalAnswers
from retrofit.tasks.items import CATEGORIES, Item, embedded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ORIGINAL = "original"
LOSSLESS = ("ar", "self_spec")
"""Modes whose answers are the original's."""
SHOWN, LONGEST = 3, 160
"""Answers of a mode that are shown beside the original's, and characters of each."""
Skips = list[dict[str, str]]


def quality(setting: Setting, earlier: Earlier) -> Data:
    """Statistics of every task and metric by mode, whether `ar` and `self_spec` answer the same, and what was left out.

    `answers`: of each of these modes, how many items, how many answers are equal, how many are not although rounding
    explains it, and how many `other` ones there are.
    """
    if setting.engine.tokenizer is None:
        raise Skipped("quality tasks are texts and need a tokenizer; this engine has none")
    skipped: Skips = []
    items, others = _items(setting, skipped)
    tasks: list[Data] = []
    answers, differing, digest = {}, [], None
    with _original(setting) as base:
        if items:
            original, own = _answering(setting, base)
            found = suite.run({ORIGINAL: original, **own}, items, ORIGINAL, setting.allow_code)
            tasks += _flat(found["categories"])
            skipped += found["skipped"]
            rows, digest = found["items"], found["items_sha256"]
            for mode in own:
                if mode in LOSSLESS:
                    answers[mode] = _same(setting, items, rows, original, own[mode])
                differing += _shown(rows, mode)
        if others:
            tasks += _by_harness(setting, base, others, skipped)
    if not tasks:
        raise Skipped("; ".join(dict.fromkeys(f"{one['what']}: {one['why']}" for one in skipped)) or "no task")
    return {
        "asked": setting.asked("quality"),
        "items_sha256": digest,
        "tasks": tasks,
        "answers": answers,
        "differing": differing,
        "skipped": skipped,
    }


def _items(setting: Setting, skipped: Skips) -> tuple[list[Item], list[str]]:
    """The items of the tasks that are ours or read from packages, and the names of the others."""
    found: list[Item] = []
    others = []
    limit = setting.suite.quality_items
    for name in setting.tasks:
        if name in CATEGORIES:
            found += embedded("full", [name], limit)
        elif name in packaged.TASKS:
            try:
                found += packaged.items(name, limit)
            except (ResourceError, DataError) as error:
                skipped.append({"what": name, "why": f"{error}; {error.hint}" if error.hint else str(error)})
        else:
            others.append(name)
    return found, others


@contextmanager
def _original(setting: Setting) -> Iterator[PreTrainedModel]:
    """The base in its run type, which ends a text where the engine does."""
    base = setting.subject.base(setting.subject.dtype)
    before = base.generation_config
    base.generation_config = GenerationConfig(eos_token_id=sorted(setting.engine.backend.eos) or None)
    try:
        yield base
    finally:
        base.generation_config = before


def _options(setting: Setting, mode: str) -> Data:
    """`self_spec` by the strategy that drafts at every step: `auto` would decode as `ar` where that is as fast."""
    return {"original_settings": False, **(setting.drafter if mode == "self_spec" else {})}


def _answering(setting: Setting, base: PreTrainedModel) -> tuple[OriginalAnswers, dict[str, EngineAnswers]]:
    own = {mode: EngineAnswers(setting.engine, mode, **_options(setting, mode)) for mode in setting.modes}
    tokenizer: Any = setting.engine.tokenizer
    return OriginalAnswers(base, tokenizer, setting.engine.limits.context - 1), own


def _flat(categories: Mapping[str, Mapping[str, Data]]) -> list[Data]:
    """One row for each task and metric, the original's own row left out: it stands in each of the others."""
    return [
        {
            "task": task,
            "metric": metric,
            "lower_is_better": found["lower_is_better"],
            "modes": {name: _rounded(model) for name, model in found["models"].items() if name != ORIGINAL},
        }
        for task, metrics in categories.items()
        for metric, found in metrics.items()
    ]


def _rounded(value: Any) -> Any:
    """Numbers to six places: two forwards differ by less."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 6) + 0.0 if isinstance(value, float) else value


def _by_harness(setting: Setting, base: PreTrainedModel, names: Sequence[str], skipped: Skips) -> list[Data]:
    try:
        own = {m: harness.engine_model(setting.engine, m, **_options(setting, m)) for m in setting.modes}
        longest = next(iter(own.values())).max_length
        models = {ORIGINAL: harness.original_model(base, setting.engine.tokenizer, longest), **own}
        found = harness.run(models, names, ORIGINAL, setting.suite.quality_items, setting.allow_code)
    except (ResourceError, UsageError) as error:
        why = f"{error}; {error.hint}" if error.hint else str(error)
        skipped += [{"what": name, "why": why} for name in names]
        return []
    skipped += found["skipped"]
    return _flat(found["categories"])


def _same(
    setting: Setting, items: Sequence[Item], rows: Sequence[Data], original: OriginalAnswers, own: EngineAnswers
) -> Data:
    """How many answers are the original's, and what explains the others."""
    pairs = [(row["id"], _answer(row, ORIGINAL), _answer(row, own.mode)) for row in rows]
    both = [(id, want, got) for id, want, got in pairs if want is not None and got is not None]
    unequal = [(id, want, got) for id, want, got in both if want != got]
    choices = [id for id, want, _ in unequal if isinstance(want, int)]
    written = [item for item in items if item.id in {id for id, want, _ in unequal if isinstance(want, str)}]
    other = sum(not _close_call(setting, row, own.mode) for row in rows if row["id"] in choices)
    other += _unexplained(setting, written, original, own) if written else 0
    return {
        "items": len(both),
        "equal": len(both) - len(unequal),
        "by_rounding": len(unequal) - other,
        "other": other,
    }


def _answer(row: Data, model: str) -> str | int | None:
    """What a model wrote or chose; None where it did neither."""
    result = row["results"].get(model, {})
    found: str | int | None = result.get("text", result.get("choice"))
    return found


def _close_call(setting: Setting, row: Data, mode: str) -> bool:
    """Whether the original finds the two options as likely, but for rounding of their log-probabilities."""
    nats = row["results"][ORIGINAL]["nats"]
    ours, theirs = (nats[row["results"][name]["choice"]] for name in (mode, ORIGINAL))
    return bool(ours - theirs <= NEAR_ULP * ulp(max(ours, theirs), setting.subject.dtype))


def _unexplained(setting: Setting, items: Sequence[Item], original: OriginalAnswers, own: EngineAnswers) -> int:
    """Texts that hold a token which the base, in a wider type, finds less likely by more than rounding explains."""
    dtype = setting.subject.dtype
    asked = [suite.asked_of(own.tokenizer, item) for item in items]
    model = partial(setting.subject.base, torch.float64 if dtype == torch.float32 else torch.float32)
    return sum(
        class_differences(model, [one.prompt], [want], [got], dtype)["bug"] > 0
        for one, want, got in zip(asked, original.tokens(asked), own.tokens(asked), strict=True)
    )


def _shown(rows: Sequence[Data], mode: str) -> list[Data]:
    """The first answers of a mode that are not the original's."""
    found = []
    for row in rows:
        want, got = _answer(row, ORIGINAL), _answer(row, mode)
        if want is None or got is None or want == got:
            continue
        scores = {name: row["results"][name]["scores"] for name in (ORIGINAL, mode)}
        texts = {"original": str(want)[:LONGEST], "answer": str(got)[:LONGEST]}
        found.append({"mode": mode, "task": row["category"], "item": row["id"], **texts, "scores": scores})
    return found[:SHOWN]
