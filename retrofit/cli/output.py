"""Data goes to stdout, talk to stderr: what the commands print with.

Not here: how an error is printed (`errors.py`), how far a piece of work is.  This file imports nothing heavy.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from retrofit.progress import silent

if TYPE_CHECKING:
    from retrofit.runtime.engine import Engine, Result

VERBOSE = "retrofit.verbose"
QUIET = "retrofit.quiet"


def is_quiet() -> bool:
    """Whether the running command was given -q."""
    return bool(click.get_current_context().meta.get(QUIET))


def be_quiet() -> None:
    """As if the running command had been given -q."""
    context = click.get_current_context()
    context.meta[QUIET] = True
    context.with_resource(silent())


def say(message: str) -> None:
    """Talk: one line on stderr, unless -q."""
    if not is_quiet():
        click.echo(message, err=True)


def emit_json(content: Any, indent: int | None = None) -> None:
    """Data: one JSON document on stdout; without `indent` on one line."""
    click.echo(json.dumps(content, indent=indent))


def quieten_hub() -> None:
    """Keep the bars of the Hub's library off stderr, and its warnings of each try too unless -v."""
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    if not click.get_current_context().meta.get(VERBOSE):
        logging.set_verbosity_error()


def quieten_libraries() -> None:
    """Keep warnings of transformers, the Hub's library and Python off stderr, unless -v.  Imports transformers."""
    quieten_hub()
    if click.get_current_context().meta.get(VERBOSE):
        return
    import logging as standard
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # what they lack elsewhere, said at import
        standard.getLogger(name).setLevel(standard.ERROR)


def decodes_as(engine: Engine) -> str:
    """`hf in bfloat16, packed, exact=invariant`: which backend decodes, how, and the level of exactness it keeps."""
    backend = engine.backend
    packed = ", packed" if getattr(backend, "packed", False) else ""
    return f"{backend.name} in {str(backend.dtype).removeprefix('torch.')}{packed}, exact={backend.exact}"


class Totals:
    """Statistics over several requests: sums over sums, never means of ratios."""

    def __init__(self) -> None:
        self.requests = self.tokens = self.decoded = self.reused = 0
        self.forwards: Counter[str] = Counter()
        self.seconds = 0.0
        """Of the whole run where requests run side by side; the caller's to set."""

    def add(self, result: Result) -> None:
        """Count one finished request, all but its seconds."""
        self.requests += 1
        self.tokens += len(result.tokens)
        self.decoded += result.stats.tokens
        self.reused += result.stats.reused
        self.forwards.update(result.stats.forwards)

    def line(self) -> str:
        """`64 tokens in 1.20 s (53.3 tokens/s), TPF 1.71, tau 2.05`; what was not measured is left out."""
        from retrofit.runtime.results import CYCLES

        rate = f" ({self.tokens / self.seconds:.1f} tokens/s)" if self.seconds > 0 else ""
        parts = [f"{self.tokens} tokens in {self.seconds:.2f} s{rate}"]
        if forwards := self.forwards.total() - self.forwards["prefill"]:
            parts.append(f"TPF {self.decoded / forwards:.2f}")
        if cycles := sum(self.forwards[kind] for kind in CYCLES):
            parts.append(f"tau {self.decoded / cycles:.2f}")
        if self.reused:
            parts.append(f"{self.reused} prompt tokens reused")
        return ", ".join(parts)


def result_json(result: Result) -> dict[str, Any]:
    """One finished request as plain data."""
    found = {
        "index": result.index,
        "sample": result.sample,
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "stats": result.stats.to_dict(),
    }
    return found if result.logprobs is None else {**found, "logprobs": result.logprobs}
