"""One recipe and seed: trained by the real `convert`, decoded from, certified.

An artifact lies under a name made of its whole recipe, so one that is there already is not made again, and one that was
interrupted is gone on with.
Not here: what is equal for all (`setting.py`), what the figures mean (`figures.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import say
from benchmarks.drafts.figures import HYBRID, TEMPERATURES
from benchmarks.drafts.setting import OWN, Setting, folder_name, plan_of
from benchmarks.smollm2 import held_out
from retrofit.artifact import folder as artifact
from retrofit.eval.acceptance import measure
from retrofit.eval.certify import certify
from retrofit.recipes.convert import convert
from retrofit.recipes.training.checkpoint import folder_of
from retrofit.recipes.training.step import expected_tau
from retrofit.runtime.engine import Engine

WAYS: dict[str, dict[str, Any]] = {
    "two_forward": {"strategy": "two_forward"},
    "fused chain": {"strategy": "fused", "tree": 0},
    "fused": {"strategy": "fused"},
    HYBRID: {"strategy": "hybrid"},
}
ANCHORED = ("fused", "hybrid")
"""Strategies of layouts with an anchor."""
KEPT = ("tpf", "tau", "rows_per_token", "most_rows", "accept_cond", "tried", "tokens", "looping_share")


def trained(spec: str, setting: Setting, seed: int, rate: float, work: Path) -> tuple[Path, dict[str, Any]]:
    """(artifact, what its training says): made unless it is there; processor seconds where all were spent here.

    Raises what `convert` raises.
    """
    plan = plan_of(spec, setting, seed, rate)
    folder = work / folder_name(spec, plan)
    begin, whole = time.process_time(), False
    if not (folder / artifact.CONFIG).is_file():
        say(f"training {spec}, seed {seed}, learning rate {plan.train.lr:.2g}")
        whole = not folder_of(folder).exists()
        convert(recipe=plan, out=folder, offline=True, quiet=True)
    taken = time.process_time() - begin
    config = artifact.read_config(folder)
    return folder, {
        "lr": plan.train.lr,
        "seconds": config["training"]["seconds"],
        "processor_seconds": round(taken, 1) if whole else None,
        "draft_rows": config["training"]["draft_rows"],
        "parameters": config["parameters"]["adapter"] + config["parameters"]["heads"],
        "held_out_tau": round(expected_tau(config["acceptance"]["conditional"]["sampled"]), 4),
    }


def run(spec: str, setting: Setting, seed: int, rates: Sequence[float], work: Path, certified: bool) -> dict[str, Any]:
    """Everything of one recipe and seed; of several rates the one that drafts best on held-out text.

    Raises what `convert` and `Engine.load` raise.
    """
    tried = {rate: trained(spec, setting, seed, rate, work) for rate in rates}
    rate = max(tried, key=lambda one: tried[one][1]["held_out_tau"])
    folder, training = tried[rate]
    found = {
        "recipe": spec,
        "seed": seed,
        "setting": setting.to_dict(),
        "rate": rate,
        "rates": {f"{one:g}": about["held_out_tau"] for one, (_, about) in tried.items()},
        **training,
    }
    with Engine.load(folder, "cpu", "float32" if setting.own == OWN else "auto", offline=True) as engine:
        found |= decoded(engine, setting, seed, with_lookup=spec == setting.own and seed == 0)
    if certified:
        begin = time.perf_counter()
        certificate = certify(folder, "quick", device="cpu", offline=True, progress=False)
        found |= {"certified": certificate.ok, "certify_seconds": round(time.perf_counter() - begin, 1)}
        if not certificate.ok:
            found["not_passed"] = [check.name for check in certificate.checks if check.status != "passed"]
    return found


def decoded(engine: Engine, setting: Setting, seed: int, with_lookup: bool) -> dict[str, Any]:
    """Figures of every way at every temperature, one request at a time; prompt lookup too, which needs no adapter.

    Texts of the embedded base, which end nowhere, are as long as asked.
    """
    prompts = held_out(engine, setting.prompts)
    anchored = engine.layout.anchored
    ways = {way: options for way, options in WAYS.items() if anchored or options["strategy"] not in ANCHORED}
    asked = {**ways, **({"lookup": {"strategy": "prompt_lookup"}} if with_lookup else {})}
    found: dict[str, Any] = {"ways": {}}
    for temperature in TEMPERATURES:
        at = f"{temperature:g}"
        measured = {}
        for way, options in asked.items():
            say(f"  decoding, T = {at}, {way}")
            figures = measure(
                engine, prompts, **options, temperature=temperature, max_new_tokens=setting.new_tokens,
                batch_size=1, seed=seed, ignore_eos=setting.own == OWN,
            )  # fmt: skip
            measured[way] = {key: figures[key] for key in KEPT}
        if "lookup" in measured:
            found.setdefault("lookup", {})[at] = measured.pop("lookup")
        found["ways"][at] = measured
    return found
