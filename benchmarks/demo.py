"""`make demo`: convert the embedded base, decode held-out prompts in three modes, compare with the original, certify.

Offline, on the CPU.  The summary goes to stdout, progress to stderr.  Exits 3 if an output that must be
identical is not, or the certificate is not ok.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.common import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    ROOT,
    Setting,
    conversion_seconds,
    convert_default,
    load,
    number,
    say,
    table,
)
from retrofit.errors import RetrofitError
from retrofit.eval.acceptance import compare, reference_tokens, summary
from retrofit.eval.certify import certify
from retrofit.eval.speed import REFERENCE, WAYS, seconds_per_token
from retrofit.machine import hardware

TEMPERATURES = (0.8, 0.0)
MEASURED = {
    "ar": "ar",
    "diffusion": "diffusion",
    "fused": "self_spec (fused)",
    "hybrid": "self_spec (hybrid)",
    "prompt_lookup": "prompt lookup",
}
TIMED = {REFERENCE: "transformers generate", "ar": "ar", "auto": "self_spec (auto)"}
BATCH = 8
TURNS = 4


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), help="Artifact to write.  [default: demo-artifact]")
@click.option("--skip-convert", type=click.Path(path_type=Path, exists=True), help="Use this one instead.")
@click.option("--prompts", type=click.IntRange(1), default=16, show_default=True, help="Held-out prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(out: Path | None, skip_convert: Path | None, prompts: int, as_json: bool) -> None:
    started = time.perf_counter()
    try:
        folder = skip_convert or out or ROOT / "demo-artifact"
        if skip_convert is None:
            say("converting the embedded base (a few minutes)")
            convert_default(folder)
        figures = run(load(folder, prompts))
        figures["certificate"] = certified(folder)
    except RetrofitError as error:
        say(f"error: {error}" + (f"\n{error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(figures, indent=2) if as_json else report(figures, folder))
    sys.exit(exit_code(figures))


def exit_code(figures: dict[str, Any]) -> int:
    """0, or 3 where a gate was not met."""
    same = all(part["equal"] == part["total"] for part in figures["lossless"].values())
    return 0 if same and figures["certificate"]["ok"] else 3


def certified(folder: Path) -> dict[str, Any]:
    """What `retrofit certify` does with the artifact: its certificate, also written into it."""
    say("certifying the artifact")
    certificate = certify(folder, "quick", offline=True, progress=False)
    certificate.save(folder)
    return {
        "ok": certificate.ok,
        "what": certificate.what,
        "checks": [{"name": c.name, "status": c.status, "detail": c.detail} for c in certificate.checks],
        "seconds": round(sum(c.seconds for c in certificate.checks), 1),
    }


def run(setting: Setting) -> dict[str, Any]:
    """All figures of the summary, JSON-able."""
    engine, prompts = setting.engine, setting.prompts
    outputs: dict[tuple[str, float], list[list[int]]] = {}
    measured: dict[str, dict[str, Any]] = {way: {} for way in MEASURED}
    for temperature in TEMPERATURES:
        for way in MEASURED:
            say(f"decoding {len(prompts)} prompts: {MEASURED[way]}, T = {temperature:g}")
            results = engine.generate(
                prompts, **WAYS[way], max_new_tokens=NEW_TOKENS, temperature=temperature, batch_size=BATCH,
                ignore_eos=True,
            )  # fmt: skip
            outputs[way, temperature] = [result.tokens for result in results]
            measured[way][f"{temperature:g}"] = summary(results)
    say("decoding the same with transformers")
    original = reference_tokens(setting.reference, prompts, max_new_tokens=NEW_TOKENS)
    greedy = compare(outputs["fused", 0.0], original)
    sampled = compare(outputs["fused", 0.8], outputs["ar", 0.8])
    say("timing")
    speed = {
        f"{temperature:g}": seconds_per_token(
            engine, prompts, ways=list(TIMED), reference=setting.reference, temperature=temperature,
            max_new_tokens=NEW_TOKENS, repeats=TURNS, per_turn=max(1, len(prompts) // TURNS),
        )
        for temperature in TEMPERATURES
    }  # fmt: skip
    parameters = engine.config["parameters"]
    added = parameters["adapter"] + parameters["heads"]
    return {
        "prompts": len(prompts),
        "max_new_tokens": NEW_TOKENS,
        "hardware": hardware(),
        "lossless": {
            "greedy": {"equal": greedy.equal, "total": greedy.total, "differences": greedy.differences},
            "sampled": {"equal": sampled.equal, "total": sampled.total, "differences": sampled.differences},
        },
        "measured": measured,
        "speed": speed,
        "conversion_seconds": conversion_seconds(setting.folder),
        "parameters": {"added": added, "base": parameters["base"], "share": added / parameters["base"]},
    }


def report(figures: dict[str, Any], folder: Path) -> str:
    """The readable summary, up to 90 columns."""
    machine, lossless = figures["hardware"], figures["lossless"]
    title = (
        f"retrofit demo: the embedded base, {figures['prompts']} held-out prompts of {PROMPT_TOKENS} tokens, "
        f"{figures['max_new_tokens']} new ones each"
    )
    place = f"{machine['cpu']}, {machine['threads']} threads, fp32, torch {machine['versions']['torch']}"
    equal = {kind: f"{part['equal']}/{part['total']}" for kind, part in lossless.items()}
    checks = table(
        [
            ["greedy", "self_spec is what transformers generate gives", equal["greedy"]],
            ["T = 0.8", "self_spec is what ar gives at equal seed", equal["sampled"]],
        ],
        left=2,
    )  # fmt: skip
    seconds = figures["conversion_seconds"]
    parameters = figures["parameters"]
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    made = f", made in {seconds / 60:.1f} min" if seconds is not None else ""
    size = f"{parameters['added']:,} parameters, {parameters['share']:.1%} of the base"
    return "\n".join(
        [
            title, place, "",
            "Lossless: outputs identical, token for token", checks, "",
            certificate_lines(figures["certificate"]), "",
            "Tokens per forward (TPF), per verify cycle (tau), and rows run per token",
            forwards_table(figures), looping_note(figures), "",
            "Speed at batch 1, tokens per second", speed_table(figures), speed_note(), "",
            f"The artifact: {shown} ({size}{made})", "",
            "Try next", next_commands(shown),
        ]
    )  # fmt: skip


def certificate_lines(figures: dict[str, Any]) -> str:
    """The verdict of `retrofit certify`, and its checks."""
    verdict = "certified" if figures["ok"] else "NOT certified"
    width = max(len(c["name"]) for c in figures["checks"])
    lines = [
        textwrap.fill(f"  {c['name']:<{width}}  {c['status']}  {c['detail']}", 90, subsequent_indent=" " * (width + 4))
        for c in figures["checks"]
    ]
    return "\n".join([f"The certificate ({verdict}: {figures['what']})", *lines])


def forwards_table(figures: dict[str, Any]) -> str:
    head = ["", "T = 0.8: TPF", "tau", "rows/token", "greedy: TPF", "tau", "rows/token"]
    rows = [head]
    for way, name in MEASURED.items():
        cells = [name]
        for temperature in TEMPERATURES:
            m = figures["measured"][way][f"{temperature:g}"]
            cells += [number(m["tpf"]), number(m["tau"]), number(m["rows_per_token"], 1)]
        rows.append(cells)
    return table(rows)


def looping_note(figures: dict[str, Any]) -> str:
    looping = figures["measured"]["ar"]["0"]["looping_share"]
    sampled = figures["measured"]["ar"]["0.8"]["looping_share"]
    return (
        f"  Greedy outputs that loop (an 8-gram three times within 96 tokens): {looping:.0%}; at T = 0.8: "
        f"{sampled:.0%}.\n  Looping flatters every drafter, prompt lookup most of all: judge by T = 0.8."
    )


def speed_table(figures: dict[str, Any]) -> str:
    rows = [["", "T = 0.8", "greedy"]]
    for way, name in TIMED.items():
        rates = [1 / figures["speed"][f"{temperature:g}"]["median"][way] for temperature in TEMPERATURES]
        rows.append([name, *(f"{rate:.0f}" for rate in rates)])
    return table(rows)


def speed_note() -> str:
    return (
        "  auto decodes by whichever plan is fastest here.  A few CPU cores are limited by arithmetic,\n"
        "  which drafting adds to, so it often chooses plain ar; speculation pays where reading the\n"
        "  weights is what takes time, as on a GPU."
    )


def next_commands(folder: Path) -> str:
    return "\n".join(
        f"  {command}"
        for command in (
            f'.venv/bin/retrofit generate {folder} "def read_lines(path):" --temperature 0.8',
            f".venv/bin/retrofit certify {folder} --level full",
            f".venv/bin/retrofit inspect {folder}",
            "make bars",
        )
    )


if __name__ == "__main__":
    main()
