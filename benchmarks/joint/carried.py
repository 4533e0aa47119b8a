"""Conversions that go on: what does it save to begin with an adapter?  `python -m benchmarks.joint.carried`

    parts      as many steps at a constant rate in one run, and in two, the second `--from` the artifact of the first
    carried    the embedded base, fine-tuned on other text, the sources of torch.nn: the adapter of that one run,
               carried over and trained for a few steps, against a fresh conversion of the fine-tuned base

All by the base's own recipe, with blocks as in `benchmarks.drafts`, judged on held-out text.  What is there already is
not trained again.  On the CPU, offline.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.common import ROOT, Bar, number, say, section, table, write
from benchmarks.drafts.__main__ import sections_of
from retrofit.artifact import folder as artifact
from retrofit.errors import RetrofitError
from retrofit.hub import load_base
from retrofit.recipes.convert import convert
from retrofit.recipes.schema import Recipe, load_recipe
from retrofit.recipes.text.documents import documents
from retrofit.recipes.text.windows import first_windows
from retrofit.recipes.training.measure import MEASURED
from retrofit.recipes.training.step import expected_tau

RESULTS = ROOT / "results" / "carried.json"
WORK = ROOT / "out" / "carried"
OTHER_TEXT = Path(torch.nn.__file__).parent
TUNING_LR = 1e-3
"""Peak learning rate of the fine-tuning; it falls to nothing."""
LEAST_TAU, MOST_STEPS = 0.95, 0.2
"""Of a fresh conversion, what a carried adapter is to reach, and in which share of its steps."""


def plan_of(steps: int, seed: int, **more: Any) -> Recipe:
    """The embedded base's recipe, shortened; keys of `more` are dotted, with two underscores for the dot."""
    keys = {
        "train.steps": steps,
        "train.warmup": min(10, max(1, steps // 4)),
        "train.anchors": 24,
        "train.seed": seed,
        "train.save_every": 0,
    }
    return load_recipe("tiny", keys | {key.replace("__", "."): value for key, value in more.items()})


def converted(name: str, plan: Recipe, base: Path | None = None, start: Path | None = None) -> Path:
    """The artifact of a plan, trained unless it is there.  Raises what `convert` raises."""
    folder = WORK / name
    if not (folder / artifact.CONFIG).is_file():
        say(f"training {name}")
        if base is not None:
            plan = plan.model_copy(update={"base": plan.base.model_copy(update={"model": str(base)})})
        convert(recipe=plan, out=folder, start_from=start, offline=True, quiet=True)
    return folder


def tau_of(folder: Path) -> float:
    return round(expected_tau(artifact.read_config(folder)["acceptance"]["conditional"]["sampled"]), 4)


def tau_before(folder: Path) -> float:
    """Of what a conversion began with, on its text and base, before its first step."""
    return float(artifact.read_config(folder)["training"]["before"]["tau"])


def fine_tuned(steps: int) -> tuple[Path, dict[str, Any]]:
    """The embedded base after so many steps on the other text, and how far that moved it on its held-out part."""
    folder = WORK / f"base-{steps}"
    plan = plan_of(1, 0, data__source=str(OTHER_TEXT))
    base = load_base("tiny", dtype="float32", offline=True)
    windows = list(first_windows(documents(plan.data, base.tokenizer, part="held_out"), plan.data.max_length, MEASURED))
    before = judged(base.model, [window.tokens for window in windows])
    if not (folder / "config.json").is_file():
        say(f"fine-tuning for {steps} steps on {OTHER_TEXT.name}")
        stream = [token for one in documents(plan.data, base.tokenizer, part="train") for token in one.tokens]
        tune(base.model, torch.tensor(stream), steps, plan.data.max_length, plan.train.batch_size)
        base.model.save_pretrained(folder)
        assert base.tokenizer is not None
        base.tokenizer.save_pretrained(folder)
    after = judged(load_base(str(folder), dtype="float32").model, [window.tokens for window in windows])
    return folder, {"steps": steps, "nats": [round(before, 4), round(after, 4)], "text": "sources of torch.nn"}


def tune(model: PreTrainedModel, stream: Tensor, steps: int, length: int, batch: int) -> None:
    """Train every weight on windows of a stream of tokens, in its order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=TUNING_LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
    rows = stream[: len(stream) // length * length].view(-1, length)
    model.train()
    for step in range(steps):
        tokens = rows[torch.arange(step * batch, (step + 1) * batch) % len(rows)]
        loss = cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def judged(model: PreTrainedModel, texts: list[tuple[int, ...]]) -> float:
    """Nats per token of some texts."""
    total = count = 0.0
    for tokens in texts:
        ids = torch.tensor([tokens])
        total += float(cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
        count += len(tokens) - 1
    return total / count


def carried(seed: int, steps: int, few: int, base: Path) -> dict[str, float]:
    """Tau on the other text: fresh, of the adapter as it was, and of the adapter trained a little further."""
    there: dict[str, Any] = {"data__source": str(OTHER_TEXT)}
    first = one_run(seed, steps)
    on = converted(f"carried-{steps}-{few}-{seed}", plan_of(few, seed, **there), base, first)
    fresh = converted(f"fresh-{steps}-{seed}", plan_of(steps, seed, **there), base)
    short = converted(f"short-{few}-{seed}", plan_of(few, seed, **there), base)
    return {
        "at home": tau_of(first),
        "fresh": tau_of(fresh),
        "fresh, as few steps": tau_of(short),
        "carried, untrained": tau_before(on),
        "carried": tau_of(on),
    }


CONSTANT: dict[str, Any] = {"train__schedule": "constant"}


def one_run(seed: int, steps: int) -> Path:
    return converted(f"whole-{steps}-{seed}", plan_of(steps, seed, **CONSTANT))


def parts(seed: int, steps: int) -> dict[str, float]:
    """Tau after so many steps at a constant rate, in one run and in two."""
    whole = one_run(seed, steps)
    half = converted(f"half-{steps // 2}-{seed}", plan_of(steps // 2, seed, **CONSTANT))
    rest = converted(f"rest-{steps // 2}-{seed}", plan_of(steps - steps // 2, seed, **CONSTANT), start=half)
    return {"one run": tau_of(whole), "half of it": tau_of(half), "two runs": tau_of(rest)}


def mean(seeds: dict[str, dict[str, float]], what: str) -> float:
    return statistics.mean(one[what] for one in seeds.values())


def bars_of_carried(seeds: dict[str, dict[str, float]], share: float) -> list[Bar]:
    ratios = [one["carried"] / one["fresh"] for one in seeds.values()]
    spread = f"{min(ratios):.1%} to {max(ratios):.1%}" if len(ratios) > 1 else "one seed"
    figure = f"{mean(seeds, 'carried') / mean(seeds, 'fresh'):.1%} ({spread})"
    met = min(ratios) >= LEAST_TAU and share <= MOST_STEPS
    what = f"tau of an adapter carried over, in {share:.0%} of a fresh conversion's steps, against that one's"
    return [Bar(what, f">= {LEAST_TAU:.0%} in <= {MOST_STEPS:.0%}", figure, met)]


def bars_of_parts(seeds: dict[str, dict[str, float]]) -> list[Bar]:
    """Noise is how far apart seeds of one run are; of one seed there is none."""
    one = [found["one run"] for found in seeds.values()]
    noise, apart = max(one) - min(one), mean(seeds, "two runs") - mean(seeds, "one run")
    met = None if len(one) < 2 else abs(apart) <= noise
    spread = f"seeds of one run are {noise:.3f} apart" if len(one) > 1 else "one seed"
    figure = f"{mean(seeds, 'two runs'):.3f} and {mean(seeds, 'one run'):.3f}; {spread}"
    return [Bar("tau of two runs, the second --from the first, and of one as long", "within noise", figure, met)]


def shown(sections: dict[str, Any]) -> str:
    parts = []
    for name, one in sections.items():
        seeds = one["figures"]["seeds"]
        heads = list(next(iter(seeds.values())))
        rows = [[name, *heads]] + [[f"seed {seed}", *(number(f[h], 3) for h in heads)] for seed, f in seeds.items()]
        parts.append(table(rows))
    return "\n\n".join(parts)


@click.command(help=__doc__)
@click.option("--steps", type=click.IntRange(2), default=80, show_default=True, help="Of a fresh conversion.")
@click.option("--few", type=click.IntRange(1), default=16, show_default=True, help="Of an adapter carried over.")
@click.option("--tuning", type=click.IntRange(1), default=200, show_default=True, help="Of the base's fine-tuning.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many.")
def main(steps: int, few: int, tuning: int, seeds: int) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    setting = {"steps": steps, "few": few}
    command = f"python -m benchmarks.joint.carried --steps {steps} --few {few} --tuning {tuning} --seeds {seeds}"
    begin = time.perf_counter()
    over: dict[str, dict[str, float]] = {}
    apart: dict[str, dict[str, float]] = {}
    try:
        base, tuned = fine_tuned(tuning)
        for seed in range(seeds):
            over[str(seed)] = carried(seed, steps, few, base)
            figures: dict[str, Any] = {"setting": setting, "tuned": tuned, "seeds": over}
            seconds, bars = time.perf_counter() - begin, bars_of_carried(over, few / steps)
            write(RESULTS, {"carried": section(command, seconds, bars, figures)})
            apart[str(seed)] = parts(seed, steps)
            figures = {"setting": setting, "seeds": apart}
            seconds = time.perf_counter() - begin
            write(RESULTS, {"parts": section(command, seconds, bars_of_parts(apart), figures)})
    except RetrofitError as error:
        say(f"error: {error}" + (f"\n{error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    print(shown(sections_of(RESULTS)))


if __name__ == "__main__":
    main()
