"""The self-test of the `hf` backend: which level of exactness holds for a model's own modules, on this machine?

    attention   each distinct shape, in the cheapest form that is exact (`exact_attends.py`)
    products    each distinct linear layer and each router, in many row counts (`exact_products.py`)
    decoder     logits of plain decoding against those of the same rows verified together, and in a tree: all else
                that the model does with rows, its experts and norms
    prompts     alone and beside others (`exact_prompts.py`): where they differ they run one by one

    level       every decoding forward                         what fails
    invariant   has as many rows as the products need, 2 here  products are cut; a router gets its rows in tiles
    bucket      is filled up to `rows` rows                    -

Equal is what `torch.equal` calls so.  Not here: our own kernels (`exact.py`), the table for people (`doctor.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.exact_attends import exact_form
from retrofit.runtime.backends.hf.exact_attention import Form
from retrofit.runtime.backends.hf.exact_products import FLOORS, floor, linear_products, router_products, row_cut
from retrofit.runtime.backends.hf.exact_prompts import prompts_share
from retrofit.runtime.backends.interface import BUCKET_ROWS
from retrofit.runtime.backends.levels import HALF, Check, require_equal
from retrofit.runtime.backends.threads import thread_limit, work_sizes

CPU_BUCKET_ROWS = 32
"""Rows of every decoding forward at `bucket` on a CPU: extra rows are dearer there."""
VECTOR = 32
"""Numbers that an elementwise function takes together on a CPU, at most."""
PROMPT = 62
"""Tokens before the decoder's rows."""
ALONE = 3
"""Rows that the decoder also runs one by one."""
TURNS = 20
"""How often each level is timed."""
SEED = 0
HINT = "use {}; exact='off' decodes without the guarantee"
OTHERS = {"invariant": "exact='bucket' or exact='auto'", "bucket": "exact='auto'"}
"""What may hold where a level does not."""


@dataclass(frozen=True)
class Priced:
    """A level: whether it holds here, the fewest rows of its decoding forwards, and what that costs `ar`."""

    level: str
    holds: bool
    rows: int
    seconds: float | None
    """Of a plain decoding step behind PROMPT tokens, the fastest of many; None where the level does not hold."""


@dataclass(frozen=True)
class Settled:
    """The level that a backend keeps, and why it is that one."""

    level: str
    why: str
    checks: list[Check] = field(default_factory=list)


def settle(backend: HFBackend, wanted: str, drafts: int, rows: int | None = None) -> Settled:
    """Let the backend keep a level of exactness that holds here.

    wanted: off, bucket, invariant, or auto: in half precision the cheapest that holds; else invariant where weights are
    packed, which makes it cheap, and it holds, and off otherwise, since rounding there seldom parts texts.
    drafts: tokens of a block.  rows: of every decoding forward at bucket.
    Raises GateError where a level that was asked for by name does not hold.
    """
    name = str(backend.dtype).removeprefix("torch.")
    half = backend.dtype in HALF
    if wanted == "off" or (wanted == "auto" and not half and not backend.packed):
        backend.hold("off", None)
        why = f"auto tests levels in half precision and with packed products only; this is {name}, plain"
        return Settled("off", "it was asked for" if wanted == "off" else why)
    failed: list[Check] = []
    for level in (("invariant", "bucket") if half else ("invariant",)) if wanted == "auto" else (wanted,):
        checks = self_test(backend, level, drafts, rows)
        failed = [check for check in checks if not check.equal]
        if not failed:
            counts = f"with {backend.least_rows} rows"
            if level == "invariant":
                backend.prefill_alone = not prompts_share(backend)
                counts += f" and more; prompts run {'one by one' if backend.prefill_alone else 'together'}"
            return Settled(level, f"{len(checks)} checks of {name} rows are equal bit for bit {counts}", checks)
    backend.hold("off", None)
    if wanted != "auto":
        require_equal(failed, HINT.format(OTHERS[wanted]))
    first = failed[0]
    return Settled("off", f"no level holds here: {first.what} {first.shape} differs ({first.rows})", failed)


@torch.inference_mode()
def self_test(backend: HFBackend, level: str, drafts: int, rows: int | None = None) -> list[Check]:
    """Try a level out; the backend keeps it afterwards, whatever came of it."""
    rows = rows or (CPU_BUCKET_ROWS if backend.device.type == "cpu" else BUCKET_ROWS)
    generator = torch.Generator(backend.device).manual_seed(SEED)
    form, checks = exact_form(backend, generator)
    most = None
    if level == "invariant":
        linear, cut = row_cut(backend, generator)
        products, most = [*linear, *router_products(backend, generator)], cut.most
        least, chain = floor(products) or FLOORS[-1], 1 + drafts
    else:
        products, least, chain = linear_products(backend, generator, rows), rows, min(1 + drafts, rows)
    backend.hold(level, form, least, most)
    checks += [product.check(least) for product in products]
    if level == "bucket":
        checks += _lone_experts(backend)
    return [*checks, *_gates(backend, level), _decoder(backend, chain, generator)]


def survey(backend: HFBackend, drafts: int, rows: int | None = None) -> list[Priced]:
    """Try out every level, and time `ar` at those that hold, in turns.  The backend keeps `off` afterwards."""
    kept: dict[str, tuple[Form | None, int, int | None, bool]] = {"off": (None, 1, None, True)}
    for level in ("invariant", "bucket"):
        holds = all(check.equal for check in self_test(backend, level, drafts, rows))
        kept[level] = (backend.form, backend.least_rows, backend.cut.most, holds)
    seconds: dict[str, float] = {}
    cache = KVCache(1, PROMPT + 1)
    with torch.inference_mode():
        backend.hold("off", None)
        backend.forward(backend.row_plan([SequenceRows(0, 0, [1] * PROMPT, last_logits_only=True)]), cache)
        for _ in range(TURNS):
            for level, (form, least, most, holds) in kept.items():
                if holds:
                    backend.hold(level, form, least, most)
                    with thread_limit(backend.device, least * backend.work_per_row):
                        begin = time.perf_counter()
                        out = backend.forward(backend.row_plan([SequenceRows(0, PROMPT, [1])]), cache)
                        out.base_logits[0, 0].item()
                        took = time.perf_counter() - begin
                    seconds[level] = min(seconds.get(level, took), took)
    backend.hold("off", None)
    return [Priced(level, holds, least, seconds.get(level)) for level, (_, least, _, holds) in kept.items()]


def _lone_experts(backend: HFBackend) -> list[Check]:
    """Experts that are modules of their own run as many rows as were sent to them: a bucket does not reach that far."""
    names = [
        name
        for name, module in backend.trunk.named_modules()
        if name.rsplit(".", 1)[-1] == "experts" and isinstance(module, nn.ModuleList)
    ]
    return [Check("experts", f"{len(names)} lists of modules", "library", "one expert's rows", False)] if names else []


def _gates(backend: HFBackend, level: str) -> list[Check]:
    """Recurrent layers compute gates by functions that are no modules: on a CPU those of the last rows by another one,
    where the numbers of all rows fill no vectors."""
    if not backend.recurrent or backend.device.type != "cpu":
        return []
    equal = level == "bucket" and backend.least_rows % VECTOR == 0
    rows = f"{backend.least_rows} rows, always as many" if level == "bucket" else "any number of rows"
    return [Check("gates", f"{len(backend.recurrent)} recurrent layers", "library", rows, equal)]


def _decoder(backend: HFBackend, chain: int, generator: torch.Generator) -> Check:
    """Logits of whole forwards: rows decoded one by one, against the same rows in one forward with others."""
    vocab, bucket = backend.head.vocab, backend.most_rows
    prompt = max(1, min(PROMPT, backend.context_length - 2 * chain - 1, (backend.rope_boundary or 1 << 30) - chain - 1))
    tokens = torch.randint(vocab, (prompt + chain,), generator=generator, device=backend.device).tolist()
    rows, siblings = tokens[prompt:], [(t + 1) % vocab for t in tokens[prompt:]]
    # More rows than any forward is filled up to; at `bucket` as many as there is room for.
    end = backend.rope_boundary or backend.context_length
    beside = min(max(chain, backend.least_rows), prompt, end - prompt - 1)
    cache = KVCache(2, prompt + max(2 * chain, beside))

    def forward(*sequences: SequenceRows) -> Tensor:
        return backend.forward(backend.row_plan(list(sequences)), cache).base_logits

    forward(SequenceRows(0, 0, tokens[:prompt], last_logits_only=True))
    forward(SequenceRows(1, 0, tokens[1 : prompt + 1], last_logits_only=True))
    room = (bucket or 1 << 30) - chain
    drafts = chain if backend.heads is not None and room >= 2 * chain else 0
    beside = min(beside, room - drafts)
    others = [SequenceRows(1, prompt, tokens[:beside])] if beside else []
    blocks = [Block(prompt + 1, [MASK] * drafts)] if drafts else []
    tried = {f"{chain} together beside others": (*others, SequenceRows(0, prompt, rows, blocks))}
    if chain > 1 and (bucket or 3) >= 3:
        tried["a tree"] = (SequenceRows(0, prompt, [rows[0], siblings[0], rows[1]], parents=[-1, 0, 0]),)
    found: list[tuple[str, Tensor]] = []
    for work in work_sizes(backend.device):
        with thread_limit(backend.device, work):
            for name, sequences in tried.items():
                got = forward(*sequences)
                found.append((name, got[[0, 2]] if name == "a tree" else got[len(got) - chain :]))
    # Last: a state of recurrent layers that has gone on does not come back.
    alone = torch.cat([forward(SequenceRows(0, prompt + j, [rows[j]])) for j in range(min(ALONE, chain))])
    pairs = ((name, len(got[:ALONE]), got) for name, got in found)
    differs = next((name for name, n, got in pairs if not torch.equal(got[:n], alone[:n])), None)
    layers = f"{backend.config.num_hidden_layers} layers"
    return Check("decoder", layers, "library", differs or ", ".join(["one by one", *tried]), differs is None)
