"""The original's other ways to decode faster, and other artifacts, in one table of paired prompts."""

import pytest
import torch
from reporting import PROMPTS, only, small, small_suite
from saved import save_artifact, save_base
from tiny_models import build
from transformers import AutoModelForCausalLM

from retrofit.errors import ArtifactError, UsageError
from retrofit.eval.acceptance import reference_tokens
from retrofit.report.evaluate import evaluate
from retrofit.report.markdown import markdown
from retrofit.report.rivals import rivals
from retrofit.runtime.host import modes


@pytest.fixture(scope="module")
def own(tmp_path_factory, base):
    return save_artifact(tmp_path_factory.mktemp("against") / "own", base)


@pytest.fixture(scope="module")
def other(tmp_path_factory, base):
    return save_artifact(tmp_path_factory.mktemp("against") / "other", base)


def rows_of(report):
    return {row["way"]: row for row in report.section("against")["rows"]}


def test_every_way_writes_the_originals_texts(own, other, base, monkeypatch):
    only(monkeypatch, "against")
    report = small(monkeypatch, own, against=["lookup", f"assisted={base}", str(other)])
    rows = rows_of(report)
    assert list(rows) == [
        "transformers", "ar", "auto", "fused", "transformers lookup", f"transformers assisted={base.name}",
        "other, auto", "other, fused",
    ]  # fmt: skip
    assert {row["equal_texts"] for row in rows.values()} == {2}
    assert rows["transformers"]["tokens_per_forward"] == rows["ar"]["tokens_per_forward"] == 1.0
    assert rows["transformers"]["ratio_to_transformers"] == 1.0
    # The original drafts for itself, so every draft is accepted: 3 tokens, one forward of each kind for 2 drafts.
    assert rows[f"transformers assisted={base.name}"]["tokens_per_forward"] > 1.0
    assert rows[f"transformers assisted={base.name}"]["small_forwards_per_token"] > 0
    assert all(row["small_forwards_per_token"] == 0 for name, row in rows.items() if "assisted" not in name)
    assert f"--against lookup --against assisted={base.name} --against other" in report.data["command"]
    assert "## Beside other ways to decode the base" in markdown(report.data)


def test_seconds_are_those_of_the_clock(own, monkeypatch):
    only(monkeypatch, "against")
    rows = rows_of(small(monkeypatch, own, against=["lookup"]))
    # The clock ticks a second a reading, and a prompt of three new tokens reads it twice.
    assert {row["tokens_per_s"] for row in rows.values()} == {3.0}


def test_a_lossy_engine_is_seen(own, monkeypatch):
    only(monkeypatch, "against")
    right = modes.accepted_length
    monkeypatch.setattr(
        modes, "accepted_length", lambda draft, target, lengths: (right(draft, target, lengths) + 1).minimum(lengths)
    )
    small_suite(monkeypatch, speed_tokens=12)
    rows = rows_of(evaluate(own, prompts=PROMPTS, context=[24], against=["lookup"], progress=False))
    assert rows["fused"]["equal_texts"] < rows["ar"]["equal_texts"] == 2


def test_what_cannot_run_is_left_out_with_its_reason(own, tmp_path, monkeypatch):
    only(monkeypatch, "against")
    foreign = save_artifact(tmp_path / "foreign", save_base(tmp_path / "base", seed=1))
    config = build("llama").config
    config.vocab_size = 40
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "few")
    report = small(monkeypatch, own, against=[str(foreign), f"assisted={tmp_path / 'few'}"], modes=["ar"])
    why = {one["what"]: one["why"] for one in report.section("against")["skipped"]}
    assert why["foreign"].startswith("it was made of another base")
    assert why["assisted=few"].startswith("its vocabulary has 40 tokens and the base's")
    assert set(rows_of(report)) == {"transformers", "ar"}


def test_nothing_named_is_said(own, monkeypatch):
    only(monkeypatch, "against")
    skipped = {one["section"]: one["reason"] for one in small(monkeypatch, own).data["skipped"]}
    assert skipped["against"].startswith("nothing was named with --against")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["lokup"], "--against is lokup, which is no artifact"),
        (["assisted="], "--against is assisted=, which names no model"),
        (["assisted=./gone"], "no folder or file ./gone"),
        (["lookup", "lookup"], "--against names lookup twice"),
    ],
)
def test_a_wrong_value_is_one_clear_error_before_anything_is_loaded(values, message, monkeypatch):
    with pytest.raises(UsageError) as caught:
        small(monkeypatch, "no-such-folder", against=values)
    assert str(caught.value).startswith(message)


def test_a_damaged_artifact_is_refused(other):
    damaged = other.parent / "damaged"
    damaged.mkdir()
    for path in other.iterdir():
        if path.is_file():
            (damaged / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ArtifactError):
        rivals([str(damaged)])


def test_two_folders_of_one_name_would_hide_each_other(other, base, tmp_path):
    with pytest.raises(UsageError, match="--against names other twice"):
        rivals([str(other), str(save_artifact(tmp_path / "other", base))])


def test_an_artifact_that_changed_is_another(other):
    (rival,) = rivals([str(other)])
    before = rival.identity
    manifest = other / "manifest.sha256.json"
    text = manifest.read_bytes()
    manifest.write_bytes(text + b"\n")
    assert rival.identity != before
    manifest.write_bytes(text)


def test_assisted_decoding_is_the_originals_text():
    model, small_one = build("llama"), build("llama", seed=3)
    plain = reference_tokens(model, [[1, 2, 3]], max_new_tokens=8)
    with torch.inference_mode():
        assert reference_tokens(model, [[1, 2, 3]], max_new_tokens=8, assistant=small_one) == plain
