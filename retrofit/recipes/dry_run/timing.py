"""How long a conversion's steps take on this machine: two of them, on full windows, thrown away again.

Not here: whether they fit into memory, and what follows from the time (`report.py`, `budget/`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from retrofit.recipes.dry_run.estimate import windows_of
from retrofit.recipes.schema import Recipe
from retrofit.recipes.training.joint.trainer import trainer_for
from retrofit.recipes.training.measure import MEASURED, held_out_acceptance
from retrofit.recipes.training.prepare import attached_to, open_base

PROBE_SECONDS = 20.0
"""A probe step that would take longer is run on one window of the batch."""
PROBE_STEPS = 2


@dataclass(frozen=True)
class Took:
    """Seconds, but for `windows`, the sequences that a measured forward had, and the rate of draft rows.

    opening: of loading the base and attaching the adapter.  step: of an optimizer step.  measuring: of held-out
    acceptance at the end.
    """

    opening: float
    step: float
    measuring: float
    draft_rows_per_second: float
    windows: int


def timed(plan: Recipe, device: str, offline: bool, trust_remote_code: bool, *, most: int | None = None) -> Took:
    """Run a few steps of a recipe and tell what they took.  most: sequences a forward; None: the recipe's batch.

    Raises what `open_base` and `attached_to` raise, and PyTorch's errors where memory is short.
    """
    begin = _now(device)
    base = open_base(None, plan, device, offline, trust_remote_code, need_tokenizer=False)
    attached, backend = attached_to(base, plan)
    opening = _now(device) - begin
    batch = plan.train.batch_size if most is None else most
    try:
        trainer = trainer_for(attached, backend, plan)
        full = windows_of(plan, backend.head.vocab, 0)[:batch]

        def step(count: int) -> tuple[float, float, int]:
            """Seconds of forwards and backwards, and of the update; draft rows."""
            begin = _now(device)
            result = trainer.gradients([[(document, trainer.steps_done) for document in full[:count]]])
            middle = _now(device)
            trainer.update()
            return middle - begin, _now(device) - middle, result.draft_rows

        first = step(1)  # also warms up, and is not counted
        count = batch if first[0] * batch <= PROBE_SECONDS else 1
        measured = [step(count) for _ in range(PROBE_STEPS)]
        begin = _now(device)
        held_out = min(MEASURED, plan.data.held_out)
        if held_out:
            held_out_acceptance(backend, attached, full[:1], plan.train.anchors, plan.train.seed)
        ending = (_now(device) - begin) * held_out
    finally:
        backend.close()
    passes = sum(one[0] for one in measured) / PROBE_STEPS
    update = sum(one[1] for one in measured) / PROBE_STEPS
    return Took(
        opening=opening,
        step=passes * plan.train.batch_size / count * plan.train.accumulation + update,
        measuring=ending,
        draft_rows_per_second=sum(one[2] for one in measured) / PROBE_STEPS / passes,
        windows=count,
    )


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
