"""Draw the numbers of README.md from results/*.json.

They stand between `<!-- numbers:begin -->` and `<!-- numbers:end -->`; all else is left as it is.  With
--check nothing is written; exits 1 if the block is not what the results say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

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
    "help": "Command line",
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
    files = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    parts = [part(name, section) for file in files for name, section in file.get("sections", {}).items()]
    return "\n\n".join(parts) if parts else "Not measured yet: run `make bars`."


def part(name: str, section: dict[str, Any]) -> str:
    lines = [f"**{TITLES.get(name, name)}**", "", "| what | bar | measured | |", "| --- | --- | --- | --- |"]
    for bar in section["bars"]:
        cells = [bar["what"].strip(), bar["bar"], bar["figure"], VERDICTS[bar["met"]]]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([*lines, "", source(section)])


def source(section: dict[str, Any]) -> str:
    """Command, machine, versions, commit and date, on one line."""
    machine = section["hardware"]
    commit = machine["commit"] or "not committed"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    return f"`{section['command']}` on {where}; {versions}; commit {commit}, {machine['date']}."


if __name__ == "__main__":
    main()
