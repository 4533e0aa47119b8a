"""What fits: sizes read and written, and the mildest change that makes a conversion fit."""

import json

import pytest

from retrofit.errors import UsageError
from retrofit.recipes.dry_run.fit import changed, parse_size, short, steps_down, suggestions
from retrofit.recipes.schema import FIELDS, load_recipe


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 << 30),
        ("0.5 gb", 5 * 10**8),
        ("800M", 8 * 10**8),
        ("1.5KiB", 1536),
        ("123456", 123456),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 parsecs", "-3GB", "1e9", "24GBs", "0", "0.1B", "12,5GB", "nan"])
def test_nonsense_sizes_are_refused(text):
    with pytest.raises(UsageError, match="--fit"):
        parse_size(text)


def test_sizes_are_written_short():
    assert [short(size) for size in (999, 1_660_000_000, 24_000_000_000)] == ["999 bytes", "1.66 GB", "24 GB"]


def test_mixed_lengths_are_shortened_with_the_longest():
    plan = load_recipe("default", ["data.max_length=2048", "data.lengths=[256, 2048, 1024]"])
    kind = next(kind for kind in steps_down(plan) if "data.max_length" in kind[0])
    assert kind[0] == {"data.max_length": 1024, "data.lengths": [256, 1024, 1024]}
    assert kind[-1] == {"data.max_length": 128, "data.lengths": [128, 128, 128]}
    assert [changed(plan, change).data.max_length for change in kind] == [1024, 512, 256, 128]
    assert "data.lengths" not in next(k for k in steps_down(load_recipe("default")) if "data.max_length" in k[0])[0]


def weigh(plan):
    """A peak that every change lowers."""
    train, adapter = plan.train, plan.adapter
    rows = train.batch_size * (plan.data.max_length + 10 * train.anchors)
    return rows * (2 if train.precision == "float32" else 1) + 100 * (adapter.rank + adapter.markov_rank) + 1000


def applied(plan, suggestion):
    """The recipe as it is with the suggestion on the command line."""
    written = [f"{key}={value}" for key, value in flat(plan).items()]
    return load_recipe("default", [*written, *suggestion.overrides])


def flat(plan):
    return {key: value for key, value in json.loads(json.dumps(dict(_items(plan)))).items() if key in CHANGED}


CHANGED = {
    *("train.batch_size", "train.accumulation", "train.precision", "train.anchors", "data.max_length"),
    *("adapter.rank", "adapter.markov_rank", "draft.block"),
}


def _items(plan):
    for section, content in plan.model_dump(mode="json").items():
        if isinstance(content, dict):
            yield from ((f"{section}.{key}", value) for key, value in content.items())


WIDE = load_recipe("default", ["train.batch_size=8", "train.precision=float32", "data.max_length=1024"])


@pytest.mark.parametrize("limit", [40_000, 30_000, 25_000, 22_000, 20_000, 19_000, 10_000, 5_000, 3_500])
def test_suggestions_fit_and_are_the_mildest(limit):
    assert weigh(WIDE) > limit
    found, _ = suggestions(WIDE, limit, weigh)
    assert found
    for one in found:
        plan = applied(WIDE, one)
        assert weigh(plan) == one.peak <= limit
        documents = plan.train.batch_size * plan.train.accumulation
        assert documents == WIDE.train.batch_size * WIDE.train.accumulation
    kinds = steps_down(WIDE)
    if len({tuple(sorted(key.partition("=")[0] for key in one.overrides)) for one in found}) > 1 or any(
        weigh(changed(WIDE, kind[-1])) <= limit for kind in kinds
    ):
        singles = [next((c for c in kind if weigh(changed(WIDE, c)) <= limit), None) for kind in kinds]
        assert [one.peak for one in found] == [weigh(changed(WIDE, c)) for c in singles if c is not None]
    else:  # several changes together: none of them can be left out
        (one,) = found
        for kind in kinds:
            rest = [o for o in one.overrides if o.partition("=")[0] not in kind[0]]
            if len(rest) < len(one.overrides):
                assert weigh(applied(WIDE, type(one)(tuple(rest), 0))) > limit


def test_nothing_fits():
    found, least = suggestions(WIDE, 1000, weigh)
    assert found == []
    assert least.peak == weigh(applied(WIDE, least)) > 1000


def test_checkpointing_is_proposed_where_it_can_be_set():
    proposed = [set(kind[0]) for kind in steps_down(WIDE)]
    assert ({"train.checkpointing"} in proposed) == ("train.checkpointing" in FIELDS)
    assert proposed[0] == {"train.batch_size", "train.accumulation"}
