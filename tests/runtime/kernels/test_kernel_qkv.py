"""Bias, LoRA, q/k norm, rotation, K/V store: against the reference, and a base row's bits against its surroundings."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from retrofit.runtime.kernels import reference
from retrofit.runtime.kernels.qkv import qkv
from retrofit.runtime.kernels.rows import PAGE, Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPSILON = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
PAGES, POSITIONS = 3, 40


def make_rows(num_base, num_draft, padded=None):
    """Rows at random positions and different places; the kernel reads counts, positions and places alone."""
    padded = num_base + num_draft if padded is None else padded
    nothing = torch.zeros(0, device=DEVICE)
    positions = torch.randint(0, POSITIONS, (padded,), device=DEVICE)
    places = torch.randperm(PAGES * PAGE)[:num_base].to(DEVICE)
    return Rows(
        num_base, num_draft, padded, ids=nothing, positions=positions, slots=nothing, limits=nothing, places=places,
        low=nothing, high=nothing, tile_first=nothing, tile_count=nothing, base_tiles=0,
    )  # fmt: skip


@dataclass
class Layer:
    """What a layer gives to the kernel, and the K/V cache of three layers of which it is the middle one."""

    heads: tuple[int, int, int]
    bias: Tensor | None
    norms: tuple[Tensor, Tensor] | None
    cos: Tensor
    sin: Tensor
    up: Tensor | None
    cache: Tensor
    dtype: torch.dtype

    def run(self, function, parts, rows):
        """(q, draft k, draft v, keys, values), the last two of all layers and as they stand afterwards."""
        # Pages before layers: a layer's pages do not follow each other in memory.
        cache = self.cache.clone()
        keys, values = cache[0, :, 1], cache[1, :, 1]
        out = function(
            parts, self.heads, self.bias, self.norms, 1e-6, self.cos, self.sin, self.up, rows, keys, values, self.dtype
        )
        return *out, cache[0], cache[1]

    def parts(self, rows, splits=3):
        """The product of the layer's rows, padding rows NaN."""
        Hq, Hkv, D = self.heads
        rank = 0 if self.up is None else self.up.shape[0]
        parts = torch.randn(splits, rows.padded, (Hq + 2 * Hkv) * D + 3 * rank, device=DEVICE)
        parts[:, rows.num_rows :] = torch.nan
        return parts


def make_layer(heads=(2, 1, 16), dtype=torch.bfloat16, bias=False, norms=False, rank=0):
    Hq, Hkv, D = heads
    N = (Hq + 2 * Hkv) * D

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)

    angles = torch.rand(POSITIONS, D // 2, device=DEVICE) * 6
    angles = torch.cat([angles, angles], dim=1)
    return Layer(
        heads,
        random(N) if bias else None,
        (random(D), random(D)) if norms else None,
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        random(rank, N, scale=0.3) if rank else None,
        torch.full((2, PAGES, 3, Hkv, PAGE, D), torch.nan, dtype=dtype, device=DEVICE),
        dtype,
    )


def assert_agree(got, expected, num_rows, exact):
    """exact: every bit.  Otherwise sums (a norm's, a dot product's) may have been added in another order."""
    for name, a, b in zip(("q", "draft k", "draft v", "keys", "values"), got, expected, strict=True):
        if name == "q":
            a, b = a[:num_rows], b[:num_rows]
        assert a.shape == b.shape and a.dtype == b.dtype
        if exact:
            assert torch.equal(a.nan_to_num(1e4), b.nan_to_num(1e4)), name
            continue
        # A bit turned before the rotation turns one or two after it.
        epsilon = EPSILON[b.dtype]
        torch.testing.assert_close(a, b, rtol=2 * epsilon, atol=4 * epsilon, equal_nan=True)
        if b.dtype != torch.float32 and b.numel():
            assert ((a == b) | a.isnan()).float().mean() >= 0.97, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "num_base", "num_draft", "bias", "norms", "rank"),
    [
        ((4, 2, 16), 5, 0, False, False, 0),
        ((2, 1, 12), 0, 17, False, False, 0),
        ((2, 1, 12), 18, 3, True, True, 4),
        ((3, 1, 64), 3, 4, True, False, 20),
        ((1, 1, 64), 17, 2, False, True, 0),
        ((2, 1, 128), 2, 3, False, True, 16),
        ((2, 1, 128), 3, 0, True, False, 4),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_computes_the_reference(dtype, heads, num_base, num_draft, bias, norms, rank):
    layer = make_layer(heads, dtype, bias, norms, rank)
    rows = make_rows(num_base, num_draft, num_base + num_draft + 2)
    parts = layer.parts(rows)
    got, expected = layer.run(qkv, parts, rows), layer.run(reference.qkv, parts, rows)
    assert_agree(got, expected, rows.num_rows, exact=not norms and not rank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_takes_one_finished_product_in_the_models_dtype(dtype):
    layer, rows = make_layer(dtype=dtype, rank=4), make_rows(4, 5)
    parts = layer.parts(rows, splits=1).to(dtype)
    assert_agree(layer.run(qkv, parts, rows), layer.run(reference.qkv, parts, rows), 9, exact=False)


@pytest.mark.parametrize("splits", [1, 4])
def test_base_rows_have_the_same_bits_whatever_stands_around_them(splits):
    layer, rows = make_layer(heads=(2, 1, 12), bias=True, norms=True, rank=4), make_rows(21, 18)
    parts = layer.parts(rows, splits)
    q, _, _, keys, values = layer.run(qkv, parts, rows)

    def stored(cache, places):
        return cache[places // PAGE, 1, :, places % PAGE]

    def same(found, chosen):
        picked = rows.places[chosen]
        assert torch.equal(found[0][: len(chosen)], q[chosen])
        assert torch.equal(stored(found[3], picked), stored(keys, picked))
        assert torch.equal(stored(found[4], picked), stored(values, picked))

    for row in (0, 7, 20):
        chosen = torch.tensor([row], device=DEVICE)
        alone = replace(make_rows(1, 0), positions=rows.positions[chosen], places=rows.places[chosen])
        same(layer.run(qkv, parts[:, chosen], alone), chosen)
        # A kernel of its own: compiled without LoRA.
        same(replace(layer, up=None).run(qkv, parts[:, chosen], alone), chosen)
    order = torch.randperm(21).to(DEVICE)
    moved = replace(
        make_rows(21, 3),
        positions=torch.cat([rows.positions[order], rows.positions[21:24]]),
        places=rows.places[order],
    )
    same(layer.run(qkv, torch.cat([parts[:, order], parts[:, 21:24]], dim=1), moved), order)


def test_nan_in_the_adapter_reaches_draft_rows_only():
    layer, rows = make_layer(norms=True, rank=4), make_rows(18, 5)
    parts = layer.parts(rows)
    clean = layer.run(qkv, parts, rows)
    parts[..., -12:] = torch.nan
    got = replace(layer, up=torch.full_like(layer.up, torch.nan)).run(qkv, parts, rows)
    assert torch.equal(got[0][:18], clean[0][:18])
    for i in (3, 4):
        assert torch.equal(got[i].nan_to_num(1e4), clean[i].nan_to_num(1e4))
    assert all(t.isnan().all() for t in (got[0][18:], got[1], got[2]))


def test_q_k_and_v_each_have_their_own_lora():
    layer, rows = make_layer(rank=4), make_rows(0, 3)
    parts = layer.parts(rows)
    clean = layer.run(qkv, parts, rows)
    for role in range(3):
        spoiled = parts.clone()
        start = parts.shape[2] - 12 + 4 * role
        spoiled[..., start : start + 4] = torch.nan
        for i, (a, b) in enumerate(zip(layer.run(qkv, spoiled, rows)[:3], clean[:3], strict=True)):
            assert a.isnan().all() if i == role else torch.equal(a, b)


def test_nan_in_one_row_stays_there():
    layer, rows = make_layer(norms=True, rank=4), make_rows(18, 5)
    parts = layer.parts(rows)
    clean = layer.run(qkv, parts, rows)
    parts[:, [2, 20]] = torch.nan
    got = layer.run(qkv, parts, rows)
    others = [row for row in range(23) if row not in (2, 20)]
    assert torch.equal(got[0][others], clean[0][others]) and got[0][[2, 20]].isnan().all()
    assert torch.equal(got[1][[0, 1, 3, 4]], clean[1][[0, 1, 3, 4]]) and got[1][2].isnan().all()


def test_writes_the_places_it_is_given_and_no_others():
    layer, rows = make_layer(heads=(2, 2, 12), rank=4), make_rows(20, 3)
    rows.places[[0, 5, 19]] = -1
    _, _, _, keys, values = layer.run(qkv, layer.parts(rows), rows)
    expected = torch.zeros(PAGES, 3, 2, PAGE, 12, dtype=torch.bool, device=DEVICE)
    for place in rows.places[rows.places >= 0].tolist():
        expected[place // PAGE, 1, :, place % PAGE] = True
    assert torch.equal(~keys.isnan(), expected) and torch.equal(~values.isnan(), expected)


@pytest.mark.usefixtures("poisoned_memory")
def test_padding_rows_are_not_written():
    layer, rows = make_layer(rank=4), make_rows(3, 2, padded=9)
    q, draft_k, draft_v, _, _ = layer.run(qkv, layer.parts(rows).nan_to_num(1.0), rows)
    assert q[:5].isfinite().all() and q[5:].isnan().all()
    assert draft_k.isfinite().all() and draft_v.isfinite().all()


def test_no_rows_at_all_touch_nothing():
    layer, rows = make_layer(rank=4), make_rows(0, 0, padded=2)
    _, draft_k, draft_v, keys, values = layer.run(qkv, layer.parts(rows), rows)
    assert len(draft_k) == len(draft_v) == 0 and keys.isnan().all() and values.isnan().all()
