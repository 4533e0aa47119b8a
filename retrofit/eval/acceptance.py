"""Acceptance and losslessness of an engine on given prompts.

Not here: what the figures are (`trace.py`), time (`speed.py`), proofs (`certify.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from retrofit.eval.trace import Trace, figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from retrofit.runtime.engine import Engine, Result

Tokens = Sequence[Sequence[int]]
PAD = 0
"""Fills the left of shorter prompts in a reference batch; masked, so any id does."""


class Difference(NamedTuple):
    """Where an output first leaves the one it should equal.  A token is None where that output has ended."""

    prompt: int
    at: int
    expected: int | None
    found: int | None


class Comparison(NamedTuple):
    """How many outputs of how many are identical, token for token, and where the others first differ."""

    equal: int
    total: int
    differences: list[Difference]

    @property
    def all_equal(self) -> bool:
        return self.equal == self.total > 0


def measure(
    engine: Engine,
    prompts: Tokens,
    *,
    mode: str = "self_spec",
    strategy: str = "fused",
    prepare: str | int | None = None,
    tree: int | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    ignore_eos: bool = True,
) -> dict[str, Any]:
    """Generate for the prompts and sum up what it cost: `summary` of the results, widest forward included.

    Raises UsageError as `Engine.generate` does.
    """

    def generate(some: Tokens, tokens: int) -> list[Result]:
        return engine.generate(
            some, mode, strategy=strategy if mode == "self_spec" else None, prepare=prepare, tree=tree,
            temperature=temperature, max_new_tokens=tokens, batch_size=batch_size, seed=seed, ignore_eos=ignore_eos,
            original_settings=False,
        )  # fmt: skip

    if mode == "self_spec" and strategy == "auto":
        generate(prompts[:batch_size], 1)  # the trials of `auto` are no part of any request
    return summary(generate(prompts, max_new_tokens))


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """`figures` of finished requests, and the share of outputs that loop, as a JSON-able dict."""
    looping = looping_share([result.tokens for result in results])
    return {**figures(Trace.of(results)), "looping_share": looping}


def looping_share(token_lists: Tokens, n: int = 8, times: int = 3, within: int = 96) -> float:
    """Share of outputs in which some n-gram occurs `times` times inside a stretch of `within` tokens.

    Occurrences may overlap.  On looping text every drafter looks brilliant, n-gram lookup above all.
    """
    return round(sum(loops(t, n, times, within) for t in token_lists) / max(1, len(token_lists)), 4)


def loops(tokens: Sequence[int], n: int, times: int, within: int) -> bool:
    starts: dict[tuple[int, ...], list[int]] = {}
    for start in range(len(tokens) - n + 1):
        earlier = starts.setdefault(tuple(tokens[start : start + n]), [])
        earlier.append(start)
        if len(earlier) >= times and start + n - earlier[-times] <= within:
            return True
    return False


def compare(found: Tokens, expected: Tokens) -> Comparison:
    """Hold outputs against those they should equal, in the order of the prompts."""
    differences = []
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        if list(got) == list(want):
            continue
        pairs = enumerate(zip_longest(want, got))  # no token is None
        differences += [next(Difference(i, at, w, g) for at, (w, g) in pairs if w != g)]
    return Comparison(len(expected) - len(differences), len(expected), differences)


def lossless(
    engine: Engine,
    reference: PreTrainedModel | Tokens,
    prompts: Tokens,
    *,
    strategy: str = "fused",
    prepare: str | int | None = None,
    tree: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    ignore_eos: bool = True,
) -> Comparison:
    """Greedy `self_spec` against transformers' greedy `generate`, one prompt at a time.

    reference: the original model, or what `reference_tokens` returned for it, to be reused over strategies.
    """
    eos = () if ignore_eos else sorted(engine.backend.eos)
    expected = (
        reference
        if isinstance(reference, Sequence)
        else reference_tokens(reference, prompts, max_new_tokens=max_new_tokens, eos=eos)
    )
    results = engine.generate(
        prompts, "self_spec", strategy=strategy, prepare=prepare, tree=tree, max_new_tokens=max_new_tokens,
        batch_size=batch_size, ignore_eos=ignore_eos, original_settings=False,
    )  # fmt: skip
    return compare([r.tokens for r in results], expected)


def same_as_ar(
    engine: Engine,
    prompts: Tokens,
    *,
    temperature: float,
    seed: int = 0,
    strategy: str = "fused",
    prepare: str | int | None = None,
    tree: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    ignore_eos: bool = True,
    expected: Tokens | None = None,
) -> Comparison:
    """`self_spec` against `ar` one request at a time, at equal seed.

    expected: `ar`'s tokens where they are known already.
    """
    if expected is None:
        ar = engine.generate(
            prompts, "ar", max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            batch_size=1, ignore_eos=ignore_eos, original_settings=False,
        )  # fmt: skip
        expected = [r.tokens for r in ar]
    results = engine.generate(
        prompts, "self_spec", strategy=strategy, prepare=prepare, tree=tree, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, batch_size=batch_size, ignore_eos=ignore_eos, original_settings=False,
    )  # fmt: skip
    return compare([r.tokens for r in results], expected)


def reference_tokens(
    model: PreTrainedModel,
    prompts: Tokens,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 1,
    eos: Sequence[int] = (),
    lookup: int | None = None,
    assistant: PreTrainedModel | None = None,
    notify: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """What transformers' `generate` emits after each prompt, EOS included, processors and all else neutral.

    lookup: most drafts of transformers' own prompt lookup, which takes one prompt at a time; None: it is off.
    assistant: a smaller model that drafts, of the same vocabulary; one prompt at a time too.
    notify: told after each step how many new tokens each prompt of the batch has.

    Prompts of unequal length are padded on the left within a batch.  At a temperature it draws from torch's
    global generator.  A given GenerationConfig still inherits what it leaves at None from the model's own,
    EOS too, so the model's own is set aside meanwhile; and without an attention mask the pad id would be
    masked wherever a prompt holds it.
    """
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    config = GenerationConfig(
        do_sample=temperature > 0, num_beams=1, repetition_penalty=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=list(eos) or None, pad_token_id=PAD,
        prompt_lookup_num_tokens=lookup, **drawn,
    )  # fmt: skip
    outputs: list[list[int]] = []
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        for first in range(0, len(prompts), batch_size):
            batch = [list(p) for p in prompts[first : first + batch_size]]
            width = max(map(len, batch))
            ids = torch.tensor([[PAD] * (width - len(p)) + p for p in batch], device=model.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
            watched = StoppingCriteriaList([_Told(width, notify)] if notify is not None else [])
            out = model.generate(
                ids, attention_mask=mask, generation_config=config, stopping_criteria=watched, assistant_model=assistant
            )
            outputs += [_until_eos(row, eos) for row in out[:, width:].tolist()]
    finally:
        model.generation_config = own
    return outputs


class _Told(StoppingCriteria):
    """Stops nothing: what transformers asks after every step."""

    def __init__(self, width: int, notify: Callable[[int], None]):
        self.width, self.notify = width, notify

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        self.notify(input_ids.shape[1] - self.width)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _until_eos(tokens: list[int], eos: Sequence[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]
