"""The card of an artifact: README.md, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retrofit import __version__

CARD = """---
library_name: retrofit
{known}tags: [retrofit, speculative-decoding, diffusion]
---
# {model}, retrofitted

Adapter for self-speculative decoding of `{model}`, made with retrofit {version} (`pip install retrofit-lm`).{origin}
{promise}
```python
import retrofit
engine = retrofit.Engine.load("PATH-OF-THIS-FOLDER"{base})
print(engine.generate(["Once upon a time"], mode="self_spec")[0].text)
```

`adapter/` is for retrofit alone, which applies it to draft rows only. To other programs it says that it is an Activated
LoRA whose invocation tokens never occur: plain PEFT leaves the {left} model as it is, and vLLM refuses the folder.

| measured on held-out text, teacher-forced | by slot |
| --- | --- |
| greedy acceptance | {greedy} |
| sampled acceptance, 1 - TV | {sampled} |

{contexts}Draft block {block}; adapter and heads {added:,} parameters, {share:.2%} of the base.
"""
FROZEN = (
    "The base weights are untouched: mode `ar` is the original model, mode `self_spec` gives its output with fewer "
    "forwards.\n"
)
OWN = """The model was trained along; what came out is in `model/`, a plain transformers folder.  Its output is its own:
mode `self_spec` gives the output of mode `ar` with fewer forwards, and neither is that of `{model}`.

| drift from `{model}` on {tokens:,} tokens of held-out text | |
| --- | --- |
| KL divergence from it, nats per token | {kl:.4f} |
| same most likely next token | {agreement:.1%} |
| perplexity, its perplexity | {perplexity:.2f}, {original_perplexity:.2f} |
"""


def card(
    model: str,
    *,
    local: bool,
    on_hub: bool,
    greedy: Sequence[float] | None,
    sampled: Sequence[float] | None,
    by_context: Sequence[Mapping[str, Any]] = (),
    block: int,
    added: int,
    share: float,
    imported: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    drift: Mapping[str, Any] | None = None,
) -> str:
    """The card's text.

    model: the base's published name; local: whether it is a folder, which whoever loads the artifact has to name;
    on_hub: whether the name is a Hub id.  greedy, sampled: acceptance by slot, None where not measured; by_context:
    the same by length of context, as `retrofit.json` has it.  added: parameters of adapter and heads; share: of the
    base's.  imported: as `retrofit.json` has it, where the adapter was not trained here; origin: its `from` or
    `averaged`, where it did not begin untrained; drift: where the base was trained along.
    """
    relation = "adapter" if drift is None else "finetune"
    return CARD.format(
        model=model,
        known=f"base_model: {model}\nbase_model_relation: {relation}\n" if on_hub else "",
        base=', base="PATH-OF-THE-BASE"' if local and drift is None else "",
        left="original" if drift is None else "own",
        promise=FROZEN if drift is None else OWN.format(model=model, **drift),
        version=__version__,
        origin=_began(origin or {}) if imported is None else _origin(imported),
        greedy="not measured" if greedy is None else greedy,
        sampled="not measured" if sampled is None else sampled,
        contexts=f"Tokens per verify cycle that makes, {contexts(by_context)}.\n\n" if by_context else "",
        block=block,
        added=added,
        share=share,
    )


def _origin(imported: Mapping[str, Any]) -> str:
    found = imported["repository"]
    place = f"`{found}` on the Hub, commit {imported['commit']}," if found else "a folder"
    return f"\nIt was not trained with retrofit: it was imported from {place} and drafts as `{imported['style']}` does."


def _began(origin: Mapping[str, Any]) -> str:
    if "averaged" in origin:
        several = origin["averaged"]
        return f"\nIts weights are the mean of {len(several)} that were trained on this base: {_hashes(several)}."
    if "from" in origin:
        return f"\nIt was trained on from the {origin['from']['kind']} whose manifest has {_hashes([origin['from']])}."
    return ""


def _hashes(several: Sequence[Mapping[str, Any]]) -> str:
    return "sha256 " + ", ".join(one["sha256"][:12] for one in several)


def contexts(by_context: Sequence[Mapping[str, Any]]) -> str:
    """`by tokens of context: up to 512 2.31, up to 1,024 2.28`: acceptance by context in one line."""
    return "by tokens of context: " + ", ".join(f"up to {one['up_to']:,} {one['tau']:.2f}" for one in by_context)
