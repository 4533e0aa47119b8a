"""Reports side by side: what is held against what, and what is not and why."""

import copy

import pytest
from reporting import only, small

from retrofit.errors import UsageError
from retrofit.report.compare import compared, legend, page, rows

NASTY = "<script>|`a`"


@pytest.fixture(scope="module")
def data(made):
    with pytest.MonkeyPatch.context() as patch:
        only(patch, "losslessness", "quality", "acceptance")
        return small(patch, made, modes=["ar", "self_spec"]).data


def other(data, *path, value):
    """A copy with another value somewhere."""
    changed = copy.deepcopy(data)
    spot = changed
    for part in path[:-1]:
        spot = spot[part]
    spot[path[-1]] = value
    return changed


def row(found, name):
    (one,) = (one for one in found["figures"] if one["name"] == name)
    return one


def test_a_report_beside_itself(data):
    found = compared([("one", data), ("two", data), ("three", data)])
    assert found["unlike"] == []
    assert [one["letter"] for one in found["reports"]] == ["A", "B", "C"]
    tau = row(found, "tau")
    assert tau["values"] == [data["figures"]["tau"]] * 3 and tau["deltas"] == [None, 0.0, 0.0]
    assert {one["name"] for one in found["figures"]} >= {*data["figures"], "quality, arithmetic, accuracy, self_spec"}
    assert [one["name"] for one in found["gates"]] == [gate["name"] for gate in data["verdict"]["gates"]]


def test_the_difference_is_to_the_first(data):
    better = other(data, "figures", "tau", value=data["figures"]["tau"] + 0.25)
    found = compared([("one", data), ("two", better)])
    assert row(found, "tau")["deltas"] == [None, 0.25]
    line = next(line for line in rows(found)[1] if line[0] == "tau")
    assert line[-1] == "+0.25"


@pytest.mark.parametrize(
    ("path", "value", "what", "spoils", "leaves"),
    [
        (("base", "fingerprint"), {"config": "0" * 64}, "base", "tau", None),
        (("prompts", "sha256"), "0" * 64, "prompts", "tau", "quality_delta_points_ar"),
        (("suite", "tokens"), 99, "sizes", "tau", "quality_delta_points_ar"),
        (("hardware", "cpu"), "another", "hardware", "speedup_batch_1", "tau"),
        (("engine", "device"), "cuda:0", "hardware", "speedup_batch_1", "tau"),  # a machine with a GPU has a CPU too
        (("engine", "exact"), "bucket", "engine", None, "speedup_batch_1"),
        (("seed",), 5, "seed", None, "tau"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_apples_and_pears_are_said(data, path, value, what, spoils, leaves):
    first = other(data, "figures", "speedup_batch_1", value=1.5)
    second = other(first, "sections", "compared", "data", *path, value=value)
    found = compared([("one", first), ("two", second)])
    assert [one["what"] for one in found["unlike"]] == [what]
    assert f"Not the same {what}: A " in "\n".join(legend(found))
    if spoils is not None:
        assert row(found, spoils)["deltas"] == [None, None] and row(found, spoils)["unlike"] == [[], [what]]
        assert f"| other {what} |" in page(found)
    if leaves is not None:
        assert row(found, leaves)["deltas"] == [None, 0.0]


def test_other_tasks_are_not_held_against_each_other(data):
    second = other(data, "sections", "quality", "data", "items_sha256", value="0" * 64)
    found = compared([("one", data), ("two", second)])
    assert row(found, "quality_delta_points_ar")["unlike"] == [[], ["tasks"]]
    assert row(found, "tau")["deltas"] == [None, 0.0]


def test_what_one_of_them_has_not_is_a_dash(data):
    second = copy.deepcopy(data)
    del second["figures"]["tau"]
    second["verdict"]["gates"] = second["verdict"]["gates"][:1]
    found = compared([("one", second), ("two", data)])
    assert row(found, "tau")["values"] == [None, data["figures"]["tau"]]
    assert row(found, "tau")["deltas"] == [None, None]
    assert found["gates"][-1]["ok"] == [None, True]
    assert "| tau | - | " in page(found)


def test_names_are_text_and_no_markup(data):
    second = other(data, "sections", "compared", "data", "base", "model", value=NASTY)
    shown = page(compared([(NASTY, data), ("two", second)]))
    assert "<script" not in shown


def test_it_takes_two_that_say_what_they_are_of(data):
    with pytest.raises(UsageError, match="1 report to compare; it takes two or more"):
        compared([("one", data)])
    nothing = other(data, "sections", "compared", value={"status": "pending", "reason": "not run yet"})
    with pytest.raises(UsageError, match="two: does not say what it is of: not run yet"):
        compared([("one", data), ("two", nothing)])
