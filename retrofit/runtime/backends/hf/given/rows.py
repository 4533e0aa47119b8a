"""What the text decoder is handed for the rows of a forward where texts begin with images.

rows of the prompt     embeddings, positions and additions as the model's own code made them (`Given`)
rows behind it         embeddings of their tokens; what RoPE goes by is shifted, as an image takes up fewer of those
                       numbers than it has rows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from retrofit.adapters.given import Given
from retrofit.adapters.rows import RowPlan


def with_given(plan: RowPlan, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's arguments, changed for the rows whose texts begin with images; as they are where none does."""
    spans = list(_spans(plan))
    if not spans:
        return dict(arguments)
    found = dict(arguments, inputs_embeds=arguments["inputs_embeds"].clone())
    if "per_layer_inputs" in arguments:
        found["per_layer_inputs"] = arguments["per_layer_inputs"].clone()
    depth = max(1 if given.positions is None else len(given.positions) for given, _ in spans)
    turns = plan.positions.expand(depth, -1).clone()
    marked = torch.zeros_like(plan.positions, dtype=torch.bool)
    added: list[list[Tensor]] = []
    for given, rows in spans:
        positions = plan.positions[0, rows]
        inside = positions < len(given)
        turns[:, rows] = _turns(given, positions, inside)
        there, at = rows.start + inside.nonzero()[:, 0], positions[inside]
        found["inputs_embeds"][0, there] = given.embeds[at]
        if given.per_layer is not None:
            found["per_layer_inputs"][0, there] = given.per_layer[at]
        if given.marked is not None and given.marked[at].any():
            marked[0, there] = given.marked[at]
            numbers = given.marked.cumsum(0)[at[given.marked[at]]] - 1
            added.append([layer[numbers] for layer in given.added])
    found["position_ids"] = turns if depth == 1 else turns[:, None]
    if added:
        found["visual_pos_masks"] = marked
        found["deepstack_visual_embeds"] = [torch.cat(layer) for layer in zip(*added, strict=True)]
    return found


def _spans(plan: RowPlan) -> Iterator[tuple[Given, slice]]:
    """The base rows of each sequence that begins with images, and its draft rows, as rows of the forward."""
    first = 0
    for sequence in plan.sequences:
        if sequence.given is not None:
            yield sequence.given, slice(first, first + len(sequence.tokens))
        first += len(sequence.tokens)
    first = plan.first_draft
    for sequence in plan.sequences:
        count = sum(len(block.inputs) for block in sequence.blocks)
        if sequence.given is not None:
            yield sequence.given, slice(first, first + count)
        first += count


def _turns(given: Given, positions: Tensor, inside: Tensor) -> Tensor:
    """[P, N] or [N]: what RoPE goes by at these positions."""
    behind = positions + given.shift
    if given.positions is None:
        return behind
    return torch.where(inside, given.positions[:, positions.clamp(max=len(given) - 1)], behind)
