"""How often drafts come true where base and training were held in other bits: tau on MT-bench at T = 0.8, in bfloat16.

The adapter that ships was trained on plain weights.  Beside it adapters of one short training each, the same recipe and
steps: on plain weights, on nf4, on int8; each learns from what its own base answers.  Prompts and seeds are equal;
texts are not, as bases differ.  Drafts are a chain.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.common import Bar, number, say
from benchmarks.quantised.bases import NAME
from benchmarks.quantised.commands import ended, retrofit
from benchmarks.smollm2 import ARTIFACT, CHAIN, prompts_of
from retrofit.artifact.folder import CONFIG
from retrofit.eval.acceptance import measure
from retrofit.quantised.methods import NONE
from retrofit.runtime.engine import Engine

SHIPPED, PLAIN = "shipped", "plain"
TEMPERATURE, BATCH = 0.8, 8
SLOTS = ("accept_cond", "tpf", "tau", "tokens", "looping_share")


class Cell(NamedTuple):
    """trained: the adapter, `shipped` or what its base was held in; on: what the base is held in that it runs on."""

    trained: str
    on: str

    @property
    def title(self) -> str:
        return f"{self.trained} on {self.on}"


CELLS = [
    *(Cell(SHIPPED, on) for on in (PLAIN, "nf4", "int8")),
    *(Cell(PLAIN, on) for on in (PLAIN, "nf4", "int8")),
    *(Cell(kind, kind) for kind in ("nf4", "int8")),
]


class Setting(NamedTuple):
    steps: int
    """Of the short trainings."""
    asked: int
    """Prompts that their bases answer."""
    prompts: int
    new_tokens: int
    seeds: int


def trained(kind: str, setting: Setting, work: Path) -> Path:
    """An artifact of a short training, made unless it is there."""
    if kind == SHIPPED:
        return ARTIFACT
    folder = work / f"{kind}-{setting.steps}-{setting.asked}"
    if not (folder / CONFIG).is_file():
        say(f"training on {kind}")
        held = [] if kind == PLAIN else [f"base.quantization={kind}"]
        ran = retrofit(
            *("convert", NAME, "--recipe", NAME, "-o", str(folder), "--dtype", "bfloat16", "--offline"),
            *("train.precision=bfloat16", f"train.steps={setting.steps}", "train.warmup=5", "train.save_every=1000"),
            *("data.source=prompts:everyday", f"data.prompts={setting.asked}", "data.max_new_tokens=96"),
            *("data.held_out=8", *held),
        )
        if ran["exit"]:
            sys.exit(f"training on {kind}: {ended(ran)}\n{ran['err']}")
    return folder


def drafted(cell: Cell, setting: Setting, work: Path) -> dict[str, Any]:
    """What every seed came to."""
    folder = trained(cell.trained, setting, work)
    held = NONE if cell.on == PLAIN else cell.on
    found = []
    with Engine.load(folder, "cpu", "bfloat16", "off", quantization=held, offline=True) as engine:
        prompts = prompts_of(engine, "mt-bench", setting.prompts)
        for seed in range(setting.seeds):
            figures = measure(
                engine, prompts, **CHAIN, temperature=TEMPERATURE, max_new_tokens=setting.new_tokens,
                batch_size=BATCH, seed=seed, ignore_eos=False,
            )  # fmt: skip
            found.append({key: figures[key] for key in SLOTS})
            say(f"  {cell.title}, seed {seed}: tau {figures['tau']}")
    return {"trained": cell.trained, "on": cell.on, **setting._asdict(), "seeds": found}


def tau_of(found: dict[str, Any]) -> float:
    return mean(seed["tau"] for seed in found["seeds"])


def shown(found: dict[str, Any]) -> str:
    taus = [seed["tau"] for seed in found["seeds"]]
    spread = f" ({number(min(taus))} to {number(max(taus))})" if len(taus) > 1 else ""
    return f"{number(tau_of(found), 3)}{spread}"


def bars_of(cells: dict[str, dict[str, Any]]) -> list[Bar]:
    """Stated, beside how each compares with the same adapter on plain weights, or one trained there."""
    bars = []
    for found in cells.values():
        beside = SHIPPED if found["trained"] == SHIPPED else PLAIN
        plain = cells.get(Cell(beside, PLAIN).title)
        ratio = f"; {tau_of(found) / tau_of(plain):.3f} of plain's" if plain and found is not plain else ""
        adapter = "the shipped adapter" if found["trained"] == SHIPPED else f"trained on {found['trained']}"
        bars.append(Bar(f"tau, {adapter}, on {found['on']}", "stated", shown(found) + ratio, None))
    return bars
