"""The paged K/V cache: pages are given, taken back and never shared; a tree's rows reach their final places."""

import random

import pytest
import torch
from fused_models import DEVICE, LAYOUT, pair, small

from retrofit.errors import ResourceError, UsageError
from retrofit.runtime.backends.fused.paged import HEADROOM, PagedCache, pages_for
from retrofit.runtime.kernels.rows import PAGE


def cache(slots: int = 2, capacity: int = 4 * PAGE, pages: int | None = None) -> PagedCache:
    count = slots * pages_for(capacity) if pages is None else pages
    return PagedCache((2, 3, 4), slots, capacity, count, torch.float32, torch.device(DEVICE))


def owned(made: PagedCache) -> list[int]:
    return [page for pages in made.owned.values() for page in pages]


def test_pages_hold_the_sequence_and_the_headroom_of_a_tree() -> None:
    assert pages_for(1) == -(-(1 + HEADROOM) // PAGE)
    for positions in (1, PAGE - 1, PAGE, PAGE + 1, 1000):
        assert positions + HEADROOM <= pages_for(positions) * PAGE < positions + HEADROOM + PAGE


def test_no_page_belongs_to_two_sequences_or_is_lost() -> None:
    rng, made = random.Random(0), cache(slots=4)
    for _ in range(200):
        slot = rng.randrange(4)
        if rng.random() < 0.7:
            positions = rng.randint(1, 4 * PAGE)
            made.open(slot, positions)
            assert len(made.owned[slot]) == pages_for(positions)
        else:
            made.close(slot)
        assert sorted(owned(made) + made.free) == list(range(made.pages))
        for kept, pages in made.owned.items():
            assert made.table[kept][: len(pages)] == pages
            assert made.block_table[kept, : len(pages)].tolist() == pages
    made.release()
    assert sorted(made.free) == list(range(made.pages)) and not made.owned


def test_places_of_positions() -> None:
    made = cache()
    made.open(0, 1)
    made.close(0)
    made.open(1, 3 * PAGE)
    made.open(0, 3 * PAGE)
    for slot in (0, 1):
        pages = made.owned[slot]
        positions = [0, 1, PAGE - 1, PAGE, 2 * PAGE + 5, 3 * PAGE + HEADROOM - 1]
        assert made.places(slot, positions) == [pages[p // PAGE] * PAGE + p % PAGE for p in positions]
    every = [place for slot in (0, 1) for place in made.places(slot, range(3 * PAGE + HEADROOM))]
    assert len(set(every)) == len(every)


def test_a_tree_is_stored_along_its_path() -> None:
    """Two sequences, one over the border of a page; a place is read before another row comes to it."""
    made = cache()
    for slot in (0, 1):
        made.open(slot, 2 * PAGE)
    generator = torch.Generator().manual_seed(0)
    for kept in (made.keys, made.values):
        kept.copy_(torch.randn(kept.shape, generator=generator))
    before = [made.keys.clone(), made.values.clone()]
    starts, sizes = {0: PAGE - 2, 1: 7}, {0: 5, 1: 4}
    places = [place for slot in (0, 1) for place in made.places(slot, range(starts[slot], starts[slot] + sizes[slot]))]
    made.staged = torch.tensor(places, device=DEVICE)
    kept = [(0, 0), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 3)]
    rows = [row + 5 * slot for slot, row in kept]
    slots = [slot for slot, _ in kept]
    targets = [starts[0] + i for i in range(4)] + [starts[1] + i for i in range(3)]
    made.store(*(torch.tensor(values, device=DEVICE) for values in (rows, slots, targets)))
    assert made.staged is None
    moved = {made.place(slot, target): places[row] for slot, target, row in zip(slots, targets, rows, strict=True)}
    for after, old in zip((made.keys, made.values), before, strict=True):
        for place in range(made.pages * PAGE):
            source = moved.get(place, place)
            want = old[:, source // PAGE, :, source % PAGE]
            assert torch.equal(after[:, place // PAGE, :, place % PAGE], want)


def test_a_sequence_that_does_not_fit() -> None:
    made = cache(pages=5)
    made.open(0, PAGE)
    with pytest.raises(ResourceError, match=r"a request of 65 tokens needs 4 pages of the K/V cache; 2 are free"):
        made.open(1, PAGE + 1)
    assert 1 not in made.owned and len(made.free) == 2
    made.close(0)
    made.open(1, PAGE + 1)
    with pytest.raises(ResourceError, match=r"a request of 257 tokens needs 7 pages"):
        made.open(0, 4 * PAGE + 1)


def test_a_pool_that_does_not_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**20, 2**30))
    with pytest.raises(
        ResourceError, match=r"cache of 2 requests of up to 4096 tokens needs 0\.5 GiB, 0\.0 GiB of cuda"
    ):
        PagedCache((32, 8, 128), 2, 4096, 64, torch.bfloat16, torch.device("cuda"))


def test_a_backend_gives_its_cache_again_when_it_is_large_enough() -> None:
    backend = pair(small("llama", num_hidden_layers=1), LAYOUT)[0].backend
    first = backend.new_cache(2, 100)
    first.open(0, 50)
    meanwhile = backend.new_cache(1, 10)
    assert meanwhile is not first
    meanwhile.release()
    first.release()
    assert backend.new_cache(1, 60) is first and not first.owned
    first.release()
    larger = backend.new_cache(2, 1000)
    assert larger is not first and larger.capacity >= 1000
    larger.release()
    assert backend.new_cache(2, 100) is larger


def test_a_call_gives_its_pages_back_however_it_ends() -> None:
    engine, _ = pair(small("llama", num_hidden_layers=1), LAYOUT)
    assert len(engine.generate([[1, 2], [3]], "ar", max_new_tokens=3)) == 2
    first = engine.backend.cache
    assert not first.owned and not first.leased
    stream = engine.stream([[1, 2]], "ar", max_new_tokens=3)
    next(stream)
    stream.close()
    assert not first.owned and not first.leased
    with pytest.raises(UsageError):
        engine.generate([[]], "ar")
    assert not first.leased
    assert engine.generate([[1, 2]], "ar", max_new_tokens=2)[0].finish_reason == "length"
    assert engine.backend.cache is first
