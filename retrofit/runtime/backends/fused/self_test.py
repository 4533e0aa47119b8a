"""The self-test behind the levels of exactness: do a row's bits depend on the rows beside it, here, with these weights?

What a level promises is a property of the GPU and of its libraries, so it is tried out before an engine decodes:

    products     every distinct shape with real weights, in the row counts that the level runs
    attention    a row alone, among its sequence's rows and draft rows, beside another sequence, in another slot
    decoder      logits of plain decoding against those of the same rows verified together, and in a tree

    level        rows of a product             a library product that fails
    bucket       always those of the bucket    is replaced by our kernel, wherever its shape occurs
    invariant    as many as there are          does not occur: all products are ours
    off          as many as there are          stays: the table says what would hold, and nothing is demanded

Equal is what `torch.equal` calls so.  Not here: which level an engine runs (`engine.py`), the table for people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.runtime.backends.fused.backend import FusedGQA, full_precision_reductions
from retrofit.runtime.backends.fused.paged import PagedCache, pages_for
from retrofit.runtime.backends.fused.weights import Linear
from retrofit.runtime.backends.levels import Check, require_equal
from retrofit.runtime.kernels.attention import SPLIT, row_attention
from retrofit.runtime.kernels.norm import embed_rms_norm
from retrofit.runtime.kernels.rows import PAGE

SEED = 0
ROLES = ("qkv", "o", "gate_up", "down")
"""The products of a layer, in the order of `Weights.linears`."""
OUTLIER = 50.0
"""How far single features of a deep layer stand out (arXiv 2402.17762 has far larger ones)."""


@dataclass(frozen=True)
class Size:
    """How much is tried."""

    counts: tuple[int, ...]
    """Row counts of products, where a level runs as many rows as there are."""
    context: int
    """Positions that attention sees."""
    split: int
    """Positions in a part of attention."""
    prompt: int
    """Tokens before the decoder's rows."""
    alone: int
    """Rows that the decoder also runs one by one, at least 2."""


GPU = Size(counts=(1, 2, 16, 17, 64, 129), context=5 * SPLIT // 2, split=SPLIT, prompt=SPLIT + 16, alone=4)
"""Both sides of every width of our product's row tiles, and a second tile; parts of attention that are full and not."""
INTERPRETER = Size(counts=(1, 2, 17), context=3 * PAGE // 2, split=PAGE, prompt=3, alone=2)


@torch.inference_mode()
def self_test(backend: FusedGQA, drafts: int) -> list[Check]:
    """Try out the backend's level, and at `bucket` switch the shapes that need it to our kernel.

    drafts: tokens of a block.  Takes about a second on a GPU once the kernels are compiled.
    """
    cuda = backend.device.type == "cuda"
    size = GPU if cuda else INTERPRETER
    generator = torch.Generator(backend.device).manual_seed(SEED)
    chain = 1 + drafts if backend.most_rows is None else min(1 + drafts, backend.most_rows)
    checks = products(backend, chain, size, generator)
    checks += attention(backend, chain, size, generator)
    checks.append(decoder(backend, chain, size, generator))
    if cuda:
        torch.cuda.empty_cache()  # the K/V cache is sized by what is free
    return checks


def demand(checks: Iterable[Check]) -> None:
    """Raises GateError that names the first check which is not equal."""
    require_equal(
        checks,
        "use exact='invariant', which runs our kernels only; should that fail too, exact='off' decodes without the "
        "guarantee",
    )


def products(backend: FusedGQA, chain: int, size: Size, generator: torch.Generator) -> list[Check]:
    """One check per distinct shape.  chain: base rows of a request."""
    names = [*ROLES * len(backend.weights.layers), "vocabulary"]
    alike: dict[tuple[int, int, bool], dict[str, list[Linear]]] = {}
    for name, linear in zip(names, backend.weights.linears(), strict=True):
        outputs, inputs = linear.weight.shape
        alike.setdefault((outputs, inputs, linear.bias is not None), {}).setdefault(name, []).append(linear)
    checks = []
    for (outputs, inputs, biased), roles in alike.items():
        linears = [linear for members in roles.values() for linear in members]
        arrangements = _arrangements(backend.most_rows, chain, size.counts)
        x_RK = _activations(backend, max(padded for _, padded, _ in arrangements), inputs, generator)
        differs = _differing_product(backend, linears[0], x_RK, arrangements, generator)
        if differs is not None and backend.exact == "bucket" and not linears[0].own_kernel:
            for linear in linears:
                linear.own_kernel = True
            differs = _differing_product(backend, linears[0], x_RK, arrangements, generator)
        checks.append(
            Check(
                what=", ".join(roles),
                shape=f"[{outputs}, {inputs}]{' + bias' if biased else ''}",
                kernel="ours" if linears[0].own_kernel else "library",
                rows=differs or _described(arrangements),
                equal=differs is None,
            )
        )
    return checks


def _arrangements(bucket: int | None, chain: int, counts: tuple[int, ...]) -> list[tuple[int, int, float]]:
    """(rows, rows with padding, what the padding holds) that a product is run with; the last are all rows at once."""
    if bucket is None:
        return [(n, n, 0.0) for n in sorted({*counts, chain})]
    # Padding rows hold whatever was in memory.
    padding = (0.0, float("nan"))
    return [*((n, bucket, value) for n in sorted({1, chain} - {bucket}) for value in padding), (bucket, bucket, 0.0)]


def _described(arrangements: list[tuple[int, int, float]]) -> str:
    counts = ", ".join(str(n) for n in dict.fromkeys(n for n, _, _ in arrangements))
    padded = {padded for _, padded, _ in arrangements}
    return f"{counts} of {max(padded)}" if len(padded) == 1 else counts


def _differing_product(
    backend: FusedGQA,
    linear: Linear,
    x_RK: Tensor,
    arrangements: list[tuple[int, int, float]],
    generator: torch.Generator,
) -> str | None:
    """The first arrangement in which a row has other bits than among all rows."""
    whole = _product(backend, linear, x_RK)
    for n, padded, padding in arrangements:
        for order in _orders(len(x_RK), n, generator):
            x = torch.full((padded, x_RK.shape[1]), padding, dtype=x_RK.dtype, device=x_RK.device)
            x[:n] = x_RK[order]
            if not torch.equal(_product(backend, linear, x)[..., :n, :], whole[..., order, :]):
                return f"{n} of {padded}" if padded != n else str(n)
    return None


def _orders(rows: int, n: int, generator: torch.Generator) -> list[Tensor]:
    """Which n rows of `_activations` to take, in random order; for a row alone, one of each kind."""
    order = torch.randperm(rows, generator=generator, device=generator.device)
    return [order[:n]] if n > 1 else [order[order % 2 == kind][:1] for kind in range(min(2, rows))]


def _product(backend: FusedGQA, linear: Linear, x_RK: Tensor) -> Tensor:
    """[(splits,) R, N] as the decoder computes it."""
    if linear is backend.weights.head:
        return backend.head(x_RK)
    with full_precision_reductions(backend.device):
        return linear.parts(x_RK)[0]


def _activations(backend: FusedGQA, rows: int, inputs: int, generator: torch.Generator) -> Tensor:
    """[rows, inputs]: Gaussian rows, and in every other place rows like the model's own.

    Those are normed embeddings where they are as wide; elsewhere small values with a few large outliers.
    """
    device = backend.device
    x = torch.randn(rows, inputs, dtype=backend.dtype, device=device, generator=generator)
    table = backend.weights.embedding
    if inputs == table.shape[1]:
        ids = torch.randint(len(table), (rows // 2,), device=device, generator=generator)
        x[1::2] = embed_rms_norm(ids, table, backend.mask_vector, backend.weights.layers[0].input_norm, backend.eps)[1]
    else:
        x[1::2] *= 0.1
        x[1::2, torch.randint(inputs, (4,), device=device, generator=generator)] *= OUTLIER / 0.1
    return x


def attention(backend: FusedGQA, chain: int, size: Size, generator: torch.Generator) -> list[Check]:
    """One check per sliding window the model has, over a cache of random K and V."""
    windows = dict.fromkeys(layer.window for layer in backend.weights.layers)
    return [_attention(backend, chain, size, generator, window) for window in windows]


def _attention(backend: FusedGQA, chain: int, size: Size, generator: torch.Generator, window: int | None) -> Check:
    config, width = backend.config, backend.width
    heads, kv_heads, block = config.num_attention_heads, config.num_key_value_heads, backend.layout.block
    own, copy, other = range(3)
    positions = size.context + chain
    cache = PagedCache((1, kv_heads, width), 3, positions, 3 * pages_for(positions), backend.dtype, backend.device)
    for slot in (own, copy, other):
        cache.open(slot, positions)
    for kept in (cache.keys, cache.values):
        kept.normal_(generator=generator)
        kept[:, cache.owned[copy]] = kept[:, cache.owned[own]]
    wider = torch.nn.functional.pad(cache.block_table, (0, 2 * size.split // PAGE))

    def drawn(rows: int, of: int) -> Tensor:
        return torch.randn(rows, of, width, dtype=backend.dtype, device=backend.device, generator=generator)

    query, draft_key, draft_value = drawn(chain, heads), drawn(block, kv_heads), drawn(block, kv_heads)
    beside = drawn(max(backend.most_rows or 0, 2 * chain + block), heads)

    def attend(sequences: list[SequenceRows], at: int, first: int, count: int, table: Tensor) -> Tensor:
        """Result of the chain's rows `first`.., which stand in row `at`.. of the forward."""
        rows = backend.rows(backend.row_plan(sequences), cache)
        q = beside[: rows.padded].clone()
        q[at : at + count] = query[first : first + count]
        out = row_attention(
            q, cache.keys[0], cache.values[0], table, draft_key[: rows.num_draft], draft_value[: rows.num_draft], rows,
            width**-0.5, window, None, backend.layout.causal, split=size.split,
        )  # fmt: skip
        return out[at : at + count]

    def rows_of(slot: int, first: int = 0, count: int = chain) -> SequenceRows:
        return SequenceRows(slot, size.context + first, [0] * count)

    blocks = [Block(size.context + 1, [MASK] * block)]
    table = cache.block_table
    whole = attend([SequenceRows(own, size.context, [0] * chain, blocks)], 0, 0, chain, table)
    arrangements: dict[str, Callable[[], Tensor]] = {
        f"{chain} rows": lambda: attend([rows_of(own)], 0, 0, chain, table),
        "another sequence": lambda: attend([rows_of(other), rows_of(own)], chain, 0, chain, table),
        "another slot": lambda: attend([rows_of(copy)], 0, 0, chain, table),
        "a larger cache": lambda: attend([rows_of(own)], 0, 0, chain, wider),
    }
    ends = sorted({0, chain - 1})
    alone = torch.cat([attend([rows_of(own, j, 1)], 0, j, 1, table) for j in ends])
    differs = None if torch.equal(alone, whole[ends]) else "a row alone"
    for name, run in arrangements.items():
        differs = differs or (None if torch.equal(run(), whole) else name)
    return Check(
        what="attention",
        shape=f"{heads} heads, {kv_heads} K/V, width {width}" + (f", window {window}" if window else ""),
        kernel="ours",
        rows=differs or ", ".join(["alone", *arrangements, "draft rows"]),
        equal=differs is None,
    )


def decoder(backend: FusedGQA, chain: int, size: Size, generator: torch.Generator) -> Check:
    """Logits of whole forwards: rows decoded one by one, against the same rows in one forward with others."""
    block, bucket = backend.layout.block, backend.most_rows
    prompt = max(1, min(size.prompt, backend.context_length - chain - block - 1))
    vocab = backend.head.vocab
    tokens = torch.randint(vocab, (prompt + chain,), generator=generator, device=backend.device).tolist()
    rows = tokens[prompt:]
    sibling = (rows[min(1, chain - 1)] + 1) % vocab
    shape = (len(backend.weights.layers), backend.config.num_key_value_heads, backend.width)
    cache = PagedCache(shape, 2, prompt + chain, 2 * pages_for(prompt + chain), backend.dtype, backend.device)
    for slot in range(2):
        cache.open(slot, prompt + chain)

    def forward(*sequences: SequenceRows) -> Tensor:
        return backend.forward(backend.row_plan(list(sequences)), cache).base_logits

    forward(SequenceRows(0, 0, tokens[:prompt], last_logits_only=True))
    steps = range(min(size.alone, chain))
    alone = torch.cat([forward(SequenceRows(0, prompt + j, [rows[j]])) for j in steps])

    room = (bucket or 1 << 30) - chain
    others = [SequenceRows(1, 0, [sibling])] if room >= 1 else []
    blocks = [Block(prompt + 1, [MASK] * block)] if room >= len(others) + block else []
    at_once = forward(*others, SequenceRows(0, prompt, rows, blocks))[len(others) :]
    tried = ["one by one", f"{chain} together" + (" beside draft rows" if blocks else "")]
    differs = None if torch.equal(at_once[: len(alone)], alone) else tried[-1]
    if len(alone) > 1 and (bucket or 3) >= 3:
        # The second row behind a sibling: its K and V stand in another place than a chain's.
        branched = forward(SequenceRows(0, prompt, [rows[0], sibling, rows[1]], parents=[-1, 0, 0]))
        tried.append("a tree")
        differs = differs or (None if torch.equal(branched[[0, 2]], alone[:2]) else tried[-1])
    ours = all(linear.own_kernel for linear in backend.weights.linears())
    return Check(
        what="decoder",
        shape=f"{shape[0]} layers",
        kernel="ours" if ours else "library",
        rows=differs or ", ".join(tried),
        equal=differs is None,
    )
