"""What stands in the blocks of the pages, from the sections of results files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.drafts import tables as drafts
from benchmarks.joint import tables as joint
from benchmarks.quantised import tables as quantised

VERDICTS = {True: "met", False: "**missed**", None: ""}


class Results:
    """The sections of all results files, by file and name."""

    def __init__(self, folder: Path):
        self.files = {path.stem: json.loads(path.read_text())["sections"] for path in sorted(folder.glob("*.json"))}

    def figure(self, file: str, section: str, what: str) -> str:
        """The figure of one bar.  Raises ValueError where it was not measured."""
        bars = self.files.get(file, {}).get(section, {}).get("bars", [])
        found = [bar["figure"] for bar in bars if bar["what"].strip() == what]
        if not found:
            raise ValueError(f"results/{file}.json: {section} has no figure {what!r}")
        return str(found[0])

    def figures(self, file: str, section: str) -> Any:
        """What was measured beside the bars.  Raises ValueError where there is no such section."""
        if section not in self.files.get(file, {}):
            raise ValueError(f"results/{file}.json has no section {section}")
        return self.files[file][section]["figures"]


def caption(found: Results) -> str:
    """What the picture shows, in a sentence or two."""
    run = found.figures("run-cpu", "forwards")
    tokens = sum(map(len, run["forwards"][1:]))
    return (
        f"A recorded run of the model that ships inside.  After the forward of the prompt `{run['prompt']}` it emits "
        f"{tokens} tokens in {len(run['forwards']) - 1} forwards; `ar` emits the same tokens in {tokens}.  Green "
        "tokens were drafted by the adapter and agreed to by the base; blue ones are the base's own, one in every "
        "forward."
    )


def quickstart(found: Results) -> str:
    """The quickstart's commands, what they printed, and where."""
    lines = []
    for command in found.figures("run-cpu", "quickstart")["printed"]:
        lines += [f"$ {command['command']}", *shortened(command["lines"])]
    where = source(found.files["run-cpu"]["quickstart"])
    return "\n".join(["```console", *lines, "```", "", f"Recorded by {where}"])


def shortened(lines: list[str], most: int = 10) -> list[str]:
    """Lines without what is in the middle of very many, and without the end of very long ones."""
    lines = [line if len(line) <= 118 else f"{line[:115]}..." for line in lines if line]
    return lines if len(lines) <= most else [*lines[:2], "...", *lines[-4:]]


def figures(found: Results) -> str:
    """The few figures that say when it pays."""
    bars = "bars-cpu"
    tpf = found.figures(bars, "tpf")["T = 0.8"]["fused"]
    sweep = found.figures("architectures", "sweep")["counts"]
    exact = [found.figure("exact-cpu", name, f"{name[7:]}, bfloat16: self_spec = own ar")
             for name in found.files["exact-cpu"]]  # fmt: skip
    equal = [figure for bar in found.files[bars]["greedy"]["bars"] for figure in bar["figure"].split()]
    wrong = [figure for figure in equal if len(set(figure.split("/"))) > 1]
    rows = [
        ["outputs equal to transformers' `generate`, greedy, fp32: each strategy and batch size on 64 prompts",
         f"{len(equal) - len(wrong)} of {len(equal)} runs, in all prompts"],
        ["outputs equal to own `ar` in bf16 at the level that `auto` finds, four random families",
         ", ".join(sorted({figure.split(";")[0] for figure in exact}))],
        ["decoders of transformers that decode exactly, are refused by name, are wrong",
         f"{sweep['identical']}, {sweep['refused']}, {sweep['wrong']}"],
        ["tokens per forward, T = 0.8 and T = 1",
         f"{found.figure(bars, 'tpf', 'TPF, fused, T = 0.8')}, {found.figure(bars, 'tpf', 'TPF, fused, T = 1')}"],
        ["rows computed per token for that, T = 0.8 (`ar`: 1)", f"{tpf['rows_per_token']:.0f}"],
        *([f"seconds per token of `auto` against `ar`, {how}, batch 1 and 8",
           " and ".join(found.figure(bars, "speed", f"seconds per token, auto / ar, {how}, batch {n}") for n in (1, 8))]
          for how in ("T = 0.8", "greedy")),
        ["conversion", found.figure(bars, "conversion", "conversion of the embedded base")],
        *of_real_model(found),
        ["anything on a GPU", on_gpu(found)],
    ]  # fmt: skip
    return "\n".join(["| | measured |", "| --- | --- |", *(f"| {what} | {figure} |" for what, figure in rows)])


REAL = "smollm2"
KIND = "bfloat16"
BUDGET = "hybrid, 96 rows"


def of_real_model(found: Results) -> list[list[str]]:
    """What README says of it: speed at batch 1, and tokens per forward, greedy and at T = 0.8."""
    rows = []
    for against, title in (("own ar", "`ar`"), ("transformers", "transformers' `generate`")):
        bars = [f"{KIND}, batch 1, T = {at}: auto against {against}" for at in ("0", "0.8")]
        rates = " and ".join(found.figure(REAL, f"speed, {KIND}", bar) for bar in bars)
        rows.append([f"SmolLM2-135M, bf16: tokens/s of `auto` against {title}, greedy and T = 0.8, batch 1", rates])
    drafted = found.figures(REAL, f"acceptance, {KIND}")
    tpf = " and ".join(f"{drafted[f'mt-bench, T = {at}'][BUDGET]['tpf']:.2f}" for at in ("0", "0.8"))
    rows.append(["SmolLM2-135M, MT-bench: tokens per forward of `hybrid` within 96 rows, greedy and T = 0.8", tpf])
    return rows


WAYS = {
    "transformers": "transformers' `generate`",
    "transformers_prompt_lookup": "the same with its prompt lookup",
    "ar": "`ar`",
    "prompt_lookup": "`self_spec`, prompt lookup alone",
    "chain": "`self_spec`, a chain of the adapter's drafts alone",
    "hybrid in turn": "`self_spec`, drafts of both, verified in turn",
    "auto": "`self_spec`, `auto`: the default",
}
BENCHMARKS = {"mt-bench": "MT-bench", "humaneval": "HumanEval", "gsm8k": "GSM8K"}


def real_model(found: Results) -> str:
    """How fast a real model decodes, and how many tokens a forward of it emits."""
    there = found.files[REAL]
    named = {kind: f"speed, {kind}" for kind in ("bfloat16", "float32") if f"speed, {kind}" in there}
    timed = {kind: found.figures(REAL, section) for kind, section in named.items()}
    tables = [["tokens/s of one request", *(f"{kind}, {at}" for kind in named for at in ("greedy", "T = 0.8"))]]
    for way, title in WAYS.items():
        rates = [
            timed[kind][f"{kind}, batch 1, T = {at}"]["tokens_per_s"].get(way) for kind in named for at in ("0", "0.8")
        ]
        tables.append([title, *("-" if rate is None else f"{rate:.1f}" for rate in rates)])
    counted = next(f"acceptance, {kind}" for kind in ("float32", "bfloat16") if f"acceptance, {kind}" in there)
    drafted = found.figures(REAL, counted)
    ways = [way for way in drafted["mt-bench, T = 0"] if way != "prompts"]
    forwards = [["tokens per forward, greedy / T = 0.8 / T = 1", *BENCHMARKS.values()]]
    for way in ways:
        tpf = [[drafted[f"{name}, T = {at}"][way]["tpf"] for at in ("0", "0.8", "1")] for name in BENCHMARKS]
        forwards.append([way.replace("_", " "), *(" / ".join(f"{value:.2f}" for value in some) for some in tpf)])
    timing, counting = (source(there[section]) for section in (next(iter(named.values())), counted))
    parts = [markdown(tables), f"Measured by {timing}", markdown(forwards), f"Measured by {counting}"]
    return "\n\n".join([*parts, *by_context(there)])


def by_context(there: Mapping[str, Any]) -> list[str]:
    """Tokens per forward behind short and long texts, where that was measured."""
    name = next((name for name in there if name.startswith("contexts, ")), None)
    if name is None:
        return []
    found: dict[str, list[str]] = {}
    for figures in there[name]["figures"].values():
        for way, one in figures.items():
            if way != "prompts":
                found.setdefault(way, []).append(f"{one['tpf']:.2f}")
    contexts = list(dict.fromkeys(title.split(" tokens")[0] for title in there[name]["figures"]))
    rows = [["tokens per forward by tokens of context, T = 0.8 / greedy", *contexts]]
    rows += [
        [way.replace("_", " "), *(" / ".join(cells[at : at + 2]) for at in range(0, len(cells), 2))]
        for way, cells in found.items()
    ]
    return [markdown(rows), f"Measured by {source(there[name])}"]


SERVED = "vllm-cpu"


def served(found: Results) -> str:
    """vLLM with drafts and without, by base and type."""
    sections = found.files[SERVED]
    rows = [["", *(name.removeprefix("vLLM, ") for name in sections)]]
    rows.append(["requests answered with the same tokens", *map(same_answers, sections.values())])
    drafts = [bar for section in sections.values() for bar in section["bars"] if bar["what"].startswith("drafts")]
    cells = [f"{bar['figure']}: {VERDICTS[bar['met']] or 'not compared'}" for bar in drafts]
    rows.append(["drafts accepted by slot, vLLM, `two_forward` here", *cells])
    for batch in ("1", "8"):
        speeds = [section["figures"]["speed"][batch] for section in sections.values()]
        cells = [f"{speed['processor']:.2f} / {speed['clock']:.2f}" for speed in speeds]
        rows.append(
            [f"tokens by second, with drafts / without: by the processor's time / the clock's, batch {batch}", *cells]
        )
    return "\n\n".join(
        [markdown(rows), *(f"{name.removeprefix('vLLM, ')}: {source(section)}" for name, section in sections.items())]
    )


def same_answers(section: Mapping[str, Any]) -> str:
    """Over all sets of requests that have a bar: in half precision those with each row's products alone."""
    counts = [bar["figure"].split(" of ") for bar in section["bars"] if bar["bar"] == "identical, all"]
    return f"{sum(int(equal) for equal, _ in counts)} of {sum(int(total) for _, total in counts)}"


DRAFTS = "drafts"
DRAFTS_OF = {DRAFTS: "embedded base", "drafts-smollm2": "SmolLM2-135M in bf16, one seed"}


def against_designs(found: Results) -> str:
    """Published designs and the own recipe on equal terms, base by base."""
    of = [f"**{base}**\n\n{_designs(found.files[file])}" for file, base in DRAFTS_OF.items() if file in found.files]
    return "\n\n".join(["Cells are greedy / T = 0.8 / T = 1; mean (least to most) over seeds.", *of])


def _designs(sections: Mapping[str, Any]) -> str:
    """Tokens per forward, and acceptance slot by slot."""
    runs, whole = drafts.runs_of(sections), sections[drafts.SUMMARY]
    equal = whole["figures"]["setting"]
    same = f"{equal['steps']} steps, {equal['rows']} draft rows a sequence, {equal['drafts']} drafts a block"
    said = f"{same}, {equal['prompts']} prompts, {equal['new_tokens']} new tokens; measured by {source(whole)}"
    return "\n\n".join([markdown(drafts.forwards(runs)), markdown(drafts.acceptance(runs)), said])


FEW_BITS = "quantised"


def few_bits(found: Results) -> str:
    """A line for each way of holding a real model's weights, and where that was measured."""
    sections = found.files[FEW_BITS]
    whence = [f"{title.partition(', ')[2]}: {source(one)}" for title, one in sections.items()]
    return "\n\n".join([markdown(quantised.rows(sections)), *whence])


ALONG = "joint"


def trained_along(found: Results) -> str:
    """The profile `joint` beside `frozen`: what it gains in drafts, and what it costs in likeness and time."""
    sections = found.files[ALONG]
    by_command = {one["command"]: source(one) for one in sections.values()}
    said = ["Mean (least to most) over seeds.", markdown(joint.rows(sections)), joint.verdict(sections)]
    return "\n\n".join([*said, *by_command.values()])


def markdown(rows: list[list[str]]) -> str:
    """A table, its first row the heading."""
    head, *body = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([head, f"| --- |{' ---: |' * (len(rows[0]) - 1)}", *body])


def on_gpu(found: Results) -> str:
    measured = [file for file in found.files if file.startswith("gpu-")]
    return f"see {', '.join(measured)} in the numbers" if measured else "not measured"


def source(section: dict[str, Any]) -> str:
    """Command, machine, versions, commit and date, on one line."""
    machine = section["hardware"]
    commit = machine["commit"] or "not committed"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    where += f", driver {machine['driver']}" if machine.get("driver") else ""
    return f"`{section['command']}` on {where}; {versions}; commit {commit}, {machine['date']}."
