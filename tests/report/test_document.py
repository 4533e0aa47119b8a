"""`report.json`: its schema, how it is written and read, and what a page may make of it."""

import copy
import json
import math

import pytest
from jsonschema import Draft202012Validator
from reporting import files, small

from retrofit.errors import ArtifactError, ResourceError, UsageError
from retrofit.report import document
from retrofit.report.markdown import markdown, number, text

NASTY = "<script>alert('x')</script> | `a` *b* [c](d)\n# e \u202e \x1b[31m"


@pytest.fixture(scope="module")
def data(made):
    with pytest.MonkeyPatch.context() as patch:
        return small(patch, made, price=2.0, against=["lookup"]).data


def test_the_schema_is_one_and_the_report_keeps_to_it(data):
    Draft202012Validator.check_schema(document.schema())
    assert document.problem(data) is None
    assert data["status"] == "complete"
    assert {name for name, section in data["sections"].items() if section["status"] == "done"} == set(data["sections"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("verdict", "lines"), ["one"]),
        (("sections", "compared", "data", "template"), {"trained": None, "now": None}),
        (("sections", "compared", "data", "hardware"), {}),
        (("sections", "speed", "data", "cells"), []),
        (("sections", "speed", "data", "cells", 0, "ways", "ar", "ttft_p50_ms"), "fast"),
        (("sections", "losslessness", "data", "greedy", "bug"), -1),
        (("sections", "acceptance", "data", "by_temperature", 0, "drafter", "accept_cond"), [1.5]),
        (("sections", "diffusion", "data", "points", 0, "agreement_percent"), 101),
        (("sections", "diffusion", "data", "default", "tolerance"), -1),
        (("sections", "cost"), {"status": "skipped"}),
        (("figures", "tau"), None),
        (("more",), 1),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_the_schema_refuses(data, path, value):
    broken = copy.deepcopy(data)
    spot = broken
    for part in path[:-1]:
        spot = spot[part]
    spot[path[-1]] = value
    assert document.problem(broken) is not None
    with pytest.raises(AssertionError, match="does not keep to its schema"):
        document.write("nowhere", broken, {})


def test_json_has_no_nan(data, tmp_path):
    found = document.finite({"a": math.nan, "b": [math.inf, 1.0], 3: (2,)})
    assert found == {"a": None, "b": [None, 1.0], "3": [2]}
    path = document.write(tmp_path / "out", data, {"report.md": markdown(data)})
    assert path == tmp_path / "out" / "report.json"
    assert list(files(tmp_path / "out")) == ["report.json", "report.md"]
    assert document.read(tmp_path / "out") == document.read(path) == data
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_a_report_that_cannot_be_read_is_one_clear_error(data, tmp_path):
    with pytest.raises(UsageError, match=r"report\.json: cannot be read: No such file"):
        document.read(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        document.read(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({**data, "format": 9}))
    with pytest.raises(ArtifactError, match="no report of format 1"):
        document.read(tmp_path)


def test_a_full_disk_leaves_what_was_there(data, tmp_path, monkeypatch):
    document.write(tmp_path, data, {})
    before = (tmp_path / "report.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retrofit.artifact.files.write_file", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        document.write(tmp_path, {**data, "suite": "other"}, {})
    assert (tmp_path / "report.json").read_bytes() == before
    assert list(files(tmp_path)) == ["report.json"]


def test_what_a_model_says_is_text_and_no_markup():
    shown = text(NASTY)
    assert not set("<>|`*[]\n\x1b\u202e") & set(shown)
    assert "&lt;script&gt;alert('x')&lt;/script&gt;" in shown
    assert text("Ünï 日本") == "Ünï 日本"


def test_names_of_prompts_and_worst_positions_are_escaped(data):
    nasty = copy.deepcopy(data)
    first = {"way": "fused", "prompt": NASTY, "token": 3, "class": "bug", "ulp": None, "before": NASTY,
             "expected": NASTY, "got": "\ud800"}  # fmt: skip
    nasty["sections"]["losslessness"]["data"]["greedy"]["worst"] = [first]
    nasty["sections"]["acceptance"]["data"]["by_category"][0]["category"] = NASTY
    nasty["sections"]["compared"]["data"]["artifact"]["name"] = NASTY
    page = markdown(nasty)
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page and "\ud800" not in page
    widths = {line.count("|") for line in page.splitlines() if "alert" in line and line.startswith("|")}
    assert widths == {10, 8}  # the tables keep their columns


def test_every_section_is_shown_or_listed(data):
    page = markdown(data)
    for title in ("What was compared", "Does it answer the same", "Speed", "Where it stops paying", "Cost"):
        assert f"\n## {title}\n" in page
    assert page.count(f"`{data['command']}` makes these figures again.") == len(data["sections"])
    partial = copy.deepcopy(data)
    partial["status"], partial["sections"]["speed"] = "partial", {"status": "pending", "reason": "not run yet"}
    partial["skipped"].append({"section": "speed", "reason": "not run yet"})
    assert document.problem(partial) is None
    assert "This report is partial" in markdown(partial) and "- speed: not run yet" in markdown(partial)


def test_numbers_are_short():
    assert [number(value) for value in (None, 0.123456, 12345, 12345.6, 1.0, True)] == [
        "-", "0.1235", "12,345", "12,346", "1", "True",
    ]  # fmt: skip
