"""Sections on the time of one step, as the device loop runs it: a recorded graph over requests with some context."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.gpu.bench import Bench, Found, drop_cache, spread
from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.device.loop import DeviceLoop
from retrofit.runtime.engine import Engine
from retrofit.runtime.plan import Cycle, StepPlan, fused, num_rows, two_forward
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.rules.tree import UNKNOWN_CHANCE, DraftTree, grow

AR = StepPlan()


class Steps:
    """A device loop whose requests stand at a given context, with random K/V: no prompt has to run."""

    def __init__(self, bench: Bench, engine: Engine, batch: int, context: int | None = None):
        assert isinstance(engine.backend, FusedGQA)
        self.bench, self.backend = bench, engine.backend
        context = context or bench.sizes.context
        longest = context + bench.sizes.room
        drop_cache(engine)  # steps walk the whole block table, so its width is part of the measurement
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        cache = self.backend.new_cache(batch, longest)
        cache.keys.normal_()
        cache.values.normal_()
        prompts = bench.prompts(batch, context, self.backend.head.vocab)
        self.requests = [
            Request(i, prompt, i, bench.sizes.room, frozenset(), slot=i) for i, prompt in enumerate(prompts)
        ]
        for request in self.requests:
            cache.open(request.slot, longest)
        self.loop = DeviceLoop(self.backend, cache, Processing())
        self.loop.reset(ignore_eos=True)

    @torch.no_grad()
    def time(self, plan: StepPlan, batch: int | None = None) -> list[float]:
        """Seconds of each step of this plan for the first `batch` requests, all its rows in use."""
        requests = self.requests[:batch]
        for request in requests:
            self.loop.start(request)
        for request in self.requests[len(requests) :]:
            self.loop.stop(request.slot)
        lanes = self.loop.serve([request.slot for request in requests])
        return self.bench.seconds(
            lambda: self.loop.step(plan, lanes), before=lambda: self.loop.state.num_drafts.fill_(plan.verify)
        )


def tree_of(bench: Bench) -> DraftTree:
    return grow(UNKNOWN_CHANCE * bench.layout.drafts, bench.sizes.tree)


def speculative_cycles(bench: Bench, engine: Engine) -> dict[str, Cycle]:
    """The plans that each way of speculating takes in turn."""
    k, tree = engine.layout.drafts, tree_of(bench)
    return {
        "two_forward": two_forward(k),
        "fused, all accept lengths": fused(k),
        f"fused, {min(3, k)} accept lengths": fused(k, min(3, k)),
        "fused, last": fused(k, "last"),
        f"fused, tree of {bench.sizes.tree}": fused(tree.nodes, "all", tree),
    }


def ar(bench: Bench, found: Found) -> None:
    """AR at exact off: tokens per second, and how near reading the weights once comes to the copy bandwidth."""
    engine = bench.engine()
    assert isinstance(engine.backend, FusedGQA)
    nbytes = engine.backend.weights.nbytes
    found.figures |= {"weight_bytes": nbytes, "copy_bytes_per_second": bench.copy_rate(), "batches": {}}
    # Small ones first: they carry the bar, and a large cache is the first thing not to fit.
    for batch in bench.sizes.batches:
        if bench.left() < 5:
            found.figures["stopped"] = f"out of time before batch {batch}"
            break
        seconds = Steps(bench, engine, batch).time(AR)
        share = nbytes / bench.copy_rate() / median(seconds)
        found.figures["batches"][str(batch)] = {
            **spread(seconds), "tokens_per_second": batch / median(seconds), "of_copy_bandwidth": share,
        }  # fmt: skip
        if batch == 1:
            found.judge("ar", f"{share:.1%}", share >= 0.8)
    rates = " ".join(f"{entry['tokens_per_second']:.0f}" for entry in found.figures["batches"].values())
    batches = words(list(found.figures["batches"]))
    found.state(f"AR tokens/s, context {bench.sizes.context}, batch {batches}", rates)


def rows(bench: Bench, found: Found) -> None:
    """Verify steps by row count; more rows than one request would draft come from several."""
    sizes = bench.sizes
    for exact in ("off", "invariant"):
        engine = bench.engine(exact=exact)
        found.figures[exact] = {}
        for count in sizes.row_counts:
            if bench.left() < 5:
                found.figures["stopped"] = f"out of time before {count} rows, {exact}"
                return
            requests = -(-count // sizes.lane_rows)
            each = count // requests
            seconds = Steps(bench, engine, requests).time(StepPlan(each - 1))
            found.figures[exact][str(count)] = {**spread(seconds), "requests": requests}
        times = {int(n): entry["median_ms"] for n, entry in found.figures[exact].items()}
        wide = max(n for n in times if n <= 64)
        ratio = times[wide] / times[1]
        if exact == "off":
            found.judge("rows", f"{ratio:.3f}", ratio <= 1.15)
        else:
            found.state(f"{wide}-row step / 1-row step, {exact}", f"{ratio:.3f}")
        shown = " ".join(f"{ms:.2f}" for ms in times.values())
        found.state(f"ms of a step of {words(times)} rows, context {sizes.context}, {exact}", shown)
        bench.release()


def steps(bench: Bench, found: Found) -> None:
    """Steps of every way of speculating, beside AR."""
    engine = bench.engine()
    for batch in bench.sizes.step_batches:
        timer = Steps(bench, engine, batch)
        plain = median(timer.time(AR))
        figures = found.figures[str(batch)] = {"ar": {"median_ms": round(plain * 1e3, 4)}}
        for name, cycle in speculative_cycles(bench, engine).items():
            if bench.left() < 5:
                found.figures["stopped"] = f"out of time before {name}, batch {batch}"
                return
            parts = [timer.time(plan) for plan in cycle]
            total = sum(median(part) for part in parts)
            counts = [batch * num_rows(plan, engine.layout) for plan in cycle]
            figures[name] = {
                "steps": [spread(part) for part in parts], "rows": counts, "median_ms": round(total * 1e3, 4),
                "to_ar": round(total / plain, 4),
            }  # fmt: skip
            shown = " + ".join(f"{median(part) * 1e3:.2f}" for part in parts)
            note = f"{words(counts)} rows; {total / plain:.2f} of AR's"
            found.state(f"ms of a cycle, batch {batch}: {name}", f"{shown} ({note})")


def adapter(bench: Bench, found: Found) -> None:
    """The same steps with and without LoRA, in turn."""
    plans = {"fused": speculative_cycles(bench, bench.engine())["fused, all accept lengths"][0], "ar": AR}
    timers = {have: Steps(bench, bench.engine(adapter=have), 1) for have in (True, False)}
    overheads = {}
    for name, plan in plans.items():
        times: dict[bool, list[float]] = {True: [], False: []}
        for _turn in range(3):
            for have, timer in timers.items():
                times[have] += timer.time(plan)
        overheads[name] = median(times[True]) / median(times[False]) - 1
        found.figures[name] = {"with": spread(times[True]), "without": spread(times[False])}
    shown = ", ".join(f"{overhead:.1%}" for overhead in overheads.values())
    found.judge("adapter", shown, all(overhead <= 0.05 for overhead in overheads.values()))
    bench.release(keep=lambda key: key[-1])


def exact(bench: Bench, found: Found) -> None:
    """AR at each level of exactness, and the fused step, which has its rows anyway."""
    levels = [("off", None), *(("bucket", rows) for rows in bench.sizes.buckets), ("invariant", None)]
    batches = tuple(dict.fromkeys(min(8, batch) for batch in (1, bench.sizes.batches[-1])))
    plain: dict[int, float] = {}
    for level, bucket in levels:
        engine = bench.engine(exact=level, rows=bucket)
        timer = Steps(bench, engine, batches[-1])
        name = level if bucket is None else f"{level} of {bucket} rows"
        figures = found.figures[name] = {}
        for batch in batches:
            seconds = timer.time(AR, batch)
            plain.setdefault(batch, median(seconds))
            figures[f"ar, batch {batch}"] = {**spread(seconds), "to_off": median(seconds) / plain[batch]}
        plan = speculative_cycles(bench, engine)["fused, all accept lengths"][0]
        if bucket is None or num_rows(plan, engine.layout) <= bucket:
            figures["fused, batch 1"] = spread(timer.time(plan, 1))
        shown = ", ".join(
            f"{figures[f'ar, batch {batch}']['median_ms']:.2f} ({figures[f'ar, batch {batch}']['to_off']:.2f} of off's)"
            for batch in batches
        )
        found.state(f"ms of an AR step, batch {words(batches)}: {name}", shown)
    bench.release(keep=lambda key: key[1] != "bucket" or key[2] == bench.bucket)


def shapes(bench: Bench, found: Found) -> None:
    """AR and fused steps of the other shapes."""
    for shape in ("qwen3-8b", "qwen3-0.6b"):
        engine = bench.engine(shape)
        assert isinstance(engine.backend, FusedGQA)
        timer = Steps(bench, engine, 1)
        plain = timer.time(AR)
        speculative = timer.time(speculative_cycles(bench, engine)["fused, all accept lengths"][0])
        nbytes = engine.backend.weights.nbytes
        share = nbytes / bench.copy_rate() / median(plain)
        found.figures[shape] = {
            "ar": spread(plain), "fused": spread(speculative), "weight_bytes": nbytes, "of_copy_bandwidth": share,
        }  # fmt: skip
        shown = f"{median(plain) * 1e3:.2f}, {median(speculative) * 1e3:.2f}; {share:.0%}"
        found.state(f"{shape} shape: ms of AR and fused, batch 1; AR's share of the copy bandwidth", shown)
        bench.release(keep=lambda key: key[0] == "llama-3.1-8b")


def words(values: Sequence[object] | dict[int, float]) -> str:
    return " ".join(str(value) for value in values)
