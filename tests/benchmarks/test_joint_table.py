"""The table of training the base along, by hand: means over seeds, ratios seed by seed, and the aim."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.joint.tables import HEAD, rows, verdict


def section(best: float, kl: float | None = None) -> dict[str, Any]:
    drift = None if kl is None else {"kl": kl, "agreement": 0.9}
    tpf = {"0": {"chain": 1.5, "best plan": 2.0}, "0.8": {"chain": 1.25, "best plan": best}}
    passes = {"0.5": {"tpf": 1.5, "agreement": 0.75}}
    return {"figures": {"tpf": tpf, "drift": drift, "held_out_tau": 1.5, "diffusion": passes, "seconds": 10.0}}


def test_a_line_is_of_all_seeds_and_a_ratio_of_one() -> None:
    found = {
        "frozen, seed 0": section(2.0),
        "frozen, seed 1": section(1.0),
        "joint, seed 0": section(3.0, 0.25),
        "joint, seed 1": section(1.0, 0.75),
    }
    head, frozen, joint = (dict(zip(HEAD, line, strict=True)) for line in rows(found))
    assert head == dict(zip(HEAD, HEAD, strict=True))
    assert frozen["best plan, T = 0.8"] == "1.50 (1.00 to 2.00)"
    assert (frozen["KL per token"], frozen["same next token"]) == ("0.0000", "100.0%")
    # 3 / 2 and 1 / 1, not 4 / 3
    assert joint["of frozen's, T = 0.8"] == "1.250 (1.000 to 1.500)"
    assert joint["KL per token"] == "0.5000 (0.2500 to 0.7500)"
    assert (joint["seeds"], joint["chain, greedy"], joint["same next token"]) == ("2", "1.50", "90.0%")
    assert joint["`diffusion`: TPF at agreement"] == "1.50 at 75.0%"


def test_an_arm_is_held_against_frozen_of_its_own_base() -> None:
    found = {
        "frozen, seed 0": section(1.0),
        "other: frozen, seed 0": section(2.0),
        "other: joint, seed 0": section(3.0, 0.0),
        "third: joint, seed 0": section(3.0, 0.0),
    }
    ratios = [line[HEAD.index("of frozen's, T = 0.8")] for line in rows(found)[1:]]
    assert ratios == ["1.000", "1.000", "1.500", "-"]


@pytest.mark.parametrize(
    ("best", "kl", "said"),
    [(2.1, 0.05, "met by joint."), (2.09, 0.05, "missed by all."), (2.1, 0.051, "missed by all.")],
)
def test_the_aim_is_of_both(best: float, kl: float, said: str) -> None:
    assert verdict({"frozen, seed 0": section(2.0), "joint, seed 0": section(best, kl)}).endswith(said)


def test_a_frozen_base_reaches_no_aim() -> None:
    found = {"frozen, seed 0": section(2.0), "frozen, twice the steps, seed 0": section(4.0)}
    assert verdict(found).endswith("missed by all.")
