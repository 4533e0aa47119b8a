"""The fused backend against the `hf` backend: logits of every kind of row plan, tokens of every mode, exactness levels.

Where no GPU is, the kernels run in Triton's interpreter; what the device loop does with them is in test_device_loop.py.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise, tokens_of
from fused_models import DEVICE, LAYOUT, ROWS, VOCABULARY, Planted, cycles, fused, pair, planted, poisoned, small
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.errors import UnsupportedModelError, UsageError
from retrofit.runtime.auto import cost
from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.backends.interface import Output
from retrofit.runtime.backends.levels import EXACT
from retrofit.runtime.engine import Engine
from retrofit.runtime.rules.tree import fixed_tree

FAMILIES = ("llama", "mistral_window", "qwen2", "qwen3")
FORWARD = ("llama", "llama_tied", "llama_mqa", "mistral_window", "qwen2_window", "qwen3_window")
ROPES = ("llama_rope_linear", "llama_rope_dynamic", "llama_rope_llama3", "llama_rope_yarn")
HEADS = {"llama_tied": {"num_key_value_heads": 2}, "qwen2": {"tie_word_embeddings": True}}
"""Every query head its own K/V head; otherwise two share one."""
PROMPTS = random_prompts((9, 3), vocab=VOCABULARY)
M = MASK

Plans = Sequence[list[SequenceRows]]
PREFILL = [SequenceRows(0, 0, PROMPTS[0], last_logits_only=True), SequenceRows(1, 0, PROMPTS[1], last_logits_only=True)]
MIXED = [
    # Verify two drafts, a block on each row; beside it a first draft, its block with a token that is known.
    SequenceRows(0, 9, [5, 6, 7], [Block(10, [M, M]), Block(11, [M, M]), Block(12, [M, M])]),
    SequenceRows(1, 3, [8], [Block(4, [M, 3])]),
]
TREE = [
    SequenceRows(0, 9, [5, 6, 7, 8], [Block(10, [M, M], 0), Block(12, [M, M], 3)], parents=[-1, 0, 0, 2]),
    SequenceRows(1, 3, [8, 1]),
]
AFTER_TREE = [SequenceRows(0, 12, [4]), SequenceRows(1, 5, [2])]


def run(engine: Engine, plans: Plans, slots: int = 2) -> list[Output]:
    """One forward after another over one cache; a tree keeps its rows 0, 2, 3."""
    backend, made = engine.backend, []
    cache = backend.new_cache(slots, 64)
    for slot in range(slots):
        cache.open(slot, 64)
    with torch.inference_mode():
        for sequences in plans:
            made.append(backend.forward(backend.row_plan(sequences), cache))
            if sequences is TREE:
                kept = ([0, 2, 3, 4, 5], [0, 0, 0, 1, 1], [9, 10, 11, 3, 4])
                cache.store(*(torch.tensor(values, device=backend.device) for values in kept))
    cache.release()
    return made


def assert_close(got: Tensor, want: Tensor, what: Any) -> None:
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=2e-5 * scale, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("name", FORWARD)
def test_logits_of_row_plans(name: str) -> None:
    """A ragged prefill, several blocks, a tree, and a step over what the tree left in the cache."""
    causal = "causal" if name.startswith("qwen") else "bidirectional"
    engine, hf = pair(small(name, **HEADS.get(name, {})), DraftLayout(block=2, attention=causal))
    plans = (PREFILL, MIXED, TREE, AFTER_TREE)
    for step, (got, want) in enumerate(zip(run(engine, plans), run(hf, plans), strict=True)):
        assert_close(got.base_logits, want.base_logits, (name, step))
        assert_close(got.base_hidden, want.base_hidden, (name, step))
        assert_close(got.draft_hidden, want.draft_hidden, (name, step))


@pytest.mark.parametrize("name", ROPES)
def test_rope_at_near_and_far_positions(name: str) -> None:
    """Far positions stand over a cache that was never written: zeros, in both backends."""
    engine, hf = pair(small(name, num_hidden_layers=1))
    plans = [[SequenceRows(0, start, PROMPTS[0][:3], [Block(start + 3, [M, M])])] for start in (0, 31, 50)]
    for start, got, want in zip((0, 31, 50), run(engine, plans, 1), run(hf, plans, 1), strict=True):
        assert_close(got.base_logits, want.base_logits, (name, start))
        assert_close(got.draft_hidden, want.draft_hidden, (name, start))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_rounding_points_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    """The first row sees only itself, so attention adds up nothing: its logits are the original's bit for bit.

    The others differ by the order in which attention adds.
    """
    exact = small(name)
    with torch.inference_mode():
        truth = exact(input_ids=torch.tensor([PROMPTS[0]])).logits[0]
    model = small(name).to(dtype)
    checkpoint = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits[0]
    hf = Engine.from_model(model, layout=LAYOUT)
    (got,) = run(fused(hf, checkpoint, dtype=dtype), [[SequenceRows(0, 0, PROMPTS[0])]], 1)
    logits = got.base_logits.cpu()
    assert logits.dtype == dtype
    ulp = torch.finfo(dtype).eps * float(want.abs().max())
    difference = (logits.float() - want.float()).abs()
    assert float(difference.max()) <= 4 * ulp
    if DEVICE == "cpu":  # a GPU adds in another order within matrix products
        assert torch.equal(logits[0], want[0])
    best = truth.topk(2).values
    clear = best[:, 0] - best[:, 1] > 8 * ulp
    assert int(clear.sum()) >= 3
    assert torch.equal(logits.argmax(-1)[clear], want.argmax(-1)[clear])


# Tokens

WAYS: dict[str, Sequence[tuple[str, int, dict[str, Any]]]] = {
    "llama": (
        ("ar", 2, {"max_new_tokens": 8}),
        ("diffusion", 1, {"max_new_tokens": 6}),
        ("self_spec", 1, {"strategy": "fused", "max_new_tokens": 7}),
    ),
    "mistral_window": (
        ("ar", 1, {"max_new_tokens": 12, "temperature": 0.8}),
        ("diffusion", 2, {"max_new_tokens": 4, "temperature": 0.8}),
        ("self_spec", 2, {"strategy": "two_forward", "max_new_tokens": 5, "temperature": 0.8}),
    ),
    "qwen2": (
        ("ar", 1, {"max_new_tokens": 6}),
        ("diffusion", 1, {"max_new_tokens": 6, "threshold": 0.3}),
        ("self_spec", 1, {"strategy": "fused", "tree": 4, "prepare": 2, "max_new_tokens": 6}),
        ("self_spec", 2, {"strategy": "prompt_lookup", "max_new_tokens": 5}),
        ("self_spec", 2, {"strategy": "hybrid", "tree": 2, "max_new_tokens": 5}),
    ),
    "qwen3": (
        ("ar", 1, {"max_new_tokens": 12}),
        ("diffusion", 1, {"max_new_tokens": 6}),
        ("self_spec", 1, {"strategy": "fused", "prepare": "last", "max_new_tokens": 7, "temperature": 0.8}),
    ),
}


@pytest.fixture(autouse=True)
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "REPEATS", 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_every_family_and_mode(name: str) -> None:
    """Token-equal in fp32, and the same drafts: as many of them are accepted in each cycle."""
    engine, hf = pair(small(name, **HEADS.get(name, {})))
    for mode, batch, options in WAYS[name]:
        got, want = (e.generate(PROMPTS[-batch:], mode, batch_size=batch, **options) for e in (engine, hf))
        assert [r.tokens for r in got] == [r.tokens for r in want], (mode, options)
        if options.get("strategy") != "hybrid":  # its nodes are in the order of chances, which may be as good as equal
            assert [cycles(r) for r in got] == [cycles(r) for r in want], (mode, options)


@pytest.mark.parametrize(("exact", "options"), [("bucket", {}), ("invariant", {"tree": 3})])
def test_self_spec_is_ar_at_every_level(exact: str, options: dict[str, Any]) -> None:
    """With drafts that are mostly right, so that several are accepted at once."""
    engine, _ = pair(small("llama", num_hidden_layers=1), exact=exact)
    common = {"max_new_tokens": 7, "temperature": 0.8, "seed": 4, "batch_size": 1}
    want = tokens_of(engine, PROMPTS[1:], "ar", **common)
    tree = fixed_tree(LAYOUT, {}, "all", options["tree"], True) if options else None
    planted(engine, Planted({4: want[0]}, 0.2, tree=tree))
    (result,) = engine.generate(PROMPTS[1:], "self_spec", strategy="fused", **options, **common)
    assert result.tokens == want[0]
    assert max(result.stats.accepted) >= (1 if options else 2)
    if exact == "bucket":
        assert result.stats.widest <= ROWS


# Exactness


def alone(engine: Engine, slot: int = 0, slots: int = 1) -> list[Tensor]:
    """Logits of the rows 5, 6, 7 behind the first prompt, each in a forward of its own."""
    plans = [[SequenceRows(slot, 0, PROMPTS[0], last_logits_only=True)]]
    plans += [[SequenceRows(slot, 9 + i, [token])] for i, token in enumerate((5, 6, 7))]
    return [out.base_logits[0] for out in run(engine, plans, slots)]


@pytest.mark.parametrize("exact", ["bucket", "invariant"])
def test_a_base_row_is_bitwise_the_same_in_any_company(exact: str) -> None:
    engine, _ = pair(small("qwen3", num_hidden_layers=1), exact=exact)
    prefill = [SequenceRows(0, 0, PROMPTS[0], last_logits_only=True)]
    want = torch.stack(alone(engine))
    moved = torch.stack(alone(engine, slot=1, slots=2))
    assert torch.equal(moved, want)
    drafted = [SequenceRows(0, 9, [5, 6, 7], [Block(10 + j, [M, M]) for j in range(3)])]
    got = run(engine, [prefill, drafted], 1)[1].base_logits
    assert torch.equal(got, want[1:])
    branches = [SequenceRows(0, 9, [5, 3, 6, 2, 7], [Block(10, [M, M], 0)], parents=[-1, 0, 0, 1, 2])]
    got = run(engine, [prefill, branches], 1)[1].base_logits
    assert torch.equal(got[[0, 2, 4]], want[1:])
    # Behind another request's rows, in another slot.
    other = [SequenceRows(0, 0, PROMPTS[1], last_logits_only=True)]
    mine = [SequenceRows(1, 0, PROMPTS[0], last_logits_only=True)]
    both = [SequenceRows(0, 3, [1, 2], [Block(5, [M, M])]), SequenceRows(1, 9, [5, 6, 7], [Block(12, [M, M])])]
    got = run(engine, [other, mine, both])[2].base_logits
    assert torch.equal(got[2:], want[1:])


@pytest.mark.parametrize("exact", EXACT)
def test_the_adapter_never_reaches_a_base_row(exact: str) -> None:
    """LoRA, mask vector and heads are NaN: draft rows turn NaN, base rows keep their bits."""
    model = small("qwen2", num_hidden_layers=1)
    checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hf = randomise(Engine.from_model(model, layout=LAYOUT))
    plans = (PREFILL, MIXED)
    want, got = (run(make(hf, checkpoint, exact=exact), plans) for make in (fused, poisoned))
    for clean, dirty in zip(want, got, strict=True):
        assert torch.isfinite(clean.base_logits).all()
        assert torch.equal(dirty.base_logits, clean.base_logits)
        assert torch.equal(dirty.base_hidden, clean.base_hidden)
    assert torch.isfinite(want[1].draft_hidden).all() and torch.isnan(got[1].draft_hidden).all()


@pytest.mark.usefixtures("poisoned_memory")
def test_memory_that_nobody_wrote_is_never_read() -> None:
    """Free pages, positions not yet written, outputs of kernels before they are filled, padding rows: all NaN."""
    engine, hf = pair(small("mistral_window", num_hidden_layers=1), exact="bucket")
    new_cache = engine.backend.new_cache

    def dirty(slots: int, capacity: int) -> Any:
        cache = new_cache(slots, capacity)
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
        return cache

    engine.backend.new_cache = dirty
    plans = (PREFILL, MIXED)
    prompts_alone = [[s] for s in PREFILL]
    for got, want in zip(run(engine, [*prompts_alone, MIXED])[2:], run(hf, plans)[1:], strict=True):
        assert_close(got.base_logits, want.base_logits, "base")
        assert_close(got.draft_hidden, want.draft_hidden, "draft")


# What it refuses, and what it says of itself


def backend(name: str = "llama", **options: Any) -> FusedGQA:
    model = small(name, num_hidden_layers=1)
    checkpoint = model.state_dict()
    return FusedGQA(model.config, lambda key: checkpoint[key], LAYOUT, **{"device": DEVICE, **options})


def test_options_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="exact='most' does not exist"):
        backend(exact="most")
    with pytest.raises(UsageError, match="the bucket has 0 rows"):
        backend(rows=0)
    with pytest.raises(UnsupportedModelError, match="model type 'phi3'"):
        backend("phi3")


def test_a_backend_without_an_adapter_decodes() -> None:
    model = small("llama", num_hidden_layers=1)
    engine = Engine(backend(exact="off"), LAYOUT, None)
    want = Engine.from_model(model)
    options = {"max_new_tokens": 3, "batch_size": 1}
    assert tokens_of(engine, PROMPTS[1:], "ar", **options) == tokens_of(want, PROMPTS[1:], "ar", **options)
    with pytest.raises(UsageError, match="needs the transformers model"):
        _ = engine.attached


def test_row_counts() -> None:
    """`bucket` pads decoding to one row count and says how many rows fit; a prompt is never padded."""
    padded = {}
    for exact in EXACT:
        made = backend(exact=exact, rows=ROWS)
        cache = made.new_cache(1, 32)
        cache.open(0, 32)
        decode = made.rows(made.row_plan([SequenceRows(0, 4, [1, 2])]), cache)
        prompt = made.rows(made.row_plan([SequenceRows(0, 0, [1, 2, 3], last_logits_only=True)]), cache)
        padded[exact] = (decode.padded, prompt.padded, made.most_rows, made.prefill_alone)
    assert padded == {
        "off": (2, 3, None, False),
        "bucket": (ROWS, 3, ROWS, True),
        "invariant": (2, 3, None, True),
    }
