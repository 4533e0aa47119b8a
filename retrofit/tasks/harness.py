"""Tasks of lm-evaluation-harness, and ours as tasks of its kind, put to several models and held against the original.

The harness is an extra (`retrofit-lm[eval]`).  Tasks run by name where their data is at hand; one whose data is not, is
left out and said so.  What comes back has the shape that `suite.run` gives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from retrofit.errors import ResourceError, UsageError
from retrofit.recipes.problems import did_you_mean
from retrofit.tasks.against import Scored, by_category
from retrofit.tasks.items import FOLDER, LONGEST

EXTRA = "pip install 'retrofit-lm[eval]'"
NUMBER_REGEX = r"(-?\d[\d,]*(?:\.\d+)?)"


def _ours(category: str, **config: Any) -> dict[str, Any]:
    return {
        "task": f"retrofit_{category}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(FOLDER / f"{category}.jsonl")}},
        "test_split": "test",
        "target_delimiter": "",
        "metadata": {"version": 1},
        **config,
    }


OURS = {
    task["task"]: task
    for task in (
        _ours(
            "cloze",
            output_type="multiple_choice",
            doc_to_text="prompt",
            doc_to_choice="options",
            doc_to_target="answer",
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        ),
        _ours(
            "arithmetic",
            output_type="generate_until",
            doc_to_text="prompt",
            doc_to_target="answer",
            generation_kwargs={"until": ["\n"], "max_gen_toks": LONGEST["number"], "do_sample": False},
            filter_list=[
                {
                    "name": "first-number",
                    "filter": [
                        {"function": "regex", "regex_pattern": NUMBER_REGEX},
                        {"function": "take_first"},
                    ],
                }
            ],
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        ),
        _ours(
            "text",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="text",
            metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        ),
    )
}
"""Three categories of the embedded suite in the harness's own terms: by likelihood, by generation, and rolling."""


def original_model(model: Any, tokenizer: Any, max_length: int | None = None) -> Any:
    """The harness's own `hf` model of a live base, one sequence at a time.  Raises ResourceError without the extra.

    max_length: as an `EngineLM` has it, so that both cut long texts at the same place.
    """
    _harness()
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length)


def engine_model(engine: Any, mode: str = "ar", **options: Any) -> Any:
    """An engine as a model of the harness: `harness_model.EngineLM`.  Raises ResourceError without the extra."""
    _harness()
    from retrofit.tasks.harness_model import EngineLM

    return EngineLM(engine, mode, **options)


def run(
    models: Mapping[str, Any],
    tasks: Sequence[str],
    original: str = "original",
    limit: int | None = None,
    allow_code: bool = False,
    include: str | None = None,
) -> dict[str, Any]:
    """Put tasks to every model, and hold each against models[original].

    models: as `original_model` and `engine_model` make them.  tasks: names of OURS and of the harness, its groups too.
    limit: documents of a task, from its beginning.  allow_code: run the code of tasks that say they run some; the
    harness does that in this process's rights.  include: a folder of further tasks.
    Raises UsageError without an original and for a task that nobody knows, ResourceError without the extra.
    """
    if original not in models:
        raise UsageError(f"nothing is named `{original}` among {', '.join(models) or 'no models'}")
    loaded, skipped, manager = _loaded(tasks, include, allow_code)
    results: dict[str, dict[str, Scored]] = {name: {} for name in models}
    categories: dict[str, str] = {}
    lower: set[tuple[str, str]] = set()
    for name, model in models.items():
        some = {own: task for own, task in loaded.items() if _why_not(model, task) is None}
        skipped += [
            {"what": f"{own} in {name}", "why": str(_why_not(model, loaded[own]))} for own in loaded if own not in some
        ]
        told = _evaluated(model, list(some.values()), manager, limit, allow_code) if some else {"samples": {}}
        for task, rows in told["samples"].items():
            results[name] |= scored(task, rows)
            categories |= {f"{task}:{row['doc_id']}": task for row in rows}
            better = told["higher_is_better"][task]
            lower |= {(task, metric) for metric in better if not better[metric]}
    return {
        "lm_eval": version("lm-eval"),
        "original": original,
        "items": [
            {
                "id": id,
                "category": category,
                "results": {name: found[id] for name, found in results.items() if id in found},
            }
            for id, category in categories.items()
        ],
        "categories": by_category(
            categories, results, original, lambda category, metric: (category, metric.partition(",")[0]) in lower
        ),
        "versions": {name: task.VERSION for name, task in loaded.items()},
        "skipped": skipped,
    }


def scored(task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Scored]:
    """Item id -> result, of the harness's samples of one task: one row for each document and filter.

    A metric is named as the harness names it, `exact_match,first-number`.  Bits per byte are of each document, with
    its bytes as weight; other metrics that are no number of one document, such as a correlation, are left out.
    """
    found: dict[str, Scored] = {}
    for row in rows:
        own = found.setdefault(f"{task}:{row['doc_id']}", {"scores": {}, "doc_hash": row["doc_hash"]})
        for metric in row["metrics"]:
            name, value = f"{metric},{row['filter']}", row[metric]
            if isinstance(value, bool | int | float) or hasattr(value, "item"):
                own["scores"][name] = float(value)
            elif metric == "bits_per_byte":
                own["scores"][name] = -value[0] / value[1] / math.log(2)
                own["weight"] = value[1]
        written = row["resps"][0][0]
        if isinstance(written, str):
            own["text"] = written
    return found


def _loaded(
    tasks: Sequence[str], include: str | None, allow_code: bool
) -> tuple[dict[str, Any], list[dict[str, str]], Any]:
    """Name -> task, what could not be loaded or may not be run, and the harness's own manager of tasks."""
    _harness()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include, include_defaults=any(name not in OURS for name in tasks))
    loaded: dict[str, Any] = {}
    skipped = []
    _check(tasks, manager)
    for name in tasks:
        try:
            found = manager.load(copy.deepcopy(OURS.get(name, name)))["tasks"]
        except Exception as error:  # a data set that is not at hand fails in as many ways as there are loaders
            reason = str(error).strip().splitlines() or [""]
            skipped.append({"what": name, "why": f"does not load: {type(error).__name__}: {reason[0]}"[:300]})
            continue
        unsafe = [own for own, task in found.items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe and not allow_code:
            skipped += [{"what": own, "why": "runs code, which is not allowed unless asked for"} for own in unsafe]
        loaded |= {own: task for own, task in found.items() if allow_code or own not in unsafe}
    return loaded, skipped, manager


def check(tasks: Sequence[str]) -> None:
    """Raises UsageError for a task that neither this project nor the harness has, ResourceError without the extra."""
    _harness()
    from lm_eval.tasks import TaskManager

    _check(tasks, TaskManager(include_defaults=any(name not in OURS for name in tasks)))


def _check(tasks: Sequence[str], manager: Any) -> None:
    unknown = next((name for name in tasks if name not in OURS and name not in manager.all_tasks), None)
    if unknown is not None:
        close = did_you_mean(unknown, [*OURS, *manager.all_tasks])
        raise UsageError(f"no task `{unknown}`{close}", "`lm-eval ls tasks` lists those of the harness")


def _why_not(model: Any, task: Any) -> str | None:
    """Why a model is not asked a task; None where it is."""
    answers = getattr(model, "answers", None)
    return None if answers is None or task.OUTPUT_TYPE == "generate_until" else answers.why_no_likelihood


def _evaluated(model: Any, tasks: Sequence[Any], manager: Any, limit: int | None, allow_code: bool) -> Any:
    """What the harness says of a model, every document's results among it."""
    from lm_eval.evaluator import simple_evaluate

    return simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,  # the harness would read all of its tasks' files again
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=allow_code,
    )


def _harness() -> None:
    """Raises ResourceError where lm_eval does not load."""
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            f"tasks of lm-evaluation-harness need lm-eval, which does not load: {error}", EXTRA
        ) from None
