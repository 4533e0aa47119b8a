"""The self-test of the exactness levels: it passes what is exact, and reports every planted dependence on other rows.

A fault is a wrapper around one kernel that adds something to its result: a dependence that no compiler of ours would
produce on the CPU, but that libraries and careless launchers do produce on GPUs.
"""

from __future__ import annotations

import pytest
import torch
from decoding import randomise
from tiny_models import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import GateError
from retrofit.runtime.backends.fused import backend as fused_gqa
from retrofit.runtime.backends.fused import self_test as exact
from retrofit.runtime.backends.fused import weights
from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.backends.fused.self_test import Check, Size, demand, self_test
from retrofit.runtime.engine import Engine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUT = DraftLayout(block=2)
CHAIN = 1 + LAYOUT.drafts
BUCKET = 8
SMALL = Size(counts=(1, 2, 7), context=96, split=64, prompt=3, alone=2)
SHAPES = ["qkv", "o, down", "gate_up", "vocabulary"]  # o and down have one shape here


@pytest.fixture(scope="module")
def parts():
    """Config, weights, heads and adapter of one layer, in which every value matters."""
    return made("qwen3", num_hidden_layers=1)


def made(name: str, **changes):
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**changes), dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + 1 if "norm" in key else noise)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attached = randomise(Engine.from_model(model, layout=LAYOUT)).attached
    return model.config, state, attached.heads, attached.adapter_state()


def backend(parts, level: str, rows: int = BUCKET, dtype: torch.dtype = torch.float32) -> FusedGQA:
    config, state, heads, adapter = parts
    return FusedGQA(
        config, state.__getitem__, LAYOUT, heads, adapter, device=DEVICE, exact=level, rows=rows, dtype=dtype
    )


def run(part, subject: FusedGQA, chain: int = CHAIN):
    """One part of the self-test, on a size that takes no time."""
    with torch.inference_mode():
        return part(subject, chain, SMALL, torch.Generator(DEVICE).manual_seed(0))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("level", "dtype"), [("bucket", torch.bfloat16), ("invariant", torch.float32)], ids=["bucket", "invariant"]
)
def test_a_level_holds(parts, level, dtype):
    subject = backend(parts, level, dtype=dtype)
    state = torch.get_rng_state()
    checks = self_test(subject, LAYOUT.drafts)
    assert [c.what for c in checks] == [*SHAPES, "attention", "decoder"]
    assert [c.equal for c in checks] == [True] * len(checks), checks
    assert torch.equal(torch.get_rng_state(), state)
    if level == "invariant":
        assert {c.kernel for c in checks} == {"ours"}
        assert checks[0].rows == ", ".join(map(str, sorted({1, 2, CHAIN, *size().counts})))
    else:
        assert checks[0].rows == f"1, {CHAIN}, {BUCKET} of {BUCKET}"
    demand(checks)


def size() -> Size:
    return exact.GPU if DEVICE == "cuda" else exact.INTERPRETER


# Products

LINEAR = torch.nn.functional.linear


def others(x: Tensor, out: Tensor) -> Tensor:
    """A row notices what the others hold."""
    return out + x.mean() * 1e-3


def place(x: Tensor, out: Tensor) -> Tensor:
    """A row notices where it stands."""
    return out + torch.arange(len(x), device=x.device)[:, None] * 1e-6


def number(x: Tensor, out: Tensor) -> Tensor:
    """A row notices how many there are."""
    return out + len(x) * 1e-3


def padding(x: Tensor, out: Tensor) -> Tensor:
    """0 * NaN: harmless, but for what uninitialised padding rows hold."""
    return out + 0 * x.sum()


def last_bit(x: Tensor, out: Tensor) -> Tensor:
    """One bit of one value, when a row is alone."""
    others_are_empty = not x[1:].any() or not x[1:].isfinite().any()
    if others_are_empty:
        out[..., 0, -1:].view(torch.int32).bitwise_xor_(1)
    return out


def break_library(monkeypatch, fault, outputs: int | None = None):
    """Plant a fault in the library's product, for all weights or those of so many outputs."""

    def linear(x, weight, bias=None):
        out = LINEAR(x, weight, bias)
        return fault(x, out) if outputs in (None, len(weight)) else out

    monkeypatch.setattr(weights.F, "linear", linear)


def break_ours(monkeypatch, fault):
    ours = weights.split_matmul
    monkeypatch.setattr(weights, "split_matmul", lambda x, weight, *plan: fault(x, ours(x, weight, *plan)))


@pytest.mark.parametrize("fault", [others, place, padding, last_bit])
def test_a_library_product_that_fails_is_replaced(parts, monkeypatch, fault):
    break_library(monkeypatch, fault)
    subject = backend(parts, "bucket")
    checks = run(exact.products, subject)
    assert [(c.what, c.kernel, c.equal) for c in checks] == [(what, "ours", True) for what in SHAPES]
    assert all(linear.own_kernel for linear in subject.weights.linears())


def test_only_the_shape_that_fails_is_replaced_and_all_that_have_it(parts, monkeypatch):
    subject = backend(parts, "bucket")
    layer = subject.weights.layers[0]
    break_library(monkeypatch, others, len(layer.o.weight))
    checks = run(exact.products, subject)
    assert {c.what: c.kernel for c in checks} == {what: "ours" if what == "o, down" else "library" for what in SHAPES}
    assert [m.own_kernel for m in subject.weights.linears()] == [False, True, False, True, False]


def test_one_row_count_forgives_a_product_that_depends_on_it(parts, monkeypatch):
    break_library(monkeypatch, number)
    assert {(c.kernel, c.equal) for c in run(exact.products, backend(parts, "bucket"))} == {("library", True)}


@pytest.mark.parametrize("fault", [others, place, number, last_bit])
def test_off_reports_and_changes_nothing(parts, monkeypatch, fault):
    break_library(monkeypatch, fault)
    subject = backend(parts, "off")
    checks = run(exact.products, subject)
    assert [(c.what, c.kernel, c.equal) for c in checks] == [(what, "library", False) for what in SHAPES]
    assert not any(linear.own_kernel for linear in subject.weights.linears())


@pytest.mark.parametrize("fault", [others, place, number, last_bit])
def test_invariant_finds_a_fault_in_our_kernel(parts, monkeypatch, fault):
    break_ours(monkeypatch, fault)
    checks = run(exact.products, backend(parts, "invariant"))
    assert {(c.kernel, c.equal) for c in checks} == {("ours", False)}
    with pytest.raises(GateError, match=r"qkv \[\d+, 32\]: .* a row's bits depend") as caught:
        demand(checks)
    assert "exact='invariant'" in caught.value.hint
    assert "exact='off'" in caught.value.hint


def test_bucket_says_so_when_neither_kernel_holds(parts, monkeypatch):
    break_library(monkeypatch, others)
    break_ours(monkeypatch, others)
    checks = run(exact.products, backend(parts, "bucket"))
    assert {(c.kernel, c.equal, c.rows) for c in checks} == {("ours", False, f"1 of {BUCKET}")}


def test_a_bias_makes_a_shape_of_its_own():
    checks = run(exact.products, backend(made("qwen2", num_hidden_layers=1), "bucket"))
    assert ["bias" in c.shape for c in checks] == [c.what == "qkv" for c in checks]


# Attention


def test_attention_is_tried_with_every_window_of_the_model():
    checks = run(exact.attention, backend(made("qwen2_window"), "invariant"), chain=1)
    assert [("window" in c.shape, c.equal) for c in checks] == [(False, True), (True, True)]


ATTENTION_FAULTS = {
    "slot": (lambda rows, table: rows.slots[:, None], "another slot"),
    "rows": (lambda rows, table: rows.num_rows, "a row alone"),
    "draft rows": (lambda rows, table: rows.num_draft, "a row alone"),
    "tiles": (lambda rows, table: rows.base_tiles, "another sequence"),
    "place": (lambda rows, table: torch.arange(rows.padded, device=DEVICE)[:, None], "a row alone"),
    "capacity": (lambda rows, table: table.shape[1], "a larger cache"),
}


@pytest.mark.parametrize("fault", ATTENTION_FAULTS)
def test_attention_that_depends_on_what_is_beside_a_row(parts, monkeypatch, fault):
    added, seen_with = ATTENTION_FAULTS[fault]
    attend = exact.row_attention

    def faulty(query, keys, values, table, draft_key, draft_value, rows, *more, **options):
        out = attend(query, keys, values, table, draft_key, draft_value, rows, *more, **options)
        return out + added(rows, table) * 1e-3

    monkeypatch.setattr(exact, "row_attention", faulty)
    (check,) = run(exact.attention, backend(parts, "invariant"))
    assert (check.equal, check.rows) == (False, seen_with)
    with pytest.raises(GateError, match="attention"):
        demand([check])


# Decoder


@pytest.mark.parametrize("rows", [1, CHAIN + 1, CHAIN + 1 + LAYOUT.block])
def test_a_decoder_in_any_bucket(parts, rows):
    subject = backend(parts, "bucket", rows)
    run(exact.products, subject, min(CHAIN, rows))
    check = run(exact.decoder, subject, min(CHAIN, rows))
    assert check.equal, check
    assert ("draft rows" in check.rows) == (rows == CHAIN + 1 + LAYOUT.block)
    assert ("a tree" in check.rows) == (rows >= 3)


def test_a_norm_that_depends_on_the_rows_shows_in_the_decoder(parts, monkeypatch):
    norm = fused_gqa.add_rms_norm

    def faulty(sums, residual, weight, eps, up, rows, bias=None):
        residual, normed = norm(sums, residual, weight, eps, up, rows, bias)
        return residual, normed + rows.num_rows * 1e-3

    monkeypatch.setattr(fused_gqa, "add_rms_norm", faulty)
    check = run(exact.decoder, backend(parts, "bucket"))
    assert (check.equal, check.rows) == (False, f"{CHAIN} together beside draft rows")


def test_a_tree_that_reads_its_siblings_shows_in_the_decoder(parts, monkeypatch):
    attend = fused_gqa.row_attention

    def faulty(*arguments, **options):
        rows = arguments[6]
        rows.starts = rows.paths = None
        return attend(*arguments, **options)

    monkeypatch.setattr(fused_gqa, "row_attention", faulty)
    check = run(exact.decoder, backend(parts, "invariant"))
    assert (check.equal, check.rows) == (False, "a tree")


def test_an_adapter_that_leaks_shows_in_the_decoder(parts, monkeypatch):
    swiglu = fused_gqa.swiglu

    def leaking(sums, width, up, rows, dtype, bias):
        """The second base row receives something of a draft row."""
        out = swiglu(sums, width, up, rows, dtype, bias)
        if rows.num_draft:
            out[1] += out[rows.num_base] * 1e-3
        return out

    monkeypatch.setattr(fused_gqa, "swiglu", leaking)
    check = run(exact.decoder, backend(parts, "invariant"))
    assert (check.equal, check.rows) == (False, f"{CHAIN} together beside draft rows")


def test_demand_names_the_first_that_differs():
    checks = [Check(what, "[2, 2]", "library", "1 of 8", equal) for what, equal in (("a", True), ("b", False))]
    demand(checks[:1])
    with pytest.raises(GateError, match=r"^b \[2, 2\]: .*kernel: library; seen with: 1 of 8"):
        demand(checks)
