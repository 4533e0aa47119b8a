"""What the runtime asks of a backend and of its cache: rows in, logits and hidden states out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from retrofit.adapters.given import Given
from retrofit.adapters.heads import Heads
from retrofit.adapters.rows import SequenceRows
from retrofit.runtime.backends.turns import Turns
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.settings import Settings

if TYPE_CHECKING:
    from retrofit.runtime.auto.policy import AutoPolicy
    from retrofit.runtime.request import Request
    from retrofit.runtime.run import Run

PREFILL_ROWS = 2048
"""Prompt rows per forward, at most."""
EXACT_PREFILL_ROWS = 256
"""The same at `invariant` on the hf backend: no more than are tried out (`prefixes/reuse.py`)."""
BUCKET_ROWS = 128
"""Rows of every decoding forward at `exact="bucket"`: so many a datacentre GPU computes at about the price of one."""


def eos_set(eos: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens that end a request, from what a configuration says: one id, several, or none."""
    return frozenset([eos] if isinstance(eos, int) else eos or [])


@dataclass(frozen=True)
class Output:
    """base_logits [R, V], base_hidden [R, H]: base rows the plan wants logits of; draft_hidden [N, H]: draft rows;
    every_base [B, H]: all base rows; draft_logits [N, V]: draft rows, where one product made them with base_logits."""

    base_logits: Tensor
    base_hidden: Tensor
    draft_hidden: Tensor
    every_base: Tensor
    draft_logits: Tensor | None = None


class Cache(Protocol):
    """Base K/V of the sequences that decode together."""

    slots: int
    capacity: int
    most_rows: int | None
    """Base rows of one sequence that a forward may have; None: any number."""

    def open(self, slot: int, positions: int) -> None:
        """Make room for so many positions of a new sequence in this slot."""

    def close(self, slot: int) -> None:
        """The sequence in this slot is finished."""

    def release(self) -> None:
        """Nobody decodes with this cache any more."""

    def take_out(self, slot: int, first: int, stop: int) -> Any:
        """A copy of what the sequence in this slot has at positions `first` to `stop` - 1."""

    def put_in(self, slot: int, first: int, kept: Sequence[Any], stop: int | None = None) -> None:
        """Give the sequence in this slot, which has been opened, what was taken out of another, bit for bit.

        kept: neighbouring parts; the first of them begins at position `first`.  stop: where the last of them ends,
        which one that was taken out whole does not say itself.
        """

    def store(self, rows: Tensor, slots: Tensor, positions: Tensor) -> None:
        """After a tree forward: keep base row rows[n] as (slots[n], positions[n]) in every layer, forget the others."""


class Stepper(Protocol):
    """Takes the steps of one `generate` call."""

    def start(self, requests: Sequence[Request]) -> None:
        """Requests that have just been prefilled."""

    def step(self, running: list[Request]) -> None:
        """One step of the running requests, or one launched and an earlier one read."""

    def finish(self, request: Request) -> None:
        """A request that is done."""


class VocabProjection(Protocol):
    """From last hidden states to logits, the model's own way."""

    vocab: int

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> [N, V]."""


class Backend(Protocol):
    """Runs row plans through one model."""

    name: str
    exact: str
    """The level of exactness that is kept (`levels.py`)."""
    turns: Turns
    """Who decodes with it now; a closed one refuses."""
    device: torch.device
    dtype: torch.dtype
    heads: Heads | None
    context_length: int
    rope_boundary: int | None
    rope_restarts: bool
    """Whether a text is run again from its start where it crosses the boundary."""
    work_per_row: float
    """About how many floating-point operations a row costs."""
    eos: frozenset[int]
    settings: Settings
    """The base's own generation settings."""
    input_vocab: int
    """Token ids that a prompt may hold: 0 to input_vocab - 1."""
    most_rows: int | None
    """Rows that fit into one decoding forward; None: any number."""
    most_nodes: int | None
    """Draft nodes that a tree may have; None: any number."""
    prefill_alone: bool
    """Whether a prompt runs in forwards of its own, so that its bits do not depend on what else is waiting."""
    prefill_rows: int
    """Prompt rows per forward; bounds activations and attention masks."""
    one_order: bool
    """Whether the rows of prompts and of steps are added up in one order, where bits do not depend on other rows."""

    @property
    def head(self) -> VocabProjection: ...

    def made_by(self) -> Hashable:
        """What K/V depend on beside the text: is another one when the model has become another."""

    def lanes(self, requests: int) -> int:
        """As how many requests a step of so many counts, those that stand idle included."""

    def new_cache(self, slots: int, capacity: int) -> Cache:
        """A cache for so many sequences of up to `capacity` positions, until it is released."""

    def read_prompts(self, inputs: Mapping[str, Any]) -> list[tuple[list[int], Given]]:
        """Token ids of each prompt of a processor's output, and the prompt as the text decoder takes it in.

        Raises UsageError for what the model refuses, or where the backend takes text alone; UnsupportedModelError.
        """

    def row_plan(self, sequences: list[SequenceRows]) -> Any:
        """What `forward` of this backend takes."""

    def forward(self, plan: Any, cache: Any) -> Output:
        """One forward over a cache of this backend.

        Writes the base rows' K/V to the cache; draft rows leave nothing behind.
        """

    def stepper(
        self, run: Run, requests: Sequence[Request], slots: int, on_host: AutoPolicy, on_device: AutoPolicy
    ) -> Stepper:
        """What takes the steps of a call, `slots` requests together.

        on_host, on_device: what `auto` has learned of steps that are planned there.
        """

    def priced_by(self) -> dict[str, Any] | None:
        """What the price of a step planned on the host goes by, as JSON has it; None: it is not to be kept."""

    def choose(self, scores: Tensor, params: Processing, seed: Tensor, index: Tensor) -> Tensor:
        """The token of each row, as `sampling.choose`."""

    def check_usable(self) -> None:
        """Raises UsageError where a call must not begin: closed, or the model has become something else."""

    def close(self) -> None:
        """Give the live model back, if there is one, once the steps that run are done.  A second call does nothing."""
