"""What it would do elsewhere: projected from steps measured here, and checked against a second setting measured here.

Without such a check nothing is projected.  The second setting is one thread, where steps have several; else another
type of weights, for which the artifact is loaded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from retrofit.errors import RetrofitError
from retrofit.eval.bounds.projection import DEVICES, ITEMSIZE, Line, Place, errors, fitted, kept, scaled
from retrofit.eval.bounds.roofline import Need, Speeds, measured, needed
from retrofit.eval.bounds.rowcost import Cost, row_costs
from retrofit.report.sections.speed_of_light import PROMPT_TOKENS
from retrofit.report.setting import Data, Earlier, Setting, Skipped
from retrofit.runtime.backends.threads import most_threads
from retrofit.runtime.engine import Engine
from retrofit.weight_files import dtype_name

PLAIN = "ar"
Projection = Callable[[Line, Place, Place, float], float]
PROJECTIONS: dict[str, Projection] = {"kept": kept, "scaled": scaled}
OTHER = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}
"""Type of weights -> the type of the check."""


class Second(NamedTuple):
    """Another setting of this machine, measured."""

    name: str
    need: Need
    speeds: Speeds
    costs: list[Cost]


def other_hardware(setting: Setting, earlier: Earlier) -> Data:
    """One row for each device: steps, tokens a second and speed-up, all projected.  `check`: how far off it is."""
    if "speed_of_light" not in earlier:
        raise Skipped("steps by rows were not measured")
    found = earlier["speed_of_light"]
    costs = [Cost(step["rows"], step["measured_ms"] / 1000) for step in found["steps"] if step["way"] == PLAIN]
    if len(costs) < 2:
        raise Skipped("steps of one number of rows only fit into memory")
    need = Need(found["machine"]["weight_numbers"], found["machine"]["weight_bytes"])
    speeds = Speeds(1e9 * found["machine"]["read_gb_per_s"], 1e9 * found["machine"]["multiply_gflop_per_s"])
    line, here, there = fitted(costs), Place.of(need, speeds), Need(need.numbers, need.numbers * ITEMSIZE)
    second = _second(setting)
    drafter = next((step["rows"] for step in found["steps"] if step["way"] != PLAIN), None)
    gain = None if drafter is None else (drafter, found["speedup"]["tokens_per_forward"])
    return {
        "kind": "projection",
        "dtype": "bfloat16",
        "fixed_ms": round(1000 * line.fixed, 4),
        "fixed_explained_ms": round(1000 * min(here.reading, line.fixed), 4),
        "row_ms": round(1000 * line.row, 6),
        "row_explained_ms": round(1000 * min(here.multiplying, line.row), 6),
        "check": {
            "setting": second.name,
            **{name: _check(project, line, here, second) for name, project in PROJECTIONS.items()},
        },
        "devices": [
            {
                "device": device.name,
                "source": device.source,
                "read_gb_per_s": device.speeds.read / 1e9,
                "multiply_gflop_per_s": device.speeds.multiply / 1e9,
                **{
                    name: _rates(partial(project, line, here, Place.of(there, device.speeds)), gain)
                    for name, project in PROJECTIONS.items()
                },
            }
            for device in DEVICES
        ],
    }


def _check(project: Projection, line: Line, here: Place, second: Second) -> Data:
    """Steps of the second setting as they are projected from the first, and as they were."""
    there = Place.of(second.need, second.speeds)
    expected = [project(line, here, there, cost.rows) for cost in second.costs]
    middle, worst = errors(expected, [cost.seconds for cost in second.costs])
    return {
        "steps": [
            {"rows": cost.rows, "projected_ms": round(1000 * told, 4), "measured_ms": round(1000 * cost.seconds, 4)}
            for told, cost in zip(expected, second.costs, strict=True)
        ],
        "median_error_percent": round(middle, 2),
        "worst_error_percent": round(worst, 2),
    }


def _rates(seconds: Callable[[float], float], gain: tuple[float, float] | None) -> Data:
    """seconds: of a step by its rows.  gain: rows of a drafter's step, and tokens that it emits."""
    rate = None if gain is None else gain[1] / seconds(gain[0])
    return {
        "ar_tokens_per_s": round(1 / seconds(1), 2),
        "drafter_tokens_per_s": None if rate is None else round(rate, 2),
        "speedup": None if rate is None else round(rate * seconds(1), 4),
    }


def _second(setting: Setting) -> Second:
    """Raises Skipped where there is no second setting to be measured."""
    device, dtype = setting.subject.device, setting.subject.dtype
    if device.type == "cpu" and most_threads() > 1:
        with _one_thread():
            return _measured(setting, "one thread", setting.engine, dtype)
    if setting.subject.artifact is None:
        raise Skipped("there is no second setting to check a projection against: one thread, and no artifact to reload")
    other = OTHER[dtype]
    try:
        with _reloaded(setting, dtype_name(other)) as engine:
            return _measured(setting, dtype_name(other), engine, other)
    except RetrofitError as error:
        raise Skipped(f"there is no second setting to check a projection against: {error}") from None


def _measured(setting: Setting, name: str, engine: Engine, dtype: torch.dtype) -> Second:
    prompt = setting.ids(1, setting.suite.tokens)[0][-PROMPT_TOKENS:]
    need, costs = needed(engine), row_costs(engine, prompt, setting.clock, setting.suite.step_rows)
    if not costs:
        raise Skipped("there is no second setting to check a projection against: no step fits into memory")
    return Second(name, need, measured(need, dtype, setting.subject.device), costs)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _reloaded(setting: Setting, dtype: str) -> Iterator[Engine]:
    """The artifact in another type, at no level of exactness in particular."""
    subject = setting.subject
    assert subject.artifact is not None
    base = None if subject.checkpoint is None else str(subject.checkpoint)
    with Engine.load(
        subject.artifact, str(subject.device), dtype, backend=setting.engine.backend.name, base=base, offline=True,
        trust_remote_code=subject.trust_remote_code,
    ) as engine:  # fmt: skip
        yield engine
