"""Draw the numbers of README.md from results/*.json.

They stand between `<!-- numbers:begin -->` and `<!-- numbers:end -->`; all else is left as it is.  GPU bars that no
results/gpu-*.json holds are listed as not measured.  With --check nothing is written; exits 1 if the block is not what
the results say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.exact import FAMILIES
from benchmarks.gpu.bars import BARS as GPU_BARS
from benchmarks.gpu.bars import TITLES as GPU_TITLES

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "results"
BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
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
    "memory": "Dry run, memory",
    "dense": "Training step, 256 blocks of 16 on 2,048 tokens",
    "tiny": "Training step, embedded base",
    "49k": "Training step, 64 blocks of 8 on 1,024 tokens",
    "150k": "Training step, vocabulary of 151,936",
}
HINT = "run python -m benchmarks.readme_numbers"
VERDICTS = {True: "met", False: "**missed**", None: ""}


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Only say whether README.md is up to date.")
def main(check: bool) -> None:
    text = README.read_text(encoding="utf-8")
    try:
        new = redrawn(text, RESULTS)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if check and new != text:
        print(f"README.md is not what results/ says; {HINT}", file=sys.stderr)
        sys.exit(1)
    if not check:
        README.write_text(new, encoding="utf-8")


def redrawn(text: str, results: Path) -> str:
    """README text with its numbers block drawn anew.  Raises ValueError where the two markers are not."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{block(results)}\n{END}{after}"


def block(results: Path) -> str:
    """The Markdown between the markers: one table per section of every results file, in order."""
    parts, on_gpu = [], set()
    for path in sorted(results.glob("*.json")):
        gpu = path.name.startswith("gpu-")
        for name, section in json.loads(path.read_text()).get("sections", {}).items():
            if section["bars"]:
                parts.append(part((GPU_TITLES if gpu else TITLES).get(name, name), section))
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


def source(section: dict[str, Any]) -> str:
    """Command, machine, versions, commit and date, on one line."""
    machine = section["hardware"]
    commit = machine["commit"] or "not committed"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    where += f", driver {machine['driver']}" if machine.get("driver") else ""
    return f"`{section['command']}` on {where}; {versions}; commit {commit}, {machine['date']}."


if __name__ == "__main__":
    main()
