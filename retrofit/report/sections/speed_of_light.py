"""How far it is from the best that could be: of these drafts, whatever accepts them, and of this machine.

Not here: what is measured of either (`eval/bounds`).
"""

from __future__ import annotations

from retrofit.eval.bounds.oracle import CANDIDATES, block_ranks, walked
from retrofit.eval.bounds.roofline import Need, Speeds, least_seconds, measured, needed
from retrofit.eval.bounds.rowcost import Cost, Drafting, drafting, row_costs
from retrofit.report.setting import Data, Earlier, Setting, Skipped

PROMPT_TOKENS = 32
"""Of the prompt behind which steps of `ar` are timed."""
DRAFTED = 4
"""Prompts that the drafter's steps are timed over."""


def speed_of_light(setting: Setting, earlier: Earlier) -> Data:
    """Oracle acceptance by temperature and candidates a slot; steps by rows, what they take and what they must."""
    suite, engine = setting.suite, setting.engine
    prompts = setting.ids(suite.lossless_prompts, suite.tokens)
    need = needed(engine)
    speeds = measured(need, setting.subject.dtype, setting.subject.device)
    costs = row_costs(engine, prompts[0][-PROMPT_TOKENS:], setting.clock, suite.step_rows)
    if not costs:
        raise Skipped("not even a step of one row fits into memory")
    steps = [_step("ar", cost, need, speeds) for cost in costs]
    oracle, skipped, drafted = [], [], None
    if "self_spec" in setting.modes:
        drafted = drafting(engine, prompts[:DRAFTED], setting.drafter, suite.temperatures[0], suite.tokens)
        if engine.backend.name == "hf":
            oracle = [_oracle(setting, prompts, one, earlier) for one in dict.fromkeys((suite.temperatures[0], 0.0))]
        else:
            why = f"the {engine.backend.name} backend drafts on the device, where no block is seen"
            skipped.append({"what": "oracle acceptance", "why": why})
    if drafted is not None:
        steps.append(_step(setting.drafter["strategy"], drafted.step, need, speeds))
    return {
        "slots": engine.layout.drafts,
        "oracle": oracle,
        "machine": {
            "read_gb_per_s": round(speeds.read / 1e9, 4),
            "multiply_gflop_per_s": round(speeds.multiply / 1e9, 4),
            "weight_bytes": need.bytes,
            "weight_numbers": need.numbers,
        },
        "steps": steps,
        "speedup": None if drafted is None else _speedup(drafted, costs[0], need, speeds),
        "skipped": skipped,
    }


def _oracle(setting: Setting, prompts: list[list[int]], temperature: float, earlier: Earlier) -> Data:
    """`realised_tau`: what decoding makes of the drafts, which may branch, in the section of acceptance."""
    texts = block_ranks(
        setting.engine, prompts, temperature=temperature, max_new_tokens=setting.suite.tokens, seed=setting.seed
    )
    real = earlier.get("acceptance", {}).get("by_temperature", [])
    return {
        "temperature": temperature,
        "realised_tau": next((one["drafter"]["tau"] for one in real if one["temperature"] == temperature), None),
        "by_candidates": [walked(texts, setting.engine.layout.drafts, count) for count in CANDIDATES],
    }


def _step(way: str, cost: Cost, need: Need, speeds: Speeds) -> Data:
    least = least_seconds(need, speeds, cost.rows)
    return {
        "way": way,
        "rows": round(cost.rows, 2),
        "measured_ms": round(1000 * cost.seconds, 4),
        "least_ms": round(1000 * least, 4),
        "bound_by": "reading" if need.bytes / speeds.read >= need.flop(cost.rows) / speeds.multiply else "multiplying",
        "share_of_best": round(least / cost.seconds, 4),
    }


def _speedup(drafted: Drafting, plain: Cost, need: Need, speeds: Speeds) -> Data:
    """Of the drafter over `ar`, one request at a time: as both steps' least times have it, and as measured."""
    per_forward, step = drafted.tokens_per_forward, drafted.step
    at_best = least_seconds(need, speeds, plain.rows) / least_seconds(need, speeds, step.rows)
    return {
        "tokens_per_forward": per_forward,
        "predicted": round(per_forward * at_best, 4),
        "measured": round(per_forward * plain.seconds / step.seconds, 4),
    }
