"""A trunk whose steps of few rows run without its modules, once they have been written down and found equal.

A step of a small model is some thousand operations of a few microseconds; modules, their look-ups and their arguments
cost as much again.  So after some steps of one kind, the calls that its modules make are written down; the function
made of them has to give the same bits twice, at different numbers, before it runs alone.  Nothing stands before the
first token.

    kind       how many rows, how many of them are drafts, in which type
    forgotten  when anything in the modules has changed (`watch.py`), or how rows are computed (`HFBackend.hold`)

Not here: what can be written down (`trace.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from retrofit.adapters.rows import RowPlan, is_prefill
from retrofit.runtime.backends.hf.recorded.program import Program, program
from retrofit.runtime.backends.hf.recorded.trace import Recorder, Unrecordable
from retrofit.runtime.backends.hf.recorded.watch import Watch

if TYPE_CHECKING:
    from retrofit.runtime.backends.hf.attention import ForwardContext
    from retrofit.runtime.backends.hf.backend import HFBackend
    from retrofit.runtime.backends.hf.linear.products import Packed

AFTER = 8
"""Steps of a kind that run as modules, before it is written down: that takes as long as three."""
ROWS = 128
"""Steps of more rows spend their time in products."""
PROOFS = 2
"""Steps that run both ways, and have to be equal."""
MOST = 48
"""Kinds that are kept; a function of one takes about 0.3 MB."""
CHANGES = 8
"""After so many changes of the modules nothing is written down any more: they change by themselves."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Modules = Callable[..., Tensor]


@dataclass
class _Kind:
    """Steps of one kind."""

    steps: int = 0
    run: Program | None = None
    proofs: int = 0


class Recorded:
    """Runs a trunk's steps; each thread may."""

    def __init__(self, trunk: nn.Module, packed: Callable[[], Iterable[Packed]] = tuple):
        """packed: the weights that products read now; who changes them lets this `forget`."""
        self.trunk = trunk
        self.packed = packed
        self.on = True
        self.why: str | None = None
        """Why modules run for good."""
        self._kinds: dict[Hashable, _Kind] = {}
        self._watch: Watch | None = None
        self._changes = 0

    @property
    def kinds(self) -> int:
        """How many kinds of steps run without modules."""
        return sum(kind.proofs >= PROOFS for kind in self._kinds.values())

    def forget(self) -> None:
        self._kinds, self._watch = {}, None

    def run(self, kind: Hashable, modules: Modules, given: Sequence[Any]) -> Tensor:
        """What `modules` returns for what is given, embeddings first; kind: all that decides what they call."""
        if not self.on or self.why is not None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return modules(*given)
        known = self._kinds.get(kind)
        if known is None:
            if len(self._kinds) >= MOST:
                self._kinds.pop(next(iter(self._kinds)), None)
            known = self._kinds[kind] = _Kind()
        known.steps += 1
        if known.run is None:
            return modules(*given) if known.steps <= AFTER else self._record(known, modules, given)
        if self._watch is None or self._watch.changed() or _has_any_global_hook():
            self._changed()
            return modules(*given)
        run = known.run
        if known.proofs < PROOFS:
            return self._proven(known, run, modules(*given), given)
        result: Tensor = run(*given)
        return result

    def _changed(self) -> None:
        self.forget()
        self._changes += 1
        if self._changes > CHANGES:
            self.why = "the modules change between steps"

    def _record(self, known: _Kind, modules: Modules, given: Sequence[Any]) -> Tensor:
        watch = self._watch
        if watch is not None and watch.changed():
            self._changed()
            return modules(*given)
        watch = watch or Watch(self.trunk)
        if watch.hooked or _has_any_global_hook():
            known.steps = 0
            return modules(*given)
        recorder = Recorder(given, [*watch.weights, *(tensor for one in self.packed() for tensor in one.tensors)])
        try:
            with recorder:
                result = modules(*given)
            recorder.trace.result = recorder.value_of(result)
            run = program(recorder.trace)
        except Unrecordable as why:
            self.why = str(why)
            return modules(*given)
        known.run, self._watch = run, watch
        return self._proven(known, run, result, given)

    def _proven(self, known: _Kind, run: Program, result: Tensor, given: Sequence[Any]) -> Tensor:
        """The modules' result, held against the function's."""
        if same_bits(run(*given), result):
            known.proofs += 1
        else:
            self.forget()
            self.why = "what was written down gives other bits"
        return result


def through_trunk(backend: HFBackend, plan: RowPlan, context: ForwardContext, arguments: dict[str, Any]) -> Tensor:
    """[1, N, H]: rows through the trunk's modules, or by what these were found to do.  arguments: of the trunk."""

    def modules(*values: Any) -> Tensor:
        *of_trunk, rows = values
        given = dict(zip(arguments, of_trunk, strict=True))
        hidden: Tensor = backend.trunk(use_cache=False, retrofit_rows=rows, **given).last_hidden_state
        return hidden

    given = (*arguments.values(), context)
    # A prompt is as long as it likes, a state that has gone on does not come back, and picks go by values.
    others = backend.recurrent or backend.indexed or any(s.given is not None for s in plan.sequences)
    if backend.device.type != "cpu" or plan.num_rows > ROWS or others or is_prefill(plan.sequences):
        return modules(*given)
    kind = (plan.num_rows, plan.first_draft, arguments["inputs_embeds"].dtype)
    return backend.recorded.run(kind, modules, given)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits, those of NaN too."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    kind = INTEGERS[one.element_size()]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))
