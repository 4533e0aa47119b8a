"""`retrofit chat` from a pipe: a conversation, its commands, and what it refuses."""

import json

import pytest
from commands import done, refused, run
from saved import TEMPLATE, save_artifact, save_base

from retrofit.runtime import engine


def test_chat_from_a_pipe(made):
    lines = "/mode ar\ndef area\n\n/seed 4\n/stats\n/reset\n/help\nclass\n/exit\nnever reached\n"
    result = run("chat", made, "--max-new-tokens", 4, stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert "no chat template" in result.stderr
    assert result.stderr.count("[ar: 4 tokens in") == 2
    assert "1 answers, 4 tokens" in result.stderr
    assert result.stdout == "".join(done("generate", made, p, "--max-new-tokens", 4) for p in ("def area", "class"))


def test_chat_without_a_template_continues_the_text(made):
    first = done("generate", made, "def area", "--max-new-tokens", 4)[:-1]
    lines = [
        json.loads(line)
        for line in done("chat", made, "--json", "--max-new-tokens", 4, stdin="def area\nfor\n").splitlines()
    ]
    assert lines[0]["text"] == first
    assert lines[1]["text"] == done("generate", made, f"def area{first}\nfor", "--max-new-tokens", 4)[:-1]


def test_chat_sends_the_conversation_through_the_template(tmp_path):
    base = save_base(tmp_path / "talker", template=TEMPLATE)
    made = save_artifact(tmp_path / "talker-retrofit", base)
    result = run("chat", made, "--json", "--max-new-tokens", 4, stdin="def\nfor\n")
    assert result.exit_code == 0, result.stderr
    assert "no chat template" not in result.stderr
    answers = [json.loads(line)["text"] for line in result.stdout.splitlines()]
    talk = [{"role": "user", "content": "def"}, {"role": "assistant", "content": answers[0]}]
    model = engine.Engine.load(made)
    assert model.generate([talk[:1]], max_new_tokens=4)[0].text == answers[0]
    talk.append({"role": "user", "content": "for"})
    assert model.generate([talk], max_new_tokens=4)[0].text == answers[1]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talker")
    return save_artifact(folder / "talker-retrofit", save_base(folder / "talker", template=TEMPLATE))


def test_a_system_message_begins_every_conversation(talker):
    told = [{"role": "system", "content": "import"}, {"role": "user", "content": "def"}]
    model = engine.Engine.load(talker)
    (want,) = model.generate([told], max_new_tokens=4)
    options = ["--system", "import", "--json", "--max-new-tokens", 4]
    answers = [json.loads(line) for line in done("chat", talker, *options, stdin="def\n/reset\ndef\n").splitlines()]
    assert [a["tokens"] for a in answers] == [want.tokens] * 2
    assert json.loads(done("generate", talker, "def", *options))["tokens"] == want.tokens
    (bare,) = model.generate([told[1:]], max_new_tokens=4)
    assert json.loads(done("generate", talker, "def", "--chat", *options[2:]))["tokens"] == bare.tokens != want.tokens


def test_a_system_message_needs_a_template(made):
    for command in ("generate", "chat"):
        assert "chat template" in refused(run(command, made, "--system", "import", stdin="def\n"), 2)


def test_chat_leaves_out_what_a_mode_does_not_know(talker):
    lines = "def\n/mode ar\ndef\n/mode diffusion\ndef\n"
    assert done("chat", talker, "--strategy", "fused", "--max-new-tokens", 4, stdin=lines).count("\n") >= 3
    result = run("chat", talker, "--strategy", "fused", "--mode", "ar", stdin=lines)
    assert "strategy means nothing in mode ar" in refused(result, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "diffusion", "--json", "--logprobs", 1], "logprobs mean nothing in mode diffusion"),
        (["--min-new-tokens", 9, "--max-new-tokens", 3], "min_new_tokens is 9"),
    ],
    ids=["logprobs", "minimum"],
)
def test_wrong_options_are_told_before_the_first_line(made, options, message):
    assert message in refused(run("chat", made, *options, stdin="/help\n"), 2)


def test_a_turn_reads_what_is_new_in_it(talker):
    """The same answers with prefixes kept and without; on this machine they may not be kept."""
    lines = "def area(radius): return\nfor name in names: print(name)\nimport os, sys, re, json\n"
    told = ["--mode", "ar", "--json", "--max-new-tokens", 6, "--ignore-eos"]
    found = {}
    for kept in ("auto", "0"):
        result = run("chat", talker, *told, "--prefix-cache", kept, stdin=lines)
        assert result.exit_code == 0, result.stderr
        found[kept] = [json.loads(line) for line in result.stdout.splitlines()]
    assert [a["tokens"] for a in found["auto"]] == [a["tokens"] for a in found["0"]]
    reused = {kept: [a["stats"]["reused"] for a in answers] for kept, answers in found.items()}
    assert reused["0"] == [0, 0, 0] and "reused" not in result.stderr
    with engine.Engine.load(talker) as model:
        keeps = model.prefixes is not None
    assert (reused["auto"][-1] > 0) == keeps
    assert "prefix_cache 'lots'" in refused(run("chat", talker, "--prefix-cache", "lots", stdin=lines), 2)
