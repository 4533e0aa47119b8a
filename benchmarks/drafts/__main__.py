"""Hold retrofit's own recipe for a base against published designs.  `python -m benchmarks.drafts`

Each recipe is trained on the same data, for the same steps, with the same draft rows and drafts in a block, then
decodes the same held-out prompts, one at a time, greedy and at T = 0.8 and 1; on the CPU, offline.  A recipe may have
keys changed: `--recipes "tiny adapter.targets=[o]"`.  A learning rate is chosen with the first seed.  What is finished
is written at once and not run again; what was interrupted goes on.  Exits 3 if a bar is missed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

from benchmarks.common import ROOT, say, section, table, write
from benchmarks.drafts import tables
from benchmarks.drafts.figures import bars
from benchmarks.drafts.runs import run
from benchmarks.drafts.setting import OWN, PUBLISHED, Setting
from retrofit.errors import RetrofitError
from retrofit.recipes.schema import load_recipe, recipe_names

RESULTS = ROOT / "results" / "drafts.json"
WORK = ROOT / "out" / "drafts"


def asked_for(recipes: tuple[str, ...], own: str) -> tuple[str, ...]:
    """The named recipes, or the own one and every published design."""
    return recipes or (own, *(name for name in recipe_names() if name.startswith(PUBLISHED)))


def sections_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["sections"] if path.is_file() else {}


def finished(path: Path, spec: str, seed: int, setting: Setting) -> dict[str, Any] | None:
    """The figures of a run in the results file, if it was made with this setting."""
    found = sections_of(path).get(title_of(spec, seed))
    return found["figures"] if found and found["figures"]["setting"] == setting.to_dict() else None


def title_of(spec: str, seed: int) -> str:
    return f"{spec}, seed {seed}"


def rates_of(spec: str, setting: Setting, first: dict[str, Any] | None) -> tuple[float, ...]:
    """The learning rates to try; first: what came of the first seed."""
    if spec == setting.own:
        return (1.0,)
    return setting.rates if first is None else (first["rate"],)


def factors(_: Any, __: Any, text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers with commas between them") from None
    if min(found) <= 0:
        raise click.BadParameter("a factor has to be above 0")
    return found


@click.command(help=__doc__)
@click.option("--own", default=OWN, show_default=True, help="Own recipe, keys changed after it: its base is converted.")
@click.option("--recipes", multiple=True, help="One of them, likewise.  [default: the own one and baselines/*]")
@click.option("--steps", type=click.IntRange(1), default=220, show_default=True, help="Of training.")
@click.option(
    "--rows", type=click.IntRange(1), default=256, show_default=True, help="Draft rows per sequence and step."
)
@click.option("--drafts", type=click.IntRange(1), default=4, show_default=True, help="Tokens a block proposes.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many.")
@click.option("--rates", default="1", show_default=True, callback=factors, help="Learning rates to try, as factors.")
@click.option("--prompts", type=click.IntRange(1), default=32, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--certify/--no-certify", default=True, show_default=True, help="Certify each recipe's first seed.")
@click.option("--threads", type=click.IntRange(1), help="Of torch.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=WORK, help="Where artifacts lie.  [default: out/drafts]"
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="[default: results/drafts.json]")
def main(
    recipes: tuple[str, ...], seeds: int, certify: bool, threads: int | None, work: Path, out: Path, **common: Any
) -> None:
    setting = Setting(**common)
    specs = asked_for(recipes, setting.own)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    command = " ".join(
        ["python -m benchmarks.drafts", *(f"'{word}'" if " " in word else word for word in sys.argv[1:])]
    )
    try:
        for spec in specs:
            name, *changes = spec.split()
            load_recipe(name, changes)  # before anything is trained
        for seed in range(seeds):
            for spec in specs:
                if finished(out, spec, seed, setting) is not None:
                    say(f"{title_of(spec, seed)}: in {out.name}")
                    continue
                first = finished(out, spec, 0, setting)
                rates = rates_of(spec, setting, None if seed == 0 else first)
                begin = time.perf_counter()
                figures = run(spec, setting, seed, rates, work, certify and seed == 0)
                write(out, {title_of(spec, seed): section(command, time.perf_counter() - begin, [], figures)})
    except RetrofitError as error:
        say(f"error: {error}" + (f"\n{error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    sys.exit(3 if not summed_up(out, setting, command) else 0)


def summed_up(out: Path, setting: Setting, command: str) -> bool:
    """Write and print what all runs of this setting come to; whether every bar is met."""
    runs = tables.runs_of(sections_of(out))
    equal = setting.to_dict()
    runs = {spec: [one for one in some if one["setting"] == equal] for spec, some in runs.items()}
    runs = {spec: some for spec, some in runs.items() if some}
    found = bars(runs, setting.own)
    seconds = sum(one["seconds"] for some in runs.values() for one in some)
    write(out, {tables.SUMMARY: section(command, seconds, found, {"setting": equal})})
    print(table(tables.forwards(runs)))
    print(table(tables.acceptance(runs)))
    for bar in found:
        print(f"  {bar.what}  {bar.bar}  {bar.figure}{'  MISSED' if bar.met is False else ''}")
    return all(bar.met is not False for bar in found)


if __name__ == "__main__":
    main()
