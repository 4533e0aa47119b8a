"""Every decoder of transformers' causal-LM mapping, tiny and random, against transformers' `generate`.

    python scripts/sweep.py                 all of them; writes results/architectures.json and docs/supported-models.md
    python scripts/sweep.py --only gpt2     these entries only; prints, and writes nothing
    python scripts/sweep.py --only gpt2 --keep   writes them, beside all others as the file has them, and says so

Each entry runs greedy in fp32: `ar`, `two_forward`, `fused` with a chain and with a tree, with drafts of a randomised
adapter (nearly all wrong) and with the truth, mistakes planted.  Its outcome is one of

    identical   every token of every way is the original model's
    refused     the engine said at load why it cannot run this one
    not built   there is no tiny model of it here, or its own `generate` fails or repeats itself
    wrong       some token differs
    crash       anything else, a hang included

Exit code 3 where an entry is wrong or crashes.  Each runs in a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import decoders
from benchmarks.common import ROOT, Bar, say, section, write
from benchmarks.sections import from_tests
from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UnsupportedModelError, UsageError
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes

RESULTS = ROOT / "results" / "architectures.json"
TABLE = ROOT / "docs" / "supported-models.md"
FORK = multiprocessing.get_context("fork")
"""Libraries are imported once; a model that takes its process down takes nothing else."""
OUTCOMES = ("identical", "refused", "not built", "wrong", "crash")
FAILED = ("wrong", "crash")
WAYS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "two_forward": {"strategy": "two_forward"},
    "fused chain": {"strategy": "fused", "tree": 0},
    "fused tree": {"strategy": "fused", "tree": 12},
}
RUNS = [("ar", "no", 1), ("ar", "no", 3)] + [
    (way, *how) for way in list(WAYS)[1:] for how in (("random", 3), ("oracle", 1), ("oracle", 3))
]
"""(way, drafts, batch)."""
PROMPTS = (5, 17, 11)
"""Tokens of each prompt: below the window and beyond it."""
NEW_TOKENS = 20
BLOCK = 4
FEW_TOKENS = 5
"""An output of fewer different tokens would hardly notice a wrong mask."""
LEAST = 125
"""Entries that have to be identical."""
SECONDS = 240
"""Of one entry, before its process is ended."""


def measure(name: str) -> dict[str, Any]:
    """One entry's outcome, with its reason or figures."""
    helpers = from_tests("decoding")
    prompts = helpers.random_prompts(PROMPTS, vocab=decoders.VOCABULARY)
    try:
        model = decoders.build(name)
    except Exception as error:
        return {"outcome": "not built", "reason": f"no tiny model here: {one_line(error)}"}
    facts: dict[str, Any] = {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        engine = Engine.from_model(model, layout=DraftLayout(block=BLOCK))
    except (UnsupportedModelError, UsageError) as error:
        return {"outcome": "refused", "reason": str(error), **facts}
    try:
        expected = helpers.reference_greedy(decoders.build(name), prompts, NEW_TOKENS)
        again = helpers.reference_greedy(decoders.build(name), prompts[:1], NEW_TOKENS)
    except Exception as error:
        return {"outcome": "not built", "reason": f"its own generate fails: {one_line(error)}", **facts}
    if expected[:1] != again:
        return {"outcome": "not built", "reason": "its own greedy output changes from run to run", **facts}
    facts["distinct_tokens"] = len({token for row in expected for token in row})
    if facts["distinct_tokens"] < FEW_TOKENS:
        return {
            "outcome": "not built",
            "reason": "its own greedy output hardly varies: equality would say little",
            **facts,
        }
    helpers.randomise(engine)
    facts["modules"] = adapted(engine)
    planted = helpers.Oracle(dict(enumerate(expected)), vocab=decoders.VOCABULARY)
    wrong, equal, total = [], 0, 0
    for way, draft, batch in RUNS:
        with patch.object(modes, "draft_tokens", planted if draft == "oracle" else modes.draft_tokens):
            results = engine.generate(
                prompts, **WAYS[way], max_new_tokens=NEW_TOKENS, batch_size=batch, ignore_eos=True
            )
        right = sum(r.tokens == e for r, e in zip(results, expected, strict=True))
        equal, total = equal + right, total + len(prompts)
        if right < len(prompts):
            wrong.append(f"{way}, {draft} drafts, batch {batch}: {right}/{len(prompts)}")
    outcome = {"outcome": "wrong", "reason": "; ".join(wrong)} if wrong else {"outcome": "identical"}
    return {**outcome, "equal": equal, "total": total, **facts}


def adapted(engine: Engine) -> dict[str, int]:
    """Names of the projections that carry the adapter, and how many of each."""
    names = [n.rsplit(".", 1)[-1] for n, m in engine.attached.peft_model.named_modules() if hasattr(m, "lora_A")]
    return dict(sorted(Counter(names).items()))


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


def child(name: str, answers: Connection) -> None:
    """In a process of its own."""
    torch.manual_seed(0)
    try:
        answers.send(measure(name))
    except Exception as error:
        answers.send({"outcome": "crash", "reason": one_line(error)})


def run(name: str) -> dict[str, Any]:
    """One entry's outcome; if its process dies or hangs, that is the outcome."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = (
            ours.recv() if ours.poll(SECONDS) else {"outcome": "crash", "reason": f"not done in {SECONDS} s"}
        )
    except EOFError:
        process.join()
        found = {"outcome": "crash", "reason": f"its process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return found


def bars(entries: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    counts = counted(entries)
    identical = counts["identical"]
    return [
        Bar("decoders of transformers' causal-LM mapping", "stated", str(len(entries)), None),
        Bar("  identical to generate, every way", f">= {LEAST}", str(identical), identical >= LEAST),
        Bar("  refused at load, with the reason", "stated", str(counts["refused"]), None),
        Bar("  no tiny model, or generate itself fails", "stated", str(counts["not built"]), None),
        Bar("  wrong", "0", str(counts["wrong"]), counts["wrong"] == 0),
        Bar("  crash", "0", str(counts["crash"]), counts["crash"] == 0),
    ]  # fmt: skip


def counted(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {outcome: sum(e["outcome"] == outcome for e in entries.values()) for outcome in OUTCOMES}


def page(section: Mapping[str, Any]) -> str:
    """docs/supported-models.md, drawn from the section of the results file."""
    entries = section["figures"]["entries"]
    counts, machine = counted(entries), section["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Supported models",
        "",
        "Drawn by `python scripts/sweep.py` from `results/architectures.json`; do not edit.",
        "",
        f"Of the {len(entries)} entries in transformers' causal-LM mapping {counts['identical']} decode exactly as "
        f"`generate` does, {counts['refused']} are refused when they are loaded, before anything is trained, and "
        f"{counts['not built']} were not tried. Each was tried as a tiny random model in fp32, greedy: `ar`, "
        "`two_forward`, `fused` with a chain and with a tree, drafts nearly all wrong and drafts mostly right.",
        "",
        f"{versions}; commit {machine['commit'] or 'not committed'}, {machine['date']}.{kept_of(section)}",
        "",
        "## Identical",
        "",
        "The default adapter goes on these projections, what the family has for `q, k, v, o, gate, up, down`.",
        "",
        "| model type | class | projections |",
        "| --- | --- | --- |",
    ]
    for name, entry in entries.items():
        if entry["outcome"] == "identical":
            lines.append(f"| `{name}` | {entry['class']} | {', '.join(entry['modules'])} |")
    for outcome, title in (("wrong", "Wrong"), ("crash", "Crash"), ("refused", "Refused"), ("not built", "Not tried")):
        if counts[outcome]:
            lines += ["", f"## {title}", "", "| model type | why |", "| --- | --- |"]
            lines += [f"| `{n}` | {cell(e['reason'])} |" for n, e in entries.items() if e["outcome"] == outcome]
    return "\n".join(lines) + "\n"


def kept_of(section: Mapping[str, Any]) -> str:
    kept = section["figures"].get("kept")
    return "" if kept is None else f" {kept['entries']} entries are as they were at commit {kept['commit']}."


def figures_of(entries: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the results file holds; before: the section that entries which were not measured anew are taken from."""
    if before is None:
        return {"counts": counted(entries), "entries": entries}
    former = before["figures"]["entries"]
    together = {name: entries.get(name, entry) for name, entry in former.items()}
    kept = {"entries": len(former.keys() - entries.keys()), "commit": before["hardware"]["commit"]}
    return {"counts": counted(together), "kept": kept, "entries": together}


def record(entries: Mapping[str, Any], seconds: float, before: Mapping[str, Any] | None = None) -> None:
    """Write the results and the page."""
    figures = figures_of(entries, before)
    measured = section("python scripts/sweep.py", seconds, bars(figures["entries"]), figures)
    write(RESULTS, {"sweep": measured})
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(page(measured))
    say(f"wrote {RESULTS} and {TABLE}")


def cell(text: str) -> str:
    return text.replace("|", r"\|")


@click.command(help=__doc__)
@click.option("--only", multiple=True, metavar="TYPE", help="This entry only; repeatable.")
@click.option("--keep", is_flag=True, help="With --only: write its entries beside the others of the results file.")
def main(only: tuple[str, ...], keep: bool) -> None:
    unknown = sorted(set(only) - set(decoders.names()))
    if unknown:
        raise click.UsageError(f"transformers' causal-LM mapping has no {unknown[0]}")
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    begin = time.perf_counter()
    entries: dict[str, dict[str, Any]] = {}
    for name in only or decoders.names():
        entries[name] = run(name)
        say(f"{name}: {entries[name]['outcome']}  {entries[name].get('reason', '')}")
    counts = counted(entries)
    if keep or not only:
        before = json.loads(RESULTS.read_text())["sections"]["sweep"] if only else None
        record(entries, time.perf_counter() - begin, before)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    sys.exit(3 if any(counts[outcome] for outcome in FAILED) else 0)


if __name__ == "__main__":
    main()
