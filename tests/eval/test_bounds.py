"""Rooflines, costs by rows and projections, worked by hand and on a known clock."""

import time

import fused_models
import pytest
import torch
from fused_models import pair, plain_decoder, plain_sampling
from tiny_models import build

from retrofit.errors import ResourceError
from retrofit.eval.bounds import rowcost
from retrofit.eval.bounds.projection import DEVICES, Line, Place, errors, fitted, kept, scaled
from retrofit.eval.bounds.roofline import Need, Speeds, least_seconds, multiply_speed, needed, read_speed
from retrofit.eval.bounds.rowcost import Cost, drafting, row_costs
from retrofit.eval.latency import Timeline
from retrofit.runtime.engine import Engine

NEED = Need(numbers=1000, bytes=4000)
HERE = Speeds(read=4000.0, multiply=20_000.0)  # a second to read, a tenth of one for each row


def test_a_step_is_bound_by_the_longer_of_two_times():
    assert least_seconds(NEED, HERE, 1) == 1.0
    assert least_seconds(NEED, HERE, 10) == 1.0
    assert least_seconds(NEED, HERE, 30) == 3.0


def test_a_line_is_found_and_goes_elsewhere_in_two_ways():
    costs = [Cost(rows, 1.5 + 0.25 * rows) for rows in (1, 2, 8, 32)]
    line, here = fitted(costs), Place.of(NEED, HERE)
    assert (line.fixed, line.row) == (pytest.approx(1.5), pytest.approx(0.25))
    assert here == (1.0, 0.1)  # so 0.5 of a step and 0.15 of a row are not explained
    # Twice the bandwidth, four times the products.
    there = Place.of(NEED, Speeds(8000.0, 80_000.0))
    assert kept(line, here, there, 8) == pytest.approx(0.5 + 0.5 + 8 * (0.15 + 0.025))
    assert scaled(line, here, there, 8) == pytest.approx(1.5 / 2 + 8 * 0.25 / 4)
    # Half the bytes are read in half the time.
    assert Place.of(Need(1000, 2000), HERE) == (0.5, 0.1)
    # Projected onto where it was measured, it is what was measured.
    for way in (kept, scaled):
        assert [way(line, here, here, cost.rows) for cost in costs] == pytest.approx([cost.seconds for cost in costs])


def test_no_part_is_below_0():
    assert fitted([Cost(1, 3.0), Cost(2, 2.0)]) == Line(pytest.approx((1 / 3 + 1 / 2) / (1 / 9 + 1 / 4)), 0.0)
    assert fitted([Cost(1, 1.0), Cost(2, 4.0)]) == Line(0.0, pytest.approx((1 + 1 / 2) / (1 + 1 / 4)))
    fast = Line(0.5, 0.05)  # faster than the speeds that were measured: all of it is explained
    assert kept(fast, Place(1.0, 0.1), Place(0.5, 0.025), 8) == pytest.approx(0.5 + 8 * 0.025)
    with pytest.raises(ValueError, match="two different numbers of rows"):
        fitted([Cost(1, 0.2)])


def test_errors_are_of_what_was_measured():
    assert errors([1.0, 3.0, 2.0], [2.0, 2.0, 2.0]) == (50.0, 50.0)
    assert errors([1.0, 2.0, 2.0], [2.0, 2.0, 2.0]) == (0.0, 50.0)


def test_published_figures_are_of_dense_products():
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    for device in DEVICES:
        # Below 100 rows every one of them is bound by reading: all have more than 100 operations a byte.
        assert 100 < device.speeds.multiply / device.speeds.read < 500 and device.source


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_once(tied):
    model = build("llama")
    table = model.get_input_embeddings().weight.numel()
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied != is_tied:
        model.get_output_embeddings().weight = (
            model.get_input_embeddings().weight if tied else torch.nn.Parameter(torch.zeros(table).view(-1, 32))
        )
    own = sum(p.numel() for p in model.parameters())
    with Engine.from_model(model, exact="off") as engine:
        need = needed(engine)
    assert need.numbers == own - (0 if tied else table)
    assert (need.bytes, need.flop(3)) == (4 * need.numbers, 6 * need.numbers)


def test_a_machine_has_speeds():
    assert read_speed(1 << 16, torch.device("cpu")) > 0 and multiply_speed(torch.float32, torch.device("cpu")) > 0


def test_costs_are_medians_of_the_gaps_as_far_as_memory_reaches(monkeypatch):
    asked = []

    def by_engine(engine, prompts, way, **options):
        asked.append((len(prompts), way["mode"]))
        if len(prompts) == 8:
            raise ResourceError("no room")
        slow = 9.0 if asked.count(asked[-1]) == 1 else 0.5 * len(prompts)  # the first run is none that counts
        return [Timeline(0.0, 1, [(slow * at, 1) for at in range(4)]) for _ in prompts]

    monkeypatch.setattr(rowcost, "by_engine", by_engine)
    assert row_costs(None, [1], None, (1, 2, 8, 16)) == [(1, 0.5), (2, 1.0)]
    assert asked[0] == (1, "ar") and asked[-1] == (8, "ar")


def test_steps_of_a_drafter_by_its_rows():
    with Engine.from_model(build("llama"), exact="off") as engine:
        found = drafting(engine, [[1, 2, 3], [4, 5]], {"strategy": "two_forward"}, 0.0, 9)
        assert found is not None
        # A forward of the seed and a block, then one of the seed and as many drafts: of those that the limit leaves.
        block, drafts = engine.layout.block, engine.layout.drafts
        assert 1 < found.step.rows <= 1 + max(block, drafts) and found.step.seconds > 0
        assert found.tokens_per_forward >= 1.0
        assert drafting(engine, [[1, 2, 3]], {"strategy": "two_forward"}, 0.0, 1) is None


def test_the_fused_backend_needs_what_its_forward_reads(monkeypatch):
    plain_decoder(monkeypatch)
    plain_sampling(monkeypatch)
    model = fused_models.small("llama")
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    mine, hf = pair(model)
    assert needed(mine).bytes == mine.backend.weights.nbytes
    # Matrices only, and with them those of the adapter that lie beside the base's.
    assert needed(mine).numbers > needed(hf).numbers - norms
    costs = row_costs(mine, [1, 2, 3], time.perf_counter, (1, 2))
    assert [cost.rows for cost in costs] == [1, 2] and all(cost.seconds > 0 for cost in costs)
    assert drafting(mine, [[1, 2, 3]], {"strategy": "fused"}, 0.0, 6) is not None
