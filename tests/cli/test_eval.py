"""`retrofit eval` and `retrofit report`: what they write and print, and how they end."""

import json

import pytest
from artifact_folders import contents
from commands import done, run
from reporting import only, small_suite
from saved import save_artifact

from retrofit import named_bases
from retrofit.artifact import folder as artifact
from retrofit.report import document
from retrofit.report.evaluate import SECTIONS

LYING = {"conditional": {"greedy": [0.9] * 4}}


@pytest.fixture
def quick(monkeypatch):
    small_suite(monkeypatch)
    only(monkeypatch, "losslessness")


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"turns": ["def area"]}\n{"turns": ["for item in Ünï"]}\n')
    return path


@pytest.mark.usefixtures("quick")
def test_eval_writes_the_report_and_prints_the_verdict(own, mine):
    result = run("eval", own, "--prompts", mine, "--exact", "bucket", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("It answers as the original does: 20 of 20 texts are the same")
    assert lines[1:3] == ["Its speed was not measured.", "Up to which batch size speculation pays was not measured."]
    assert [line.split()[:2] for line in lines[3:]] == [
        ["passed", name] for name in ("lossless_bugs", "lossless_near", "lossless_texts")
    ]
    artifact.check(own)  # its hash stands beside it
    data = document.read(own)
    assert data["command"] == "retrofit eval own --suite quick --prompts mine.jsonl --device cpu --exact bucket"
    page = done("report", "show", own)
    assert page == (own / "eval" / "report.md").read_text()
    assert json.loads(done("report", "show", own / "eval" / "report.json", "--json")) == data


@pytest.mark.usefixtures("quick")
def test_eval_writes_a_page_and_a_picture_and_show_draws_the_page_again(own, mine):
    done("eval", own, "--prompts", mine, "--exact", "bucket", "-q")
    drawn = {path.name for path in (own / "eval").iterdir() if path.suffix != ".sha256"}
    assert drawn == {"report.json", "report.md", "report.html", "report.svg"}
    artifact.check(own)
    assert done("report", "show", own, "--html") == (own / "eval" / "report.html").read_text()
    both = run("report", "show", own, "--html", "--json")
    assert (both.exit_code, both.stdout) == (2, "")
    assert both.stderr.startswith("Error: --html and --json are two forms of one report\n")


@pytest.mark.usefixtures("quick")
def test_eval_ends_with_3_and_says_which_gate_and_by_how_much(own, mine, tmp_path):
    place = tmp_path / "elsewhere"
    result = run("eval", own, "--prompts", mine, "--fail-under", "equal_texts_share=1.5", "-o", place, "--json", "-q")
    assert result.exit_code == 3
    assert result.stderr == "Error: asked_equal_texts_share: equal_texts_share is 1; 1.5 is the least\n"
    assert json.loads(result.stdout) == document.read(place)
    assert not (own / "eval").exists()


def test_a_lying_artifact_ends_with_3(tmp_path, base, mine, monkeypatch):
    small_suite(monkeypatch)
    only(monkeypatch, "acceptance")
    lying = save_artifact(tmp_path / "lying", base, acceptance=LYING)
    result = run("eval", lying, "--prompts", mine, "-q")
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: claimed_greedy: a cycle accepts 0.")
    assert result.stderr.endswith("of the 3.095 that the artifact claims; 50% must hold\n")


@pytest.mark.usefixtures("quick")
def test_an_interruption_says_where_to_go_on(own, mine, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(SECTIONS, "diffusion", interrupted)
    result = run("eval", own, "--prompts", mine, "-q")
    assert result.exit_code == 130
    path = own / "eval" / "report.json"
    assert result.stderr.splitlines() == [
        "interrupted", f"{path} holds the sections that were finished; the same command goes on from there",
    ]  # fmt: skip
    assert document.read(own)["status"] == "partial"
    assert "This report is partial" in done("report", "show", own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "1,x"], "'1,x' is no list of whole numbers"),
        (["--batch", ","], "--batch is empty; it must be whole numbers from 1"),
        (["--modes", "ar,fast"], "mode 'fast' does not exist"),
        (["--fail-under", "tau"], "--fail-under is tau; it must be NAME=V"),
        (["--fail-under", "tau=nan"], "--fail-under is tau=nan; it must be NAME=V"),
        (["--fail-under", "tua=1"], "fail-under tua: no such figure; did you mean `tau`?"),
        (["--fail-under", "tau=1", "--fail-under", "tau=2"], "--fail-under gives tau two bounds, 1 and 2"),
        (["--price", "-1"], "price is -1.0; it must be above 0"),
        (["--prompts", "gone.jsonl"], "gone.jsonl: cannot be read: No such file or directory"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_clear_error(own, options, message):
    result = run("eval", own, *options)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.usefixtures("quick")
def test_an_artifact_that_ships_is_measured_and_shown_by_its_name(tmp_path, base, mine, monkeypatch):
    (tmp_path / "shipped").mkdir()
    place = save_artifact(tmp_path / "shipped" / "smollm2-135m", base)
    monkeypatch.setattr(named_bases, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    before = contents(place)
    assert run("eval", "smollm2-135m", "--prompts", mine, "-q").exit_code == 0
    assert contents(place) == before  # what is installed is not written to
    assert (tmp_path / "cache" / "shipped" / "smollm2-135m" / "report.json").is_file()
    assert done("report", "show", "smollm2-135m").startswith("# Report: smollm2-135m")


def test_report_show_without_a_report(own):
    result = run("report", "show", own)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"Error: {own / 'eval' / 'report.json'}: cannot be read: No such file or directory",
        "hint: make one with `retrofit eval ARTIFACT`",
    ]


@pytest.mark.usefixtures("quick")
def test_report_compare_sets_two_side_by_side(own, mine, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    done("eval", own, "--prompts", mine, "-o", first, "-q")
    done("eval", own, "--prompts", mine, "--limit", "1", "-o", second, "-q")
    shown = done("report", "compare", first, second)
    assert shown.startswith(
        f"A: own of {document.read(first)['sections']['compared']['data']['base']['model']}, quick, "
    )
    assert "Not the same prompts: A count 2" in shown
    assert any(line.split()[-2:] == ["prompts,", "sizes"] for line in shown.splitlines())
    found = json.loads(done("report", "compare", first, second, "--json"))
    assert [one["what"] for one in found["unlike"]] == ["prompts", "sizes"]
    assert done("report", "compare", first, second, "--markdown").startswith("# Reports side by side\n")


def test_report_compare_with_wrong_input(own, tmp_path):
    for arguments, message in (
        ([], "Missing argument 'ARTIFACT|FILE...'"),
        ([tmp_path], "report.json: cannot be read"),
    ):
        result = run("report", "compare", *arguments)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
