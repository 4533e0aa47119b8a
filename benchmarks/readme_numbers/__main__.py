"""Draw the figures of docs/numbers.md, docs/serving.md, README.md and docs/index.md from results/*.json.

They stand between markers such as `<!-- numbers:begin -->` and `<!-- numbers:end -->`; all else is left as it is.  GPU
bars that no results/gpu-*.json holds are listed as not measured.  With --check nothing is written; exits 1 if a block
is not what the results say.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.diffusion import tables as diffusion
from benchmarks.drafts import tables as drafts
from benchmarks.exact import FAMILIES
from benchmarks.gpu.bars import BARS as GPU_BARS
from benchmarks.gpu.bars import TITLES as GPU_TITLES
from benchmarks.quantised import tables as quantised
from benchmarks.readme_numbers.blocks import (
    ALONG,
    DRAFTS,
    FEW_BITS,
    REAL,
    SERVED,
    VERDICTS,
    Results,
    against_designs,
    caption,
    few_bits,
    figures,
    quickstart,
    real_model,
    served,
    source,
    trained_along,
)

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(ROOT / name for name in ("README.md", "docs/index.md", "docs/numbers.md", "docs/serving.md"))
RESULTS = ROOT / "results"
TITLES = {
    "conversion": "Conversion",
    "greedy": "Lossless, greedy",
    "sampled": "Lossless, sampled",
    "tpf": "Tokens per forward",
    "speed": "Speed",
    "adapter": "Adapter size",
    "architectures": "Lossless on every architecture, random tiny models, fp32",
    "sweep": "Every decoder of transformers' causal-LM mapping, random tiny models, fp32",
    **{
        f"exact, {name}": f"Exact in bfloat16, random {name}, 32 prompts x 64 tokens, batch 1 3 8, greedy and T = 0.8"
        for name in FAMILIES
    },
    "help": "Command line",
    "interrupted": "Interrupted and resumed",
    "hostile": "Files of strangers",
    "memory": "Dry run, memory",
    "CPU, speed": "A real model on a CPU: `ar` by length of context",
    "CPU, steps": "A real model on a CPU: steps that draft and verify",
    "CPU, batch": "A real model on a CPU: 32 requests",
    "CPU, split": "A real model on a CPU: a step against the memory's bandwidth",
    "CPU, bitwise": "A real model and random ones on a CPU: texts equal to own `ar`",
    "CPU, memory": "A real model on a CPU: memory",
    **{
        f"{what}, {kind}": f"SmolLM2-135M, {title}, {kind}"
        for kind in ("bfloat16", "float32")
        for what, title in (
            ("acceptance", "tokens per forward"),
            ("contexts", "tokens per forward by length of context"),
            ("lossless", "lossless"),
            ("speed", "speed"),
        )
    },
    **{
        f"vLLM, {name}, {kind}": f"Drafts in vLLM, {name}, {kind}"
        for name in ("embedded base", "SmolLM2-135M")
        for kind in ("float32", "bfloat16")
    },
    drafts.SUMMARY: "Drafts of the own recipe against published designs, embedded base",
    f"drafts-smollm2, {drafts.SUMMARY}": "Drafts of the own recipe against a published design, SmolLM2-135M",
    diffusion.CURVE: "Mode `diffusion`, embedded base: speed against agreement",
    diffusion.INFILLING: "Gaps filled, embedded base",
    "carried": "Going on: an adapter carried over to a fine-tuned base, embedded base",
    "parts": "Going on: two runs for one, embedded base",
    quantised.USED: "SmolLM2-135M in few bits a weight: converted, decoded from",
    quantised.WEIGHED: "SmolLM2-135M in few bits a weight: memory",
    quantised.CERTIFIED: "SmolLM2-135M in few bits a weight: certified",
    quantised.DRAFTS: "SmolLM2-135M in few bits a weight: tau of a chain, MT-bench, T = 0.8",
    "preset best": "Tokens per forward, embedded base, preset `best`",
    "dense": "Training step, 256 blocks of 16 on 2,048 tokens",
    "tiny": "Training step, embedded base",
    "49k": "Training step, 64 blocks of 8 on 1,024 tokens",
    "150k": "Training step, vocabulary of 151,936",
}
HINT = "run python -m benchmarks.readme_numbers"


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Only say whether the pages are up to date.")
def main(check: bool) -> None:
    stale = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        try:
            new = redrawn(text, RESULTS, path.name)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        if new != text:
            stale.append(path.name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        print(f"{', '.join(stale)}: not what results/ says; {HINT}", file=sys.stderr)
        sys.exit(1)


def redrawn(text: str, results: Path, page: str = "numbers.md") -> str:
    """A page's text with its blocks drawn anew.  Raises ValueError where their markers are not."""
    return filled(text, blocks(page, results), page)


def filled(text: str, contents: Mapping[str, str], page: str) -> str:
    """The text with these contents between the markers of their names.  Raises ValueError where those are not."""
    for name, content in contents.items():
        begin, end = markers(name)
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"{page} has no {begin} ... {end}")
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def blocks(page: str, results: Path) -> dict[str, str]:
    """What stands between the markers of a page, by name."""
    found = Results(results)
    if page == "numbers.md":
        real = {"smollm2": real_model(found)} if REAL in found.files else {}
        designs = {"drafts": against_designs(found)} if DRAFTS in found.files else {}
        sweep = {"diffusion": diffusion.markdown(found.files["diffusion"])} if "diffusion" in found.files else {}
        bits = {"quantised": few_bits(found)} if FEW_BITS in found.files else {}
        along = {"joint": trained_along(found)} if ALONG in found.files else {}
        return {"numbers": block(results), **real, **designs, **sweep, **bits, **along}
    if page == "serving.md":
        return {"vllm": served(found)} if SERVED in found.files else {}
    short = {"run": caption(found), "quickstart": quickstart(found)}
    return {**short, "figures": figures(found)} if page == "README.md" else short


def block(results: Path) -> str:
    """The Markdown between the markers: one table per section of every results file, in order."""
    parts, on_gpu = [], set()
    for path in sorted(results.glob("*.json")):
        gpu = path.name.startswith("gpu-")
        for name, section in json.loads(path.read_text()).get("sections", {}).items():
            if section["bars"]:
                titles = GPU_TITLES if gpu else TITLES
                parts.append(part(titles.get(f"{path.stem}, {name}") or titles.get(name, name), section))
            if gpu:
                on_gpu |= {bar["what"] for bar in section["bars"]}
    missing = [(what, bar) for what, bar in GPU_BARS.values() if what not in on_gpu]
    if missing:
        rows = [[what, bar, "not measured", ""] for what, bar in missing]
        parts.append(
            f"**GPU, not measured**\n\n{table(rows)}\n\n`python -m benchmarks.gpu` on a CUDA GPU measures them."
        )
    return "\n\n".join(parts)


def part(title: str, section: dict[str, Any]) -> str:
    rows = [[bar["what"].strip(), bar["bar"], bar["figure"], VERDICTS[bar["met"]]] for bar in section["bars"]]
    return f"**{title}**\n\n{table(rows)}\n\n{source(section)}"


def table(rows: list[list[str]]) -> str:
    lines = ["| what | bar | measured | |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
