"""What a run was asked for, checked before anything is loaded, and the command that asks for it again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrofit.errors import ResourceError, UsageError
from retrofit.recipes.problems import did_you_mean
from retrofit.report.headline import names
from retrofit.report.rivals import Rival, rivals
from retrofit.report.suites import MODES, SUITES, Suite
from retrofit.sharing.pulling import source
from retrofit.tasks import harness, packaged
from retrofit.tasks.items import CATEGORIES, fewest


@dataclass(frozen=True)
class Asked:
    """suite: with everything that stands over it.  given: what was said beside the suite's name, by option."""

    name: str
    suite: Suite
    modes: tuple[str, ...]
    fail_under: Mapping[str, float]
    given: Mapping[str, str]
    price: float | None = None
    tasks: tuple[str, ...] = CATEGORIES
    allow_code: bool = False
    against: tuple[Rival, ...] = ()

    def command(self, folder: Path | None, prompts: Any, loading: Mapping[str, Any]) -> str:
        """The command that does the same; folders by their names alone, FILE for prompts that came from none.

        loading: options by name, as `evaluate` takes them; those that have their default are left out.
        """
        artifact = "ARTIFACT" if folder is None else called(folder)
        name = Path(prompts).name if isinstance(prompts, str | Path) else "FILE"
        file = {} if prompts is None else {"--prompts": name}
        base = None if loading["base"] is None else Path(loading["base"])
        said: dict[str, Any] = {
            **loading,
            "base": base.name if base is not None and base.exists() else loading["base"],
            "packed": {True: "on", False: "off"}.get(loading["packed"], "auto"),
        }
        trusted = ["--trust-remote-code"] if said.pop("trust_remote_code") else []
        more = {f"--{name}": str(value) for name, value in said.items() if value not in ("auto", 0, None)}
        options = [part for option, value in {**self.given, **file, **more}.items() for part in (option, value)]
        options += [*trusted, *(["--allow-code"] if self.allow_code else [])]
        options += [part for rival in self.against for part in ("--against", rival.name)]
        gates = [part for name, bound in self.fail_under.items() for part in ("--fail-under", f"{name}={bound:g}")]
        return shlex.join(["retrofit", "eval", artifact, "--suite", self.name, *options, *gates])


def called(folder: Path) -> str:
    """What a command calls an artifact: one of the Hub by its repository and commit, any other by its folder's name."""
    held = source(folder)
    return folder.resolve().name if held is None else f"{held['repository']}@{held['commit']}"


def check(
    suite: str,
    modes: Sequence[str] | None,
    batch: Sequence[int] | None,
    context: Sequence[int] | None,
    limit: int | None,
    price: float | None,
    fail_under: Mapping[str, float] | None,
    *,
    given: bool,
    tasks: Sequence[str] | None = None,
    allow_code: bool = False,
    against: Sequence[str] | None = None,
    offline: bool = False,
) -> Asked:
    """given: whether the prompts are the user's own, which then stand for the contexts of the suite.

    Raises UsageError for a wrong value, naming it and what it may be.
    """
    if suite not in SUITES:
        raise UsageError(f"suite {suite!r} does not exist{did_you_mean(str(suite), list(SUITES))}", _are(SUITES))
    size, said = SUITES[suite], {}
    if modes is not None:
        if not modes:
            raise UsageError("--modes is empty", _are(MODES))
        wrong = next((mode for mode in modes if mode not in MODES), None)
        if wrong is not None:
            raise UsageError(f"mode {wrong!r} does not exist{did_you_mean(str(wrong), list(MODES))}", _are(MODES))
        said["--modes"] = ",".join(modes)
    if batch is not None:
        size, said["--batch"] = replace(size, batches=_counts("--batch", batch)), ",".join(map(str, batch))
    if context is not None:
        size, said["--context"] = replace(size, contexts=_counts("--context", context)), ",".join(map(str, context))
    elif given:
        size = replace(size, contexts=())
    if limit is not None:
        (limit,) = _counts("--limit", [limit])
        most = limit if given else min(size.prompts, limit)  # of our own there are no more
        size = replace(size, prompts=most, lossless_prompts=min(size.lossless_prompts, limit))
        size = replace(size, quality_items=fewest(size.quality_items, limit))
        said["--limit"] = str(limit)
    if price is not None:
        if not 0 < price < math.inf:
            raise UsageError(f"price is {price}; it must be above 0, in US dollars an hour")
        said["--price"] = f"{price:g}"
    least = dict(fail_under or {})
    for name in least:
        if name not in names(size):
            known = names(size)
            raise UsageError(f"fail-under {name}: no such figure{did_you_mean(name, known)}", _are(known))
    if tasks is not None:
        said["--tasks"] = ",".join(_tasks(tasks))
    return Asked(
        suite, size, tuple(modes or MODES), least, said, price, tuple(tasks or CATEGORIES), allow_code,
        rivals(against or (), offline),
    )  # fmt: skip


def _tasks(names: Sequence[str]) -> Sequence[str]:
    """Raises UsageError for none, and for one that is neither ours nor, where it is installed, the harness's."""
    known = [*CATEGORIES, *packaged.TASKS]
    if not names:
        raise UsageError("--tasks is empty; it must be names of tasks", f"such as {','.join(known)}")
    others = [name for name in names if name not in known]
    if others:
        try:
            harness.check(others)
        except ResourceError as error:
            close = next((meant for name in others if (meant := did_you_mean(name, known))), "")
            raise UsageError(f"not built in: {', '.join(others)}{close}; {error}", error.hint) from error
    return names


def _counts(option: str, values: Sequence[int]) -> tuple[int, ...]:
    if not values or any(type(value) is not int or value < 1 for value in values):
        given = ",".join(map(str, values)) or "empty"
        raise UsageError(f"{option} is {given}; it must be whole numbers from 1", "such as 1,4,16")
    return tuple(values)


def _are(known: Sequence[str] | Mapping[str, Any]) -> str:
    return f"there are {', '.join(known)}"
