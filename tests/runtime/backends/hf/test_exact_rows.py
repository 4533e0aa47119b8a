"""Exactness of the `hf` backend: base rows in a form of their own, filler rows, the self-test that finds the level.

What a machine's products do is the machine's affair, so tokens are compared at the level that the self-test lets
through, and the self-test has to catch every dependence on other rows that is planted.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoding import Oracle, random_prompts, randomise, tokens_of
from tiny_models import ARCHITECTURES, build
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, RowPlan, SequenceRows
from retrofit.adapters.visibility import Chunk
from retrofit.errors import GateError, UsageError
from retrofit.runtime.backends.hf import exact_attends, exact_attention, exact_products, exact_rows, parts
from retrofit.runtime.backends.hf.attention import ForwardContext, row_attention
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.exact_attention import FORMS, GROUPED
from retrofit.runtime.backends.hf.exact_rows import self_test, settle
from retrofit.runtime.backends.hf.parts import base_rows
from retrofit.runtime.backends.hf.parts.call import Part
from retrofit.runtime.backends.threads import LEAST_WORK
from retrofit.runtime.engine import Engine

LAYOUT = DraftLayout(block=4)
PROMPTS = random_prompts((1, 7, 30, 12))
NEW = 16


class Layer:
    layer_idx = 0


def attended(plan: RowPlan, cache: KVCache, form: Any, rows: tuple[Tensor, ...], **options: Any) -> Tensor:
    context = ForwardContext(plan, cache, form)
    return row_attention(Layer(), *rows, None, retrofit_rows=context, **options)[0][0]


def filled_cache(heads: int, width: int, value_width: int, generator: torch.Generator) -> KVCache:
    cache = KVCache(2, 100)
    cache.layers[0] = (
        torch.randn(2, heads, 100, width, generator=generator),
        torch.randn(2, heads, 100, value_width, generator=generator),
    )
    return cache


ROWS: dict[str, list[SequenceRows]] = {
    "one row": [SequenceRows(0, 50, [0])],
    "a chain": [SequenceRows(1, 33, [0] * 5)],
    "nothing hidden": [SequenceRows(0, 31, [0]), SequenceRows(1, 31, [0])],
    "prompts": [SequenceRows(0, 0, [0] * 80), SequenceRows(1, 0, [0] * 71)],
    "ragged": [SequenceRows(0, 9, [0] * 3), SequenceRows(1, 70, [0] * 6)],
    "a tree": [SequenceRows(0, 31, [0] * 6, parents=[-1, 0, 0, 1, 2, 4])],
    "trees and a chain": [SequenceRows(0, 40, [0] * 5, parents=[-1, 0, 0, 2, 2]), SequenceRows(1, 3, [0] * 3)],
    "a tree with a block": [
        SequenceRows(0, 40, [0] * 4, [Block(42, [MASK] * 3, anchor=1)], parents=[-1, 0, 0, 2]),
    ],
}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 6},
    {"sliding_window": 40, "softcap": 3.0},
    {"sliding_window": Chunk(11), "s_aux": torch.tensor([-1.0, 0.5, 2.0, 4.0])},
    {"s_aux": torch.tensor([3.0, -2.0, 1.0, 0.0])},
]


def test_columns_are_read_whole_where_a_part_would_be_copied() -> None:
    half, full = torch.bfloat16, torch.float32
    assert [GROUPED.columns(keys, 256, half) for keys in (100, 128, 200, 256, 300)] == [112, 256, 256, 256, 304]
    assert [GROUPED.columns(keys, 256, full) for keys in (100, 200, 300)] == [112, 208, 304]
    assert (
        exact_attention.TILED.columns(200, 512, half) == 256 and exact_attention.KERNEL.columns(300, 768, half) == 512
    )


@pytest.mark.parametrize("count", [1, 5])
def test_columns_that_nobody_sees_change_no_bit(count: int) -> None:
    """Rows over 100 of 128 columns, read whole in 16 bits, are those over a cache with room for 512."""
    outs = []
    for columns in (128, 512):
        generator = torch.Generator().manual_seed(0)
        cache = KVCache(1, columns)
        cache.layers[0] = tuple(
            torch.randn(1, 2, 512, 64, generator=generator)[:, :, :columns].bfloat16() for _ in "kv"
        )
        rows = tuple(torch.randn(1, h, count, 64, generator=generator).bfloat16() for h in (4, 2, 2))
        outs.append(attended(RowPlan([SequenceRows(0, 99 - count, [0] * count)]), cache, GROUPED, rows))
    assert torch.equal(*outs)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("rows", ROWS)
def test_every_form_is_the_attention_of_before(rows: str, form: Any, monkeypatch: Any) -> None:
    """In fp32, but for the order of addition; keys are cut often, tiles of rows are small."""
    monkeypatch.setattr(exact_attention, "TILE", 16)
    for shape, options in product([(4, 2, 8, 8), (3, 3, 12, 12), (3, 3, 12, 10)], OPTIONS):
        as_before(rows, options, shape, replace(form, keys=min(form.keys, 32), piece=32))


def as_before(rows: str, options: Any, shape: tuple[int, int, int, int], form: Any) -> None:
    heads, kv_heads, width, value_width = shape
    options = {**options, "s_aux": options["s_aux"][:heads]} if "s_aux" in options else options
    generator = torch.Generator().manual_seed(0)
    plan = RowPlan(ROWS[rows])
    drawn = tuple(
        torch.randn(1, h, plan.num_rows, w, generator=generator)
        for h, w in ((heads, width), (kv_heads, width), (kv_heads, value_width))
    )
    got, want = (
        attended(
            RowPlan(ROWS[rows]), filled_cache(kv_heads, width, value_width, torch.Generator().manual_seed(1)), f, drawn,
            **options,
        )
        for f in (form, None)
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6, msg=lambda said: f"{shape}, {options}: {said}")


@pytest.mark.parametrize("form", [exact_attention.KERNEL, exact_attention.TILED], ids=lambda form: form.name)
def test_a_tree_keeps_its_bits_beside_a_longer_text(form: Any) -> None:
    """The longer one has more pieces of keys, which lie between the pieces that all share and the tree's own."""
    form = replace(form, keys=32, piece=32)
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(2, 256)
    cache.layers[0] = tuple(torch.randn(2, 2, 256, 16, generator=generator) for _ in range(2))  # type: ignore[assignment]
    tree, beside = SequenceRows(0, 100, [0] * 6, parents=[-1, 0, 0, 1, 2, 4]), SequenceRows(1, 220, [0] * 6)
    beside = replace(beside, parents=[-1, 0, 1, 2, 3, 4])
    rows = tuple(torch.randn(1, h, 12, 16, generator=generator) for h in (4, 2, 2))
    alone = attended(RowPlan([tree]), cache, form, tuple(t[:, :, :6] for t in rows))
    together = attended(RowPlan([tree, beside]), cache, form, rows)
    assert torch.equal(together[:6], alone)


def test_a_plan_is_filled_up_between_base_and_draft_rows() -> None:
    sequences = [SequenceRows(0, 5, [7, 8], [Block(7, [MASK] * 3)])]
    plan = RowPlan(sequences, least_rows=9)
    assert (plan.num_rows, plan.num_base, plan.first_draft) == (9, 2, 6)
    assert plan.ids.tolist() == [7, 8, 7, 7, 7, 7, 0, 0, 0]
    assert plan.masked.tolist() == [6, 7, 8]
    assert plan.positions[0].tolist() == [5, 6, 5, 5, 5, 5, 7, 8, 9]
    assert RowPlan([SequenceRows(0, 5, [7])], least_rows=3).ids.tolist() == [7, 7, 7]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_filler_changes_nothing_but_the_order_of_addition(name: str) -> None:
    """Logits, draft hidden states and K/V of a mixed forward at `bucket`, `invariant` and `off`, fp32."""
    engine = randomise(Engine.from_model(build(name), layout=LAYOUT, exact="off"))
    found = []
    for level in ("off", "invariant", "bucket"):
        engine.backend.hold(level, None if level == "off" else GROUPED, {"off": 1, "invariant": 2, "bucket": 24}[level])
        cache = engine.backend.new_cache(2, 40)
        with torch.inference_mode():
            prompt = SequenceRows(0, 0, PROMPTS[1], last_logits_only=True)
            engine.backend.forward(engine.backend.row_plan([prompt]), cache)
            blocks = [Block(9, [MASK] * 4), Block(10, [MASK] * 4)]
            mixed = engine.backend.row_plan([SequenceRows(1, 0, PROMPTS[3][:3]), SequenceRows(0, 7, [1, 2, 3], blocks)])
            out = engine.backend.forward(mixed, cache)
            projected = engine.backend.head(out.draft_hidden)
        kept = [t[0, :, :10] for layer in cache.layers.values() for t in layer]
        torch.testing.assert_close(out.draft_logits, projected, rtol=1e-3, atol=1e-4)
        found.append([out.base_logits, out.base_hidden, out.draft_hidden, out.draft_logits, *kept])
        assert mixed.num_rows == {"off": 14, "invariant": 14, "bucket": 24}[level]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_draft_rows_join_the_base_rows_vocabulary_projection_where_they_are_few() -> None:
    """Not in diffusion, whose forwards have no base row; in a bucket always, which has its rows anyway."""
    engine = randomise(Engine.from_model(build("llama"), layout=LAYOUT, exact="off"))
    backend, rows = engine.backend, []
    projected = backend.head.project
    backend.head.project = lambda hidden: (rows.append(len(hidden)), projected(hidden))[1]
    few, many = ([Block(2, [MASK] * 4)] * n for n in (8, 9))
    with torch.inference_mode():
        for held, tokens, blocks, joined, count in (
            (("off", None), [1], few, True, 33),
            (("off", None), [1], many, False, 1),
            (("off", None), [], [Block(1, [MASK] * 4)], False, 1),
            (("bucket", GROUPED, 48), [1], many, True, 48),
        ):
            backend.hold(*held)
            cache = backend.new_cache(1, 16)
            backend.forward(backend.row_plan([SequenceRows(0, 0, [5])]), cache)
            out = backend.forward(backend.row_plan([SequenceRows(0, 1, tokens, blocks)]), cache)
            assert (out.draft_logits is not None, rows.pop()) == (joined, count)
            assert out.draft_hidden.shape[0] == 4 * len(blocks) and len(out.base_logits) == len(tokens)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision_texts_are_those_of_ar_at_the_level_that_holds(name: str, monkeypatch: Any) -> None:
    engine = randomise(Engine.from_model(build(name).to(torch.bfloat16), layout=LAYOUT))
    if engine.backend.exact == "off":
        pytest.skip(f"on this machine {engine.settled.why}")
    for sampling in ({}, {"temperature": 0.8}):
        options = {"max_new_tokens": NEW, "seed": 3, "ignore_eos": True, **sampling}
        truth = tokens_of(engine, PROMPTS, "ar", batch_size=1, **options)
        assert tokens_of(engine, PROMPTS, "ar", batch_size=4, **options) == truth
        Oracle({3 + i: text for i, text in enumerate(truth)}).plant(monkeypatch)
        for way in (
            {"strategy": "two_forward"},
            {"strategy": "fused", "tree": 0},
            {"strategy": "fused", "tree": 9},
            {"strategy": "hybrid"},
        ):
            for batch in (1, 3):
                got = tokens_of(
                    engine, PROMPTS, "self_spec", **{"strategy": "fused", **way}, batch_size=batch, **options
                )
                assert got == truth, (sampling, way, batch)
        monkeypatch.undo()


def test_bucket_cuts_plans_to_its_rows_and_holds_them(monkeypatch: Any) -> None:
    engine = Engine.from_model(build("llama").to(torch.bfloat16), layout=LAYOUT, exact="off")
    settle(engine.backend, "bucket", LAYOUT.drafts, rows=12)
    seen = []
    forward = engine.backend.forward
    monkeypatch.setattr(engine.backend, "forward", lambda plan, cache: seen.append(plan) or forward(plan, cache))
    options = {"max_new_tokens": NEW, "ignore_eos": True}
    truth = tokens_of(engine, PROMPTS, "ar", batch_size=1, **options)
    for way in (
        {"strategy": "two_forward"},
        {"strategy": "fused"},
        {"strategy": "auto"},
        {"strategy": "fused", "tree": 6},
    ):
        for batch in (1, 2, 4):
            assert tokens_of(engine, PROMPTS, "self_spec", **way, batch_size=batch, **options) == truth
    decoding = [plan for plan in seen if not plan.sequences[0].last_logits_only]
    assert {plan.num_rows for plan in decoding} == {12}


@pytest.mark.parametrize("strategy", ["fused", "two_forward"])
def test_where_nothing_fits_beside_a_block_drafts_are_verified_in_turn_with_it(strategy: str) -> None:
    engine = Engine.from_model(build("llama").to(torch.bfloat16), layout=LAYOUT, exact="off")
    engine.backend.hold("bucket", GROUPED, 1 + LAYOUT.block)
    options = {"max_new_tokens": NEW, "ignore_eos": True, "batch_size": 1}
    truth = tokens_of(engine, PROMPTS, "ar", **options)
    results = engine.generate(PROMPTS, strategy=strategy, **options)
    assert [result.tokens for result in results] == truth
    for forwards in (result.stats.forwards for result in results):
        assert forwards["verify"] > 1 and abs(forwards["draft"] - forwards["verify"]) <= 1


def test_prompts_run_alone_where_a_level_is_kept() -> None:
    engine = Engine.from_model(build("llama").to(torch.bfloat16), layout=LAYOUT, exact="off")
    assert not engine.backend.prefill_alone
    engine.backend.hold("invariant", GROUPED, 2)
    assert engine.backend.prefill_alone and engine.backend.least_rows == 2 and engine.backend.most_rows is None


def test_auto_tests_half_precision_only_and_says_why() -> None:
    engine = Engine.from_model(build("llama"), layout=LAYOUT)
    assert engine.backend.exact == engine.settled.level == "off"
    assert "float32" in engine.settled.why
    with pytest.raises(UsageError, match="does not exist"):
        Engine.from_model(build("llama"), exact="exactly")


def other_rows(rows: int, x: Tensor) -> Tensor:
    """What a careless kernel does to a result: something that depends on how many rows there are."""
    return x * (1 + rows / 1024)


def faulty_product(monkeypatch: Any) -> str:
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: other_rows(x.numel() // x.shape[-1], linear(x, w, b)))
    return "q_proj, o_proj"


def faulty_attention(monkeypatch: Any) -> str:
    product, part = exact_attention._product, base_rows.part
    monkeypatch.setattr(exact_attention, "_product", lambda a, b, form: other_rows(a.shape[2], product(a, b, form)))

    def other_part(rows: Tensor, *rest: Any) -> Part:
        made = part(rows, *rest)
        return Part(other_rows(rows.shape[2], made.out), made.sums)

    monkeypatch.setattr(base_rows, "part", other_part)
    return "attention"


def faulty_norm(monkeypatch: Any) -> str:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: other_rows(x.shape[-2], norm(self, x)))
    return "decoder"


def faulty_tree(monkeypatch: Any) -> str:
    for module in (exact_attention, parts):
        tree = module.tree_attention
        monkeypatch.setattr(module, "tree_attention", lambda *a, tree=tree: tree(*a) * 1.01)
    return "attention"


@pytest.mark.parametrize("plant", [faulty_product, faulty_attention, faulty_norm, faulty_tree])
def test_the_self_test_names_what_depends_on_other_rows(plant: Any, monkeypatch: Any) -> None:
    engine = Engine.from_model(build("llama").to(torch.bfloat16), layout=LAYOUT, exact="off")
    what = plant(monkeypatch)
    checks = self_test(engine.backend, "invariant", LAYOUT.drafts)
    assert what in [check.what for check in checks if not check.equal]
    with pytest.raises(GateError, match="depend on the rows beside it"):
        settle(engine.backend, "invariant", LAYOUT.drafts)
    assert engine.backend.exact == "off" and engine.backend.form is None


def test_the_self_test_finds_the_same_as_often_as_it_looks(monkeypatch: Any) -> None:
    """It looks once for each number of threads that steps run with, and what it wrote the first time stands there."""
    engine = Engine.from_model(build("llama").to(torch.bfloat16), layout=LAYOUT, exact="off")
    once = self_test(engine.backend, "invariant", LAYOUT.drafts)
    assert all(check.equal for check in once)
    for module in (exact_attends, exact_products, exact_rows):
        monkeypatch.setattr(module, "work_sizes", lambda device: (LEAST_WORK,) * 3)
    assert self_test(engine.backend, "invariant", LAYOUT.drafts) == once


def test_a_product_that_depends_on_the_number_of_rows_leaves_the_bucket(monkeypatch: Any) -> None:
    engine = Engine.from_model(build("llama").to(torch.bfloat16), layout=LAYOUT, exact="off")
    faulty_product(monkeypatch)
    assert settle(engine.backend, "auto", LAYOUT.drafts).level == "bucket"
    assert engine.backend.most_rows == engine.backend.least_rows == exact_rows.CPU_BUCKET_ROWS


def test_rows_are_filled_up_to_what_the_products_need(monkeypatch: Any) -> None:
    """A library that treats up to 17 rows in another way leaves a floor of 32."""
    engine = Engine.from_model(build("llama").to(torch.bfloat16), layout=LAYOUT, exact="off")
    assert settle(engine.backend, "auto", LAYOUT.drafts).level == "invariant"
    needed = engine.backend.least_rows  # by this machine's own
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: linear(x, w, b) + (x.numel() // x.shape[-1] <= 17))
    assert settle(engine.backend, "auto", LAYOUT.drafts).level == "invariant"
    assert engine.backend.least_rows == 32 >= needed


def test_no_level_is_claimed_where_none_holds(monkeypatch: Any) -> None:
    engine = Engine.from_model(build("llama").to(torch.bfloat16), layout=LAYOUT, exact="off")
    linear, calls = F.linear, iter(range(1 << 30))
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: linear(x, w, b) + next(calls) % 7)
    settled = settle(engine.backend, "auto", LAYOUT.drafts)
    assert settled.level == engine.backend.exact == "off" and "no level holds" in settled.why


def test_a_router_whose_product_depends_on_its_rows_gets_them_in_tiles(monkeypatch: Any) -> None:
    """Only in our forwards: the live model's own keeps its bits."""
    model = build("deepseek_v3").to(torch.bfloat16)
    router = next(m for n, m in model.named_modules() if n.endswith("mlp.gate"))
    plain = type(router).forward

    def faulty(self: Any, x: Tensor) -> Any:
        scores, *rest = plain(self, x)
        return other_rows(x.numel() // x.shape[-1], scores), *rest

    monkeypatch.setattr(type(router), "forward", faulty)
    ids = torch.tensor([PROMPTS[2]])
    before = model(ids).logits
    engine = Engine.from_model(model, layout=LAYOUT, exact="off")
    settled = settle(engine.backend, "auto", LAYOUT.drafts)
    assert settled.level == "invariant", settled
    assert any("tiles" in check.shape for check in settled.checks)
    assert torch.equal(model(ids).logits, before)
    wrapped = router.forward
    assert settle(engine.backend, "auto", LAYOUT.drafts).level == "invariant"
    assert router.forward is wrapped, "a second test leaves it as it is"
    engine.close()
    assert "forward" not in router.__dict__


def test_experts_in_a_list_are_promised_nothing_by_a_bucket() -> None:
    """They get as many rows as were sent to them; at `invariant` their products are filled up themselves."""
    model = build("llama").to(torch.bfloat16)
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    engine = Engine.from_model(model, layout=LAYOUT, exact="off")
    checks = self_test(engine.backend, "bucket", LAYOUT.drafts, rows=8)
    assert [check.what for check in checks if not check.equal] == ["experts"]
    assert all(check.equal for check in self_test(engine.backend, "invariant", LAYOUT.drafts))
    seen = []
    layer = engine.backend.products["layers.0.experts.0"]
    layer._own = lambda x: seen.append(len(x)) or x  # type: ignore[method-assign]
    engine.backend.gate.base_rows = 1
    layer(torch.zeros(1, 2))
    engine.backend.gate.base_rows = None
    assert seen == [engine.backend.least_rows]
