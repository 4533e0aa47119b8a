"""`retrofit.evaluate`: measure a converted model beside its original, section by section, and judge it.

A section that is finished is written at once, and not run again by the same call; what it depends on is what the
section `compared` holds: artifact, prompts, sizes, hardware, versions.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from retrofit import __version__
from retrofit.artifact import folder as artifacts
from retrofit.errors import (
    GateError,
    ResourceError,
    RetrofitError,
    UsageError,
    out_of_memory,
)
from retrofit.eval.subject import Subject, trained_on_stdlib
from retrofit.progress import progress as shown
from retrofit.report import document
from retrofit.report.asked import Asked, check
from retrofit.report.headline import headline
from retrofit.report.html.page import html
from retrofit.report.html.picture import picture
from retrofit.report.markdown import markdown
from retrofit.report.prompts import Prompt, Row, code_prompts, own_rows, read_rows, tokenized
from retrofit.report.sections.acceptance import acceptance
from retrofit.report.sections.against import against
from retrofit.report.sections.compared import compared
from retrofit.report.sections.diffusion import diffusion
from retrofit.report.sections.losslessness import losslessness
from retrofit.report.sections.other_hardware import other_hardware
from retrofit.report.sections.payoff import break_even, cost
from retrofit.report.sections.quality import quality
from retrofit.report.sections.speed import speed
from retrofit.report.sections.speed_of_light import speed_of_light
from retrofit.report.sections.training import training
from retrofit.report.setting import Data, Earlier, Setting, Skipped
from retrofit.report.verdict import verdict
from retrofit.runtime.engine import Engine
from retrofit.sharing.pulling import local_folder

MARKDOWN, HTML, PICTURE = "report.md", "report.html", "report.svg"
Section = Callable[[Setting, Earlier], Data]
SECTIONS: dict[str, Section] = {
    "compared": compared,
    "losslessness": losslessness,
    "quality": quality,
    "acceptance": acceptance,
    "speed": speed,
    "break_even": break_even,
    "cost": cost,
    "against": against,
    "diffusion": diffusion,
    "speed_of_light": speed_of_light,
    "other_hardware": other_hardware,
    "training": training,
}
"""In the order they run and stand."""
DERIVED = ("compared", "break_even", "cost", "training")
"""Made of others or in no time, so always anew: a new price does not measure again."""


@dataclass(frozen=True)
class Report:
    """What was measured.  data: as `report.json` has it."""

    data: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Every gate was met, and there were some."""
        return self.data["verdict"]["ok"] is True

    @property
    def markdown(self) -> str:
        """For people."""
        return markdown(self.data)

    @property
    def html(self) -> str:
        """One page that holds all it shows, with pictures where matplotlib is installed."""
        return html(self.data)

    def section(self, name: str) -> dict[str, Any]:
        """What a finished section found.  Raises KeyError for one that was skipped."""
        found: dict[str, Any] = self.data["sections"][name]["data"]
        return found

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.md, report.html and report.svg: into an artifact's `eval`, or another folder.

        Raises ResourceError where there is no room for them or the folder cannot be written to.
        """
        drawn = {MARKDOWN: self.markdown, HTML: self.html, PICTURE: picture(self.data)}
        return document.write(folder, self.data, drawn)

    def require(self) -> None:
        """Raises GateError saying which gates were not met, and by how much."""
        failed = [gate for gate in self.data["verdict"]["gates"] if not gate["ok"]]
        if failed:
            raise GateError("; ".join(f"{gate['name']}: {gate['says']}" for gate in failed))


def evaluate(
    target: str | Path | Engine,
    suite: str = "quick",
    *,
    modes: Sequence[str] | None = None,
    batch: Sequence[int] | None = None,
    context: Sequence[int] | None = None,
    limit: int | None = None,
    prompts: str | Path | Sequence[Any] | None = None,
    price: float | None = None,
    fail_under: Mapping[str, float] | None = None,
    tasks: Sequence[str] | None = None,
    allow_code: bool = False,
    against: Sequence[str] | None = None,
    out: str | Path | None = None,
    restart: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    exact: str = "auto",
    packed: bool | str = "auto",
    quantization: str = "auto",
    base: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = True,
) -> Report:
    """Measure an artifact, named as for `Engine.load`, or a live engine, beside its original.

    One of the profile `joint` is held beside the model it has of its own; the report says how far that drifted.
    suite: quick, standard or full, how much is run; modes, batch, context (tokens before the output) and limit (most
    prompts) stand over it.  prompts: a JSONL file (`retrofit.report.prompts`), or a list of texts, messages or token
    ids; None: some of our own, or held-out code for a model that was trained on such.  price: US dollars an hour of
    this machine costs.  fail_under: least values of figures by name, gates of the report's verdict.
    tasks: names of `tasks.items.CATEGORIES`, `tasks.packaged.TASKS` and of lm-evaluation-harness; None: the first.
    allow_code: run code that a model wrote for one, under limits.  against: other ways to decode, as in `rivals.py`.
    out: an artifact or another folder, where every finished section is written; of an artifact folder they are not run
    again by the same call, unless restart.  The options of loading are those of `Engine.load`.  clock: seconds.

    A gate that is not met is part of the answer (`Report.require` raises).  Raises UsageError for a wrong option,
    DataError for no prompts, and what loading raises.  What stops it in the middle says where its sections are.
    """
    asked = check(suite, modes, batch, context, limit, price, fail_under, given=prompts is not None,
                  tasks=tasks, allow_code=allow_code, against=against, offline=offline)  # fmt: skip
    rows = None if prompts is None else _rows(prompts)
    loading: dict[str, Any] = {
        "device": device, "dtype": dtype, "backend": backend, "exact": exact, "packed": packed, "base": base,
        "quantization": quantization, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    folder = None if isinstance(target, Engine) else _folder(target, out, offline)
    loaded = target if isinstance(target, Engine) else Engine.load(target, offline=offline, **loading)
    try:
        subject = Subject(loaded, loaded.base.place if loaded.base else None, trust_remote_code, folder)
        setting = _setting(subject, asked, rows, seed, clock, asked.command(folder, prompts, {"seed": seed, **loading}))
        return _run(setting, asked, out, progress, resume=not restart and folder is not None)
    finally:
        if folder is not None:
            loaded.close()


def _folder(target: str | Path, out: str | Path | None, offline: bool) -> Path:
    """Of the artifact.  Raises UsageError for a report that would go into another, of which it says nothing."""
    folder = local_folder(target, offline)
    taken = out is not None and (Path(out) / artifacts.CONFIG).is_file()
    if out is not None and taken and Path(out).resolve() != folder.resolve():
        raise UsageError(f"{out} is another artifact: the report of {folder} does not go there", "name another folder")
    return folder


def _rows(prompts: str | Path | Sequence[Any]) -> list[Row]:
    """Raises UsageError for what is no collection of prompts; and as `read_rows` does."""
    if isinstance(prompts, str | Path):
        return read_rows(prompts)
    if not prompts:
        raise UsageError("prompts is empty", "give texts, messages or token ids, or leave it out")
    return [Row(str(number), "uncategorised", asked, raw=True) for number, asked in enumerate(prompts, 1)]


def _setting(
    subject: Subject, asked: Asked, rows: Sequence[Row] | None, seed: int, clock: Callable[[], float], command: str
) -> Setting:
    """Raises as `_prompts` does."""
    prompts = _prompts(rows, subject, asked)
    return Setting(
        subject, prompts, asked.suite, rows is not None, asked.modes, asked.price, seed, clock,
        command, asked.tasks, asked.allow_code, asked.against, len(rows or prompts) - len(prompts),
    )  # fmt: skip


def _prompts(rows: Sequence[Row] | None, subject: Subject, asked: Asked) -> list[Prompt]:
    """Raises UsageError where there is neither a prompt nor a tokenizer to make some with."""
    count, engine = asked.suite.prompts, subject.run
    if rows is not None:
        return tokenized(rows[:count], engine)
    if engine.tokenizer is None:
        raise UsageError("without a tokenizer there are no prompts of our own", "give token ids as prompts")
    if trained_on_stdlib(subject.artifact, engine):
        try:
            return code_prompts(engine, count)
        except RetrofitError:  # another Python's standard library: other text does as well
            pass
    return tokenized(own_rows()[:count], engine)


def _key(setting: Setting) -> str:
    """Equal for runs whose sections say the same."""
    held = compared(setting, {})
    held["hardware"] = {name: value for name, value in held["hardware"].items() if name != "date"}
    return hashlib.sha256(json.dumps(document.finite(held), sort_keys=True).encode()).hexdigest()


def _finished(out: str | Path, setting: Setting, key: str) -> dict[str, Data]:
    """Sections that an earlier run of the same has left."""
    try:
        before = document.read(out)
    except RetrofitError:  # none, or one that cannot be read and will be replaced
        return {}
    if before["key"] != key:
        return {}
    sections = {n: found for n, found in before["sections"].items() if found["status"] == "done" and n not in DERIVED}
    return {name: found for name, found in sections.items() if found["data"].get("asked", {}) == setting.asked(name)}


def _run(setting: Setting, asked: Asked, out: str | Path | None, progress: bool, resume: bool) -> Report:
    sections: dict[str, Data] = {name: {"status": "pending", "reason": "not run yet"} for name in SECTIONS}
    key, began = _key(setting), datetime.now(UTC).isoformat(timespec="seconds")
    kept = _finished(out, setting, key) if resume and out is not None else {}

    def report() -> Report:
        done = {name: found["data"] for name, found in sections.items() if found["status"] == "done"}
        skipped = {name: found["reason"] for name, found in sections.items() if found["status"] != "done"}
        return Report({
            "format": document.FORMAT,
            "retrofit": __version__,
            "status": "partial" if any(s["status"] == "pending" for s in sections.values()) else "complete",
            "suite": asked.name,
            "date": began,
            "command": setting.command,
            "key": key,
            "sections": dict(sections),
            "skipped": [{"section": n, "reason": reason} for n, reason in skipped.items()],
            "figures": headline(done),
            "verdict": document.finite(verdict(done, asked.fail_under)),
        })  # fmt: skip

    path: Path | None = None
    try:
        with shown("evaluating", "section", len(SECTIONS), quiet=not progress) as bar:
            for name, function in SECTIONS.items():
                bar.about(name)
                earlier = {n: found["data"] for n, found in sections.items() if found["status"] == "done"}
                sections[name] = kept.get(name) or _section(function, setting, earlier)
                path = report().save(out) if out is not None else None
                bar.advance()
    except BaseException as error:
        if path is not None:
            error.add_note(f"{path} holds the sections that were finished; the same command goes on from there")
        raise
    return report()


def _section(function: Section, setting: Setting, earlier: Earlier) -> Data:
    begin = time.perf_counter()
    try:
        data = function(setting, earlier)
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except (ResourceError, MemoryError, torch.OutOfMemoryError) as error:
        known = error if isinstance(error, ResourceError) else out_of_memory(error)
        return {"status": "skipped", "reason": str(known or error)}
    return {"status": "done", "seconds": round(time.perf_counter() - begin, 3), "data": document.finite(data)}
