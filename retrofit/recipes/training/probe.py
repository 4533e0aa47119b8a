"""The live probe: real decoding of a few held-out prompts while training goes on, and what follows from it.

Prompts, seeds, temperature and strategy are fixed, so that the figures of two steps differ by the weights alone, and
are the same again wherever the same step is reached.  `strategy="auto"` is not used: it plans by measured time.
The figure that decides is TPF: a forward is what decoding pays for, draft forwards too, while tau counts those that
verify only.  It is a sum over sums, as everywhere.
Not here: when to measure (`session.py`), acceptance without decoding (`measure.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from retrofit.adapters.attach import Attached
from retrofit.errors import UsageError
from retrofit.recipes.processes import Processes
from retrofit.recipes.schema import Recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.rewriting import prompt_length
from retrofit.recipes.text.sources import stable_hash
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.engine import Engine
from retrofit.runtime.results import CYCLES

TEMPERATURE = 0.8
"""Where responses are greedy: greedy text of small models loops, and any drafter looks brilliant on it."""
BATCH = 8
"""Requests that run together."""


@dataclass(frozen=True)
class Probe:
    """Prompts that are decoded anew each time it is called, on the weights as they then are."""

    backend: HFBackend
    attached: Attached
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    tokens: int
    temperature: float

    def __call__(self) -> dict[str, Any]:
        """tau, TPF, and how many verify cycles accepted 0, 1, .. drafts."""
        layout = self.attached.layout
        # An engine of its own each time: what it learns of its drafts and of time ends with it.
        engine = Engine(self.backend, layout, self.tokenizer, attached=self.attached)
        strategy: dict[str, Any] = {"strategy": "two_forward"}
        if layout.anchored:
            strategy = {"strategy": "fused", "prepare": "all", "tree": 0}
        results = engine.generate(
            self.prompts, "self_spec", max_new_tokens=self.tokens, temperature=self.temperature,
            seed=self.seeds, batch_size=BATCH, original_settings=False, **strategy,
        )  # fmt: skip
        stats = [result.stats for result in results]
        tokens, forwards = sum(s.tokens for s in stats), sum(s.decode_forwards for s in stats)
        cycles = sum(s.forwards.get(kind, 0) for s in stats for kind in CYCLES)
        accepted = Counter(length for s in stats for length in s.accepted)
        return {
            "tau": round(tokens / cycles, 4) if cycles else 0.0,
            "tpf": round(tokens / forwards, 4) if forwards else 0.0,
            "accepted": [accepted[length] for length in range(layout.drafts + 1)],
            "tokens": tokens,
            "forwards": forwards,
        }


def live_probe(
    plan: Recipe,
    held_out: Sequence[Document],
    backend: HFBackend,
    attached: Attached,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes | None = None,
) -> Callable[[], dict[str, Any]] | None:
    """The probe of a recipe; None where it wants none.  Of several processes the main one decodes and tells the others.

    Raises UsageError where no held-out document has a prompt.
    """
    train = plan.train
    if not train.probe_every:
        return None
    cut = [(document, prompt_length(document, train.seed)) for document in held_out]
    chosen = [(document, length) for document, length in cut if length][: train.probe_prompts]
    if not chosen:
        raise UsageError(
            "train.probe_every: no held-out document has anything before its first response token to decode from",
            "set train.probe_every=0, or give longer documents",
        )
    probe = Probe(
        backend,
        attached,
        tokenizer,
        [document.tokens[:length] for document, length in chosen],
        [stable_hash(f"{train.seed} {document.id}") % (1 << 31) for document, _ in chosen],
        train.probe_tokens,
        plan.data.temperature or TEMPERATURE,
    )
    if processes is None:
        return probe

    def told() -> dict[str, Any]:
        found: dict[str, Any] = processes.exchange("probe", probe() if processes.is_main else None)[0]
        return found

    return told


def figure(record: Mapping[str, Any]) -> float | None:
    """What decides which of two steps is better; None for a step that was not probed."""
    return float(record["probe"]["tpf"]) if "probe" in record else None


def best_step(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The step with the best figure, the first of equals; None where nothing was probed."""
    probed = [(record["step"], found) for record in history if (found := figure(record)) is not None]
    return max(probed, key=lambda one: one[1])[0] if probed else None


def exhausted(history: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether so many probes in a row were no better than the best before them; never for a patience of 0."""
    best = best_step(history)
    since = sum("probe" in record for record in history if best is not None and record["step"] > best)
    return patience > 0 and since >= patience


def line(record: Mapping[str, Any]) -> str:
    """`TPF 1.42 tau 1.60 at step 120`."""
    probe = record["probe"]
    return f"TPF {probe['tpf']:.2f} tau {probe['tau']:.2f} at step {record['step']}"
