"""The few figures of a report that go by a name, for `--fail-under` and for whoever compares reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrofit.report.suites import MODES, Suite
from retrofit.tasks.against import ALL

Sections = Mapping[str, Mapping[str, Any]]
"""What the finished sections found, by name."""
QUALITY = "quality_delta_points"
ACCEPTANCE = ("tau", "tau_macro", "tpf", "rows_per_token")


def names(suite: Suite) -> list[str]:
    """Every name that a run of this suite may give a figure to."""
    by_batch = [
        f"{name}_batch_{batch}"
        for batch in suite.batches
        for name in ("speedup", "speedup_over_transformers", "tokens_per_s_user", "tokens_per_s_total")
    ]
    quality = [f"{QUALITY}_{mode}" for mode in MODES]
    return ["equal_texts_share", *quality, *ACCEPTANCE, "acceptance_length", "acceptance_rate_percent", *by_batch]


def headline(sections: Sections) -> dict[str, float]:
    """Figures by name; a name whose section found nothing is left out.

    equal_texts_share: of greedy and sampled texts, those that are `ar`'s.  quality_delta_points: of a hundred items,
    how many more a mode has right than the original.  Acceptance: at the first temperature.
    speedup: seconds per token of `ar`, or of transformers' `generate`, over those of `auto`; like the rates it is of
    the first context and temperature.
    """
    found: dict[str, float | None] = {}
    if "losslessness" in sections:
        parts = [sections["losslessness"][name] for name in ("greedy", "sampled")]
        texts = sum(part["texts"] for part in parts)
        found["equal_texts_share"] = sum(part["equal_texts"] for part in parts) / texts if texts else None
    for mode, model in overall(sections).items():
        found[f"{QUALITY}_{mode}"] = 100 * model["delta"]
    if "acceptance" in sections:
        drafter = sections["acceptance"]["by_temperature"][0]["drafter"]
        found |= {name: drafter[name] for name in ACCEPTANCE}
        found["acceptance_length"] = drafter["bench_serve"].get("spec_decode_acceptance_length")
        found["acceptance_rate_percent"] = drafter["bench_serve"].get("spec_decode_acceptance_rate")
    for cell in first_cells(sections):
        if "auto" in cell["ways"]:
            batch, auto = cell["batch_size"], cell["ways"]["auto"]
            found[f"speedup_batch_{batch}"] = 1 / cell["ratio_to_ar"]["auto"]
            found[f"speedup_over_transformers_batch_{batch}"] = 1 / cell["ratio_to_transformers"]["auto"]
            found[f"tokens_per_s_user_batch_{batch}"] = auto["tokens_per_s_user"]
            found[f"tokens_per_s_total_batch_{batch}"] = auto["tokens_per_s_total"]
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def overall(sections: Sections) -> Mapping[str, Any]:
    """Mode -> its statistics over all items of quality that are right or wrong; empty where there are none."""
    tasks = sections["quality"]["tasks"] if "quality" in sections else []
    return next((task["modes"] for task in tasks if task["task"] == ALL), {})


def first_cells(sections: Sections) -> list[Mapping[str, Any]]:
    """Cells of speed of the first context and temperature, one for each batch size."""
    cells = sections["speed"]["cells"] if "speed" in sections else []
    keys = ("context_tokens", "temperature")
    return [cell for cell in cells if all(cell[key] == cells[0][key] for key in keys)]


def swept(diffusion: Mapping[str, Any]) -> list[tuple[str | float, str, Mapping[str, Any]]]:
    """(threshold or name, colour, point) of all that was measured of diffusion mode: `ar` first, its default last."""
    points = [(p["threshold"], "diffusion", p) if p["threshold"] is not None else ("ar", "ar", p)
              for p in diffusion["points"]]  # fmt: skip
    default = diffusion.get("default")  # reports of before have none
    return [*points, *([] if default is None else [("default", "faint", default)])]
