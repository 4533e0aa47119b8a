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


@pytest.mark.parametrize("line", ["/mode fast", "/seed x", "/unknown"])
def test_chat_refuses_wrong_commands(made, line):
    result = run("chat", made, "-q", stdin=f"{line}\n")
    assert line.split()[0] in refused(result, 2)
