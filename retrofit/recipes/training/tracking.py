"""Training followed elsewhere: `--track trackio|wandb|tensorboard`, through the trackers of accelerate.

metrics.jsonl is always written and is the truth; a tracker gets the same figures, flat: `loss/total`,
`accept/sampled/1`, `tau`, `rows/draft_per_second`, `probe/tpf`.  A run that goes on from a checkpoint goes on in the
same run of the tracker, from the right step.  TensorBoard's files lie in OUT.track/RUN beside the artifact and are
never removed by retrofit: they are what was asked for, and `tensorboard --logdir .` finds them.
One that fails in the middle is given up, with a word; training is not.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from retrofit.errors import ResourceError
from retrofit.recipes.text.formats import one_line

PROJECT = "retrofit"
# any one of the packages will do
PACKAGES = {"trackio": ("trackio",), "wandb": ("wandb",), "tensorboard": ("tensorboardX", "tensorboard")}
Name = Literal["trackio", "wandb", "tensorboard"]


def check_installed(name: Name | None) -> None:
    """Raises ResourceError where the tracker's package is missing."""
    if name is not None and not any(map(importlib.util.find_spec, PACKAGES[name])):
        package = PACKAGES[name][0]
        raise ResourceError(f"--track {name}: the package `{package}` is not installed", f"pip install {package}")


def new_run() -> str:
    """What tells the runs of one name apart."""
    return secrets.token_hex(4)


def folder_of(out: Path) -> Path:
    """Where the files of trackers that write files lie."""
    return out.with_name(f"{out.name}.track")


class Tracker:
    """One run of a tracker, or of none.  Nothing it does raises, once it is open."""

    def __init__(self, tracker: Any, name: str, warn: Callable[[str], None]):
        self._tracker, self._name, self._warn = tracker, name, warn

    @classmethod
    def open(
        cls,
        name: Name | None,
        out: Path,
        run: str,
        settings: Mapping[str, Any],
        steps_done: int,
        warn: Callable[[str], None],
    ) -> Self:
        """run: as `new_run` made it, kept over interruptions.  steps_done: steps that this run has been told of.

        Raises ResourceError where the tracker does not start: no account, no network, no room.
        """
        if name is None:
            return cls(None, "", warn)
        check_installed(name)
        label = f"{out.name}-{run}"
        try:
            tracker = _made(name, out, label, run, steps_done)
            tracker.start()
            tracker.store_init_configuration({key: _plain(value) for key, value in settings.items()})
        except Exception as error:
            problem = f"--track {name}: cannot be started: {type(error).__name__}: {one_line(error)}"
            raise ResourceError(problem, f"set {name} up, or leave --track out: metrics.jsonl has it all") from error
        return cls(tracker, name, warn)

    def log(self, record: Mapping[str, Any]) -> None:
        """The record of one step."""
        if self._tracker is not None:
            self._try("log", flat(record), step=int(record["step"]))

    def close(self) -> None:
        """No more comes."""
        self._try("finish")
        self._tracker = None

    def _try(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments, **options)
        except Exception as error:
            self._tracker = None
            self._warn(
                f"warning: --track {self._name} failed and is given up, training goes on "
                f"({type(error).__name__}: {one_line(error)})"
            )


def _made(name: Name, out: Path, label: str, run: str, steps_done: int) -> Any:
    from accelerate import PartialState, tracking

    PartialState()  # the trackers' own log wants it; nothing of it is used
    if name == "tensorboard":
        options: dict[str, Any] = {"filename_suffix": f".{steps_done}"}  # else two of one second are one file
        if steps_done:  # what an earlier run logged of steps that are now done once more is not shown
            options["purge_step"] = steps_done + 1
        return tracking.TensorBoardTracker(label, folder_of(out), **options)
    if name == "wandb":
        return tracking.WandBTracker(PROJECT, name=label, id=run, resume="allow")
    return tracking.TrackioTracker(PROJECT, name=label, resume="allow")


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as numbers by name; slots and accepted lengths get numbers, from 1 and from 0."""
    found: dict[str, float] = {}
    for part in ("loss", "rows"):
        found |= {f"{part}/{key}": value for key, value in record[part].items()}
    for kind, slots in record["accept"].items():
        found |= {f"accept/{kind}/{slot}": value for slot, value in enumerate(slots, 1)}
    found |= {key: record[key] for key in ("tau", "lr", "gradient_norm", "seconds", "seconds_clean") if key in record}
    if record["seconds"] > 0:
        found |= {f"rows/{key}_per_second": value / record["seconds"] for key, value in record["rows"].items()}
    for key, value in record.get("probe", {}).items():
        if key == "accepted":
            found |= {f"probe/accepted/{length}": count for length, count in enumerate(value)}
        else:
            found[f"probe/{key}"] = value
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
