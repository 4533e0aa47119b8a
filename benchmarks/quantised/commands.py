"""The command line on a base of few bits, and how each command ended.

    used        converted for a few steps, then a text by `self_spec` and by `ar`
    certified   `retrofit certify`, in whole or with fewer texts
    weighed     bytes of the base's weights, and by how much a process grows that loads them and runs them

Not here: how often drafts come true (`drafting.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from click.testing import CliRunner

from benchmarks.common import ROOT, Bar, say
from benchmarks.quantised.bases import NAME, Subject
from retrofit.cli.main import main
from retrofit.eval import certify as certifying
from retrofit.machine import forget_peak, give_back, peak_resident, resident

STEPS = 20
SHORT = (
    *(f"train.steps={STEPS}", "train.warmup=2", "train.batch_size=1", "train.anchors=4", "train.precision=bfloat16"),
    *("data.source=stdlib", "data.responses=keep", "data.max_length=64", "data.held_out=2"),
    "adapter.markov_init=zero",  # the base's own pairs take longer than so few steps
)
PROMPT, NEW_TOKENS = "def read_lines(path):", 24
FEWER = certifying.Size(prompts=2, tokens=8, samples=2000)
"""What a certificate of fewer texts runs; no option of the command asks for so little."""
UNFORESEEN = ("not foreseen", "Traceback")
WORKS = "works"
MOST = 0.4
"""Of plain bfloat16's bytes that nf4 may take."""


def retrofit(*arguments: str) -> dict[str, Any]:
    """Run a command in this process; what it printed is under `out` and `err`, and is dropped before figures are
    written."""
    begin, processor = time.perf_counter(), time.process_time()
    done = CliRunner().invoke(main, list(arguments))
    spent = {"seconds": time.perf_counter() - begin, "processor_seconds": time.process_time() - processor}
    took = {name: round(value, 1) for name, value in spent.items()}
    return {"exit": done.exit_code, **took, "out": done.stdout, "err": done.stderr}


def ended(ran: dict[str, Any]) -> str:
    """`works`, what it was refused with, or that nobody foresaw it."""
    if any(word in ran["err"] for word in UNFORESEEN):
        return "not foreseen: " + next((line for line in ran["err"].splitlines() if "Error" in line), "")
    if ran["exit"] == 0:
        return WORKS
    said = [line for line in ran["err"].splitlines() if line.startswith(("Error:", "hint:"))]
    return f"refused ({ran['exit']}): {' '.join(said)}" if said else f"not foreseen: exit {ran['exit']}"


def kept(ran: dict[str, Any]) -> dict[str, Any]:
    return {**{key: ran[key] for key in ("exit", "seconds", "processor_seconds")}, "ended": ended(ran)}


def used(subject: Subject, out: Path) -> dict[str, Any]:
    arguments = ["convert", str(subject.folder), "--recipe", NAME, "-o", str(out), "--dtype", "bfloat16"]
    found = {"convert": retrofit(*arguments, "--overwrite", "--restart", "--offline", *SHORT, *subject.settings)}
    texts = []
    if found["convert"]["exit"] == 0:
        for name, how in (("self_spec", ["--strategy", "fused"]), ("ar", ["--mode", "ar"])):
            limit = ["--max-new-tokens", str(NEW_TOKENS)]
            found[name] = retrofit("generate", str(out), PROMPT, *limit, *how, "--offline")
            texts.append(found[name]["out"])
    same = len(texts) == 2 and texts[0] == texts[1] and bool(texts[0].strip())
    return {**{name: kept(ran) for name, ran in found.items()}, "same": same}


def bar_of_use(name: str, found: dict[str, Any]) -> Bar:
    ends = [found[part]["ended"] for part in ("convert", "self_spec", "ar") if part in found]
    bad = next((end for end in ends if end != WORKS), None)
    texts = "equal" if found["same"] else "other"
    figure = bad or f"works; self_spec's text {texts} to ar's"
    met = found["same"] if bad is None else bad.startswith("refused")
    return Bar(f"{name}: convert {STEPS} steps, generate", "works or is refused by name", figure, met)


def certified(out: Path, dtype: str, whole: bool) -> dict[str, Any]:
    """whole: by as many texts as the command takes."""
    size = certifying.LEVELS["quick"] if whole else FEWER
    with patch.dict(certifying.LEVELS, quick=size):
        ran = retrofit("certify", str(out), "--dtype", dtype, "--json", "--offline", "--quiet")
    found: dict[str, Any] = {**kept(ran), "prompts": size.prompts, "tokens": size.tokens}
    if ran["out"].startswith("{"):
        said = json.loads(ran["out"])
        checks = {one["name"]: {key: one[key] for key in ("status", "detail", "seconds")} for one in said["checks"]}
        found |= {"ok": said["ok"], "exact": said["exact"], "dtype": said["dtype"], "checks": checks}
    return found


def bar_of_certificate(name: str, found: dict[str, Any]) -> Bar:
    what = f"{name}: certify, {found['prompts']} texts of {found['tokens']} tokens"
    if "checks" not in found:
        return Bar(what, "all checks passed", found["ended"], found["ended"].startswith("refused"))
    checks = found["checks"]
    bad = [f"{check} {about['status']}" for check, about in checks.items() if about["status"] != "passed"]
    figure = f"{len(checks) - len(bad)} of {len(checks)}, exact={found['exact']} in {found['dtype']}"
    return Bar(what, "all checks passed", ", ".join([figure, *bad]), found["ok"])


def weighed(folder: Path, kind: str) -> dict[str, Any]:
    """kind: what is quantised to while loading; `plain` for nothing.  In a process of its own."""
    job = [sys.executable, "-W", "ignore", "-m", "benchmarks.quantised", "--weigh", str(folder), "--kinds", kind]
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"weighing {kind} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def weigh(folder: Path, kind: str) -> dict[str, int]:
    """Bytes of weights; of this process's growth: when loaded, at most while loading, and at most in forwards then."""
    import torch

    from retrofit.hub import load_base
    from retrofit.named_bases import EMBEDDED
    from retrofit.quantised.linear import weight_bytes

    held = None if kind == "plain" else kind
    options = {"dtype": "bfloat16", "offline": True, "quantization": held}
    load_base(EMBEDDED, **options)  # type: ignore[arg-type]  # so that what is imported late is there
    give_back()
    forget_peak()
    before = resident()
    model = load_base(str(folder), **options).model  # type: ignore[arg-type]
    loading = peak_resident() - before
    give_back()
    loaded = resident() - before
    forget_peak()
    with torch.no_grad():
        for _ in range(3):
            model(torch.arange(8)[None], logits_to_keep=1)
    return {"weights": weight_bytes(model), "loaded": loaded, "loading": loading, "running": peak_resident() - before}


def bars_of_weight(found: dict[str, dict[str, int]]) -> list[Bar]:
    """Against the plain bytes, which come first."""
    plain, bars = found["plain"]["weights"], []
    for kind, sizes in found.items():
        if kind == "plain":
            continue
        share, running = sizes["weights"] / plain, sizes["running"] / found["plain"]["running"]
        loading = sizes["loading"] / plain
        barred = kind == "nf4"
        bars += [
            Bar(f"{kind}: bytes of base weights to plain bfloat16's", f"<= {MOST}" if barred else "", f"{share:.3f}",
                share <= MOST if barred else None),
            Bar(f"  {kind}: a process that runs, to one that runs plain", "", f"{running:.2f}", None),
            Bar(f"  {kind}: growth while loading, to plain bfloat16's bytes", "", f"{loading:.2f}", None),
        ]  # fmt: skip
    return bars


def told(name: str, bars: list[Bar]) -> None:
    for bar in bars:
        say(f"  {name}: {bar.what.strip()}  {bar.figure}{'  MISSED' if bar.met is False else ''}")
