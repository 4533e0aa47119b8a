"""Take recipes apart by what they come to on held-out text.  `python -m benchmarks.drafts.ablations SPEC ..`

A SPEC is a recipe with keys changed, as `python -m benchmarks.drafts` takes it, and is trained as there: the embedded
base, the same text, steps, draft rows and drafts in a block.  In place of decoding, which takes longer than so short
a training, acceptance is measured on the held-out text that every conversion is measured on: what a chain comes to
when drafts are drawn (tau), and the best tree within 96 rows, greedy and at T = 0.8.
What is finished is written at once and not run again.  On the CPU, offline.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

from benchmarks.common import ROOT, say, section, table, write
from benchmarks.drafts.__main__ import WORK, sections_of
from benchmarks.drafts.runs import trained
from benchmarks.drafts.setting import Setting, plan_of
from retrofit.adapters.layout import DraftLayout
from retrofit.artifact import folder as artifact
from retrofit.errors import RetrofitError
from retrofit.recipes.schema import Recipe, by_key
from retrofit.runtime.rules.tree import fixed_tree

RESULTS = ROOT / "results" / "ablations.json"
OF_A_RECIPE = ("adapter.", "draft.", "objective.", "train.lr", "train.warmup", "train.schedule", "train.curriculum")
"""Keys that a recipe may have of its own, by how they begin."""


def title_of(spec: str, setting: Setting, seed: int) -> str:
    return f"{spec}, {setting.steps} steps of {setting.rows} rows, seed {seed}"


def figures_of(folder: Path, plan: Recipe) -> dict[str, Any]:
    """What the held-out text says of an artifact; trees: tokens expected of a forward that verifies one."""
    acceptance = artifact.read_config(folder)["acceptance"]
    layout = DraftLayout(**plan.draft.model_dump())
    trees = {}
    for kind in ("greedy", "sampled"):
        tree = fixed_tree(layout, acceptance, "all", None, kind == "sampled")
        trees[kind] = None if tree is None else round(1 + tree.expected, 4)
    return {"conditional": acceptance["conditional"], "trees": trees}


def measured(spec: str, setting: Setting, seed: int, work: Path) -> dict[str, Any]:
    """Everything of one recipe and seed.  Raises what `convert` raises."""
    plan = plan_of(spec, setting, seed)
    folder, training = trained(spec, setting, seed, 1.0, work)
    own = {key: value for key, value in by_key(plan).items() if key.startswith(OF_A_RECIPE)}
    return {"recipe": spec, "seed": seed, "steps": setting.steps, "rows": setting.rows, "keys": own, **training,
            **figures_of(folder, plan)}  # fmt: skip


def lines(sections: dict[str, Any]) -> list[list[str]]:
    """The table: a recipe a line, those that draft best first."""
    rows = []
    for found in (one["figures"] for one in sections.values()):
        trees = [found["trees"][kind] for kind in ("sampled", "greedy")]
        rows.append([
            title_of(found["recipe"], Setting(found["steps"], found["rows"], 0, 0, 0, ()), found["seed"]),
            f"{found['held_out_tau']:.3f}",
            *("-" if tree is None else f"{tree:.3f}" for tree in trees),
            " ".join(f"{chance:.2f}" for chance in found["conditional"]["sampled"]),
            "-" if found["processor_seconds"] is None else f"{found['processor_seconds']:.0f}",
        ])  # fmt: skip
    rows.sort(key=lambda row: row[1], reverse=True)
    return [["recipe", "tau", "tree, T = 0.8", "tree, greedy", "slots", "seconds"], *rows]


@click.command(help=__doc__)
@click.argument("specs", nargs=-1)
@click.option("--steps", type=click.IntRange(1), default=80, show_default=True, help="Of training.")
@click.option("--rows", type=click.IntRange(1), default=96, show_default=True, help="Draft rows per sequence and step.")
@click.option("--drafts", type=click.IntRange(1), default=4, show_default=True, help="Tokens a block proposes.")
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, default=(0,), show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of torch.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=WORK, help="Where artifacts lie.  [default: out/drafts]"
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="[default: results/ablations.json]")
def main(
    specs: tuple[str, ...], steps: int, rows: int, drafts: int, seeds: tuple[int, ...], threads: int | None,
    work: Path, out: Path,
) -> None:  # fmt: skip
    setting = Setting(steps, rows, drafts, 0, 0, (1.0,))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    command = f"python -m benchmarks.drafts.ablations --steps {steps} --rows {rows} --drafts {drafts}"
    try:
        for spec in specs:
            plan_of(spec, setting, 0)  # before anything is trained
        for seed in seeds:
            for spec in specs:
                title = title_of(spec, setting, seed)
                if title in sections_of(out):
                    continue
                begin = time.perf_counter()
                found = measured(spec, setting, seed, work)
                one = section(f"{command} --seed {seed} '{spec}'", time.perf_counter() - begin, [], found)
                write(out, {title: one})
                say(f"  {title}: tau {found['held_out_tau']}, trees {found['trees']}")
    except RetrofitError as error:
        say(f"error: {error}" + (f"\n{error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    print(table(lines(sections_of(out))))


if __name__ == "__main__":
    main()
