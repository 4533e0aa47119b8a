"""The measurements behind `make bars`: one function per section, each giving its bars and its figures."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks.common import NEW_TOKENS, ROOT, Bar, Setting, conversion_seconds, load, number, say
from benchmarks.sizes import LARGE, all_sizes
from retrofit.adapters.layout import DraftLayout
from retrofit.eval.acceptance import Comparison, lossless, measure, reference_tokens, same_as_ar
from retrofit.eval.speed import REFERENCE, ratio_of, seconds_per_token, turns_of
from retrofit.named_bases import EMBEDDED
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes

MOST_ROWS = 96
"""Rows per request and forward at which TPF is judged."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "two_forward": {"strategy": "two_forward"},
    "fused all": {"strategy": "fused", "prepare": "all"},
    "fused chain": {"strategy": "fused", "prepare": "all", "tree": 0},
    "fused last": {"strategy": "fused", "prepare": "last"},
    "fused 2": {"strategy": "fused", "prepare": 2},
    "auto": {"strategy": "auto"},
    "prompt_lookup": {"strategy": "prompt_lookup"},
    "hybrid": {"strategy": "hybrid"},
}
TESTED: tuple[dict[str, Any], ...] = (
    {"strategy": "two_forward"},
    {"strategy": "fused", "tree": 0},
    {"strategy": "fused", "tree": 12},
)
"""Of every architecture: drafts in a chain, and drafts that branch."""
BATCHES = (1, 3, 8)
TEMPERATURE = 0.8
BLOCKS = (1, 4, 8, 16)
SPEED_TURNS = 12
SPEED_PROMPTS = 2
"""Prompts of a turn at batch 1: short turns, so that a slow moment of the machine hits all ways alike."""
HELP_RUNS = 7


@dataclass
class Task:
    """What the sections work on; loaded when one first asks for it."""

    folder: Path
    count: int

    @cached_property
    def setting(self) -> Setting:
        say(f"loading {self.folder}")
        return load(self.folder, self.count)


Section = tuple[list[Bar], dict[str, Any]]


def conversion(task: Task) -> Section:
    seconds = conversion_seconds(task.folder)
    if seconds is None:
        return [Bar("conversion of the embedded base", "<= 5 min", "not recorded", None)], {"seconds": None}
    met = seconds <= 300
    figure = f"{seconds / 60:.1f} min"
    return [Bar("conversion of the embedded base", "<= 5 min", figure, met)], {"seconds": seconds}


def greedy(task: Task) -> Section:
    """Every strategy at every batch size against transformers' `generate`, computed once."""
    setting = task.setting
    say("greedy: the original model, by transformers")
    expected = reference_tokens(setting.reference, setting.prompts, max_new_tokens=NEW_TOKENS)
    bars, figures = [], {}
    for name, options in STRATEGIES.items():
        found = {}
        for batch in BATCHES:
            say(f"greedy: {name}, batch {batch}")
            found[batch] = lossless(
                setting.engine, expected, setting.prompts, **options, max_new_tokens=NEW_TOKENS,
                batch_size=batch,
            )  # fmt: skip
        bars.append(equality_bar(f"greedy = transformers: {name}, batch 1 3 8", list(found.values())))
        figures[name] = {str(batch): as_dict(comparison) for batch, comparison in found.items()}
    return bars, figures


def sampled(task: Task) -> Section:
    """Every strategy against `ar` at equal seed; `ar` runs one request at a time, once."""
    setting, options = task.setting, {"max_new_tokens": NEW_TOKENS, "temperature": TEMPERATURE}
    say("sampled: ar")
    results = setting.engine.generate(setting.prompts, "ar", **options, batch_size=1, ignore_eos=True)
    expected = [result.tokens for result in results]
    bars, figures = [], {}
    for name, strategy in STRATEGIES.items():
        say(f"sampled: {name}")
        found = same_as_ar(
            setting.engine, setting.prompts, **strategy, **options, batch_size=BATCHES[-1], expected=expected
        )
        what = f"T = {TEMPERATURE}, = ar at equal seed: {name}, batch {BATCHES[-1]}"
        bars.append(equality_bar(what, [found]))
        figures[name] = as_dict(found)
    return bars, figures


def equality_bar(what: str, found: list[Comparison]) -> Bar:
    figure = " ".join(f"{c.equal}/{c.total}" for c in found)
    return Bar(what, "all identical", figure, all(c.all_equal for c in found))


def as_dict(found: Comparison) -> dict[str, Any]:
    differences = [difference._asdict() for difference in found.differences]
    return {"equal": found.equal, "total": found.total, "differences": differences}


def tpf(task: Task) -> Section:
    """`fused` at three temperatures; greedy beside prompt lookup and the share of looping outputs."""
    setting = task.setting
    bars, figures = [], {}
    for temperature, least in ((0.8, 1.65), (1.0, 1.5), (0.0, None)):
        key = f"T = {temperature:g}" if temperature else "greedy"
        say(f"TPF: fused and prompt lookup, {key}")
        fused, lookup = (
            measure(
                setting.engine,
                setting.prompts,
                strategy=strategy,
                temperature=temperature,
                max_new_tokens=NEW_TOKENS,
            )
            for strategy in ("fused", "prompt_lookup")
        )
        figures[key] = {"fused": fused, "prompt_lookup": lookup}
        widest = fused["most_rows"] <= MOST_ROWS
        met = None if least is None else fused["tpf"] >= least and widest
        bar = "stated" if least is None else f">= {least}"
        beside = f"{number(fused['tau'])}, {number(fused['rows_per_token'], 1)}"
        bars += [
            Bar(f"TPF, fused, {key}", bar, number(fused["tpf"]), met),
            Bar(f"  tau and rows per token, {key}", "stated", beside, None),
            Bar(f"  rows per request and forward, {key}", f"<= {MOST_ROWS}", str(fused["most_rows"]), widest),
            Bar(f"  TPF, prompt lookup, {key}", "stated", number(lookup["tpf"]), None),
            Bar(f"  looping outputs, {key}", "stated", f"{fused['looping_share']:.0%}", None),
        ]
    return bars, figures


def speed(task: Task) -> Section:
    """Seconds per token of `auto`, `ar` and transformers' `generate` in turns."""
    setting = task.setting
    bars, figures = [], {}
    for temperature in (0.0, TEMPERATURE):
        for batch in (1, 8):
            key = f"{f'T = {temperature:g}' if temperature else 'greedy'}, batch {batch}"
            say(f"speed: {key}")
            found = seconds_per_token(
                setting.engine, setting.prompts, reference=setting.reference, temperature=temperature,
                max_new_tokens=NEW_TOKENS, batch_size=batch, repeats=SPEED_TURNS,
                per_turn=min(max(batch, SPEED_PROMPTS), task.count),
            )  # fmt: skip
            turns = turns_of(found)
            auto, own = ratio_of(turns, "auto", "ar"), ratio_of(turns, "ar", REFERENCE)
            figures[key] = {**found, "auto_to_ar": auto, "ar_to_transformers": own}
            rates = " ".join(f"{1 / found['median'][way]:.0f}" for way in ("auto", "ar", REFERENCE))
            bars += [
                Bar(f"seconds per token, auto / ar, {key}", "<= 1.02", f"{auto:.3f}", auto <= 1.02),
                Bar(f"seconds per token, ar / transformers, {key}", "<= 0.9", f"{own:.3f}", own <= 0.9),
                Bar("  tokens/s of auto, ar, transformers", "stated", rates, None),
            ]
    return bars, figures


def adapter(_: Task) -> Section:
    """Adapter with heads in percent of the base, for every recipe, from its base's published shapes."""
    bars, figures = [], {}
    for name, (added, base) in all_sizes().items():
        limit = 0.25 if name == EMBEDDED else 0.02 if base >= LARGE else None
        share = added / base
        figures[name] = {"adapter": added, "base": base, "share": share}
        bar, met = ("stated", None) if limit is None else (f"<= {limit:.0%}", share <= limit)
        bars.append(Bar(f"adapter with heads: {name}", bar, f"{share:.2%}", met))
    return bars, figures


def architectures(_: Task) -> Section:
    """Tiny random models of every architecture, every block and batch, in the ways of `TESTED`.

    Each twice: drafts of a random adapter, nearly all wrong, and the truth with planted mistakes.
    """
    models, helpers = from_tests("tiny_models"), from_tests("decoding")
    prompts = helpers.random_prompts((5, 17, 9))
    bars, figures = [], {}
    for name, build in models.ARCHITECTURES.items():
        say(f"architectures: {name}")
        expected = reference_tokens(build(), prompts, max_new_tokens=24)
        planted = helpers.Oracle(dict(enumerate(expected)), vocab=models.VOCABULARY)
        found = []
        for block in BLOCKS:
            engine = helpers.randomise(Engine.from_model(build(), layout=DraftLayout(block=block)))
            for drafter in (modes.draft_tokens, planted):
                with patch.object(modes, "draft_tokens", drafter):
                    found += [
                        lossless(engine, expected, prompts, **way, max_new_tokens=24, batch_size=batch)
                        for way in TESTED
                        for batch in (1, 3)
                    ]
        differences = [d for c in found for d in c.differences]
        total = Comparison(sum(c.equal for c in found), sum(c.total for c in found), differences)
        bars.append(equality_bar(f"{name}: block 1 4 8 16 x batch 1 3", [total]))
        figures[name] = as_dict(total)
    return bars, figures


def from_tests(name: str) -> Any:
    """A module of tests/shared/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "shared" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def help_time(_: Task) -> Section:
    """`retrofit --help` in fresh processes, and whether it imports torch."""
    call = "from retrofit.cli.main import main; main(['--help'], standalone_mode=False)"
    script = Path(sys.executable).with_name("retrofit")
    command = [str(script), "--help"] if script.is_file() else [sys.executable, "-c", call]
    seconds = []
    for _run in range(HELP_RUNS):
        begin = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
        seconds.append(time.perf_counter() - begin)
    check = f"{call}\nimport sys; print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    torch_free = done.stderr.strip().endswith("False")
    middle = median(seconds)
    bars = [
        Bar("retrofit --help, median of 7", "<= 0.3 s", f"{middle:.2f} s", middle <= 0.3),
        Bar("retrofit --help imports torch", "no", "no" if torch_free else "yes", torch_free),
    ]
    return bars, {"seconds": seconds, "imports_torch": not torch_free}


SECTIONS = {
    "conversion": conversion,
    "greedy": greedy,
    "sampled": sampled,
    "tpf": tpf,
    "speed": speed,
    "adapter": adapter,
    "architectures": architectures,
    "help": help_time,
}
NEED_ARTIFACT = ("conversion", "greedy", "sampled", "tpf", "speed")
