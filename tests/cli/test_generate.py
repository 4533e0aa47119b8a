"""`retrofit generate`: text on stdout, talk on stderr, as `Engine.generate` gives it; bad prompts and options."""

import json
import re

import pytest
import torch
from commands import PROMPT, done, refused, run
from saved import save_artifact, save_base
from tiny_models import CONTEXT, build

from retrofit.errors import ResourceError
from retrofit.runtime import engine


def test_generated_text_is_on_stdout_and_talk_on_stderr(made):
    result = run("generate", made, PROMPT, "--mode", "ar", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.stderr
    model = engine.Engine.load(made)
    expected = model.generate([PROMPT], mode="ar", max_new_tokens=8)[0].text
    assert result.stdout == f"{expected}\n"
    assert "8 tokens in" in result.stderr
    assert "tokens/s" in result.stderr
    assert "TPF 1.00" in result.stderr
    assert re.search(r"; hf in float32(, packed, exact=invariant|, exact=off)\n$", result.stderr)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "more",
    [["--strategy", "two_forward"], ["--strategy", "fused"], ["--strategy", "fused", "--prepare", "2"], []],
    ids=["two_forward", "fused", "prepare 2", "auto"],
)
def test_self_spec_prints_what_ar_prints(made, more):
    options = ["--max-new-tokens", 12, "--temperature", 0.8, "--seed", 3]
    spec = run("generate", made, PROMPT, *options, *more)
    assert spec.stdout == done("generate", made, PROMPT, *options, "--mode", "ar")
    assert "TPF" in spec.stderr


def test_quiet_is_quiet(made):
    assert run("generate", made, PROMPT, "-q", "--max-new-tokens", 2).stderr == ""


def test_json_is_one_line_per_prompt_in_their_order(made):
    prompts = [PROMPT, "class Stack:", "for item in"]
    options = ["--json", "--batch-size", 2, "--max-new-tokens", 6]
    results = [json.loads(line) for line in done("generate", made, *prompts, *options).splitlines()]
    expected = engine.Engine.load(made).generate(prompts, max_new_tokens=6)
    assert [r["tokens"] for r in results] == [r.tokens for r in expected]
    assert [r["text"] for r in results] == [r.text for r in expected]
    assert [r["index"] for r in results] == [0, 1, 2]
    assert all(r["finish_reason"] == "length" and r["stats"]["tpf"] > 0 for r in results)


def test_several_prompts_are_printed_under_headers(made):
    text = done("generate", made, PROMPT, "class Stack:", "--max-new-tokens", 2)
    assert "==> prompt 1 <==" in text
    assert "==> prompt 2 <==" in text


@pytest.mark.parametrize("arguments", [(), ("-",)], ids=["none", "dash"])
def test_prompt_from_stdin(made, arguments):
    options = ["--max-new-tokens", 4]
    assert done("generate", made, *arguments, *options, stdin=PROMPT) == done("generate", made, PROMPT, *options)


def test_options_from_the_environment(made):
    text = done("generate", made, PROMPT, RETROFIT_JSON="1", RETROFIT_MAX_NEW_TOKENS="3", RETROFIT_MODE="ar")
    assert len(json.loads(text)["tokens"]) == 3


def test_backend_and_exact_reach_the_engine(made, monkeypatch):
    seen = {}

    def load(folder, **options):
        seen.update(options)
        raise ResourceError("seen")

    monkeypatch.setattr(engine.Engine, "load", load)
    refused(run("generate", made, PROMPT, "--backend", "fused", RETROFIT_EXACT="invariant"), 4)
    assert (seen["backend"], seen["exact"]) == ("fused", "invariant")


# Bad prompts and options

GENERATE_BAD = {
    "no such artifact": (["nowhere", PROMPT], 2, "nowhere: no such artifact"),
    "prompt beyond the context": (["MADE", "d e f " * CONTEXT], 2, f"context is {CONTEXT}"),
    "empty prompt": (["MADE", ""], 2, "prompt 0 is empty"),
    "prepare": (["MADE", PROMPT, "--prepare", "some"], 2, "prepare"),
    "no GPU": (["MADE", PROMPT, "--device", "cuda"], 4, "no CUDA GPU"),
    "no base": (["MADE", PROMPT, "--base", "./gone"], 2, "no folder or file ./gone"),
}


@pytest.mark.parametrize("case", GENERATE_BAD)
def test_generate_refuses(case, made):
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    arguments, code, message = GENERATE_BAD[case]
    assert message in refused(run("generate", *[str(made) if a == "MADE" else a for a in arguments]), code)


@pytest.mark.parametrize(
    "options",
    [
        *(["--mode", "fast"], ["--temperature", "-1"], ["--top-p", "1.5"], ["--top-k", "0"], ["--no-such"]),
        *(["--max-new-tokens", "0"], ["--seed", "x"], ["--dtype", "int8"], ["--threshold", "2"]),
    ],
    ids=" ".join,
)
def test_wrong_options_are_usage_errors(made, options):
    result = run("generate", made, PROMPT, *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert options[0] in result.stderr
    assert "Traceback" not in result.stderr


def test_generate_refuses_bytes_that_are_no_text(made):
    assert "not UTF-8" in refused(run("generate", made, stdin=b"\xff\xfe\xff"), 1)


def test_text_needs_a_tokenizer(tmp_path):
    build("llama").save_pretrained(tmp_path / "mute")
    made = save_artifact(tmp_path / "mute-retrofit", tmp_path / "mute")
    assert "tokenizer" in refused(run("generate", made, PROMPT), 2)


def test_an_adapter_for_another_base(made, tmp_path):
    other = save_base(tmp_path / "other", seed=1)
    assert "belongs to another base" in refused(run("generate", made, PROMPT, "--base", other), 1)


def test_every_option_of_an_output_reaches_the_engine(made):
    given = [
        "--min-p",
        0.02,
        "--presence-penalty",
        1,
        "--frequency-penalty",
        -0.5,
        "--logit-bias",
        "3=2.5",
        "--logit-bias",
    ]
    given += [
        "4=-1",
        "-n",
        2,
        "--min-new-tokens",
        3,
        "--ignore-eos",
        "--logprobs",
        1,
        "--temperature",
        0.9,
        "--seed",
        7,
    ]
    lines = done("generate", made, PROMPT, "class", *given, "--json", "--max-new-tokens", 6).splitlines()
    want = engine.Engine.load(made).generate(
        [PROMPT, "class"], min_p=0.02, presence_penalty=1.0, frequency_penalty=-0.5, logit_bias={3: 2.5, 4: -1.0}, n=2,
        min_new_tokens=3, ignore_eos=True, logprobs=1, temperature=0.9, seed=7, max_new_tokens=6,
    )  # fmt: skip
    results = [json.loads(line) for line in lines]
    assert [(r["index"], r["sample"], r["tokens"]) for r in results] == [(r.index, r.sample, r.tokens) for r in want]
    assert [r["stop_reason"] for r in results] == [None] * 4
    told = [[dict(zip(map(int, step), step.values(), strict=True)) for step in r["logprobs"]] for r in results]
    for mine, result in zip(told, want, strict=True):
        assert [list(step) for step in mine] == [list(step) for step in result.logprobs]
    text = done("generate", made, PROMPT, "-n", 2, "--temperature", 0.9, "--seed", 7, "--max-new-tokens", 2)
    assert "==> prompt 1, output 1 <==" in text and "==> prompt 1, output 2 <==" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logit-bias", "3"], "--logit-bias is 3; it must be ID=V"),
        (["--logprobs", 1], "--logprobs is shown with --json only"),
        (["--threshold", 0.5], "threshold means nothing in mode self_spec"),
        (["--prepare", "last"], "prepare means nothing with strategy auto"),
        (["--mode", "ar", "--tree", 4], "tree means nothing in mode ar"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_that_mean_nothing_are_refused(made, options, message):
    assert message in refused(run("generate", made, PROMPT, *options), 2)


@pytest.mark.parametrize("line", ["/mode fast", "/seed x", "/unknown"])
def test_chat_refuses_wrong_commands(made, line):
    result = run("chat", made, "-q", stdin=f"{line}\n")
    assert line.split()[0] in refused(result, 2)


@pytest.fixture(scope="module")
def filling(tmp_path_factory, base):
    return save_artifact(tmp_path_factory.mktemp("filling") / "made", base, infill={"rows": 16})


def test_a_gap_is_filled_and_printed_alone(filling):
    ends = ["--prefix", "def area(", "--suffix", "return radius"]
    found = engine.Engine.load(filling).infill("def area(", "return radius", longest=3)
    result = run("generate", filling, *ends, "--max-new-tokens", 3)
    assert result.stdout == f"{found.text}\n" and "the likeliest of" in result.stderr
    told = json.loads(done("generate", filling, *ends, "--max-new-tokens", 3, "--json"))
    assert (told["tokens"], told["text"]) == (found.tokens, found.text)
    assert [c["tokens"] for c in told["candidates"]] == [c.tokens for c in found.candidates]


def test_a_marked_span_is_revised_inside_its_text(filling):
    found = engine.Engine.load(filling).infill("def area(", "): return", given="xx")
    assert done("generate", filling, "--revise", "def area([[xx]]): return") == f"def area({found.text}): return\n"
    told = json.loads(done("generate", filling, "--revise", "def area([[xx]]): return", "--json"))
    assert "given" in [c["origin"] for c in told["candidates"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefix", "a"], "a gap cannot be made of --prefix"),
        (
            ["--prefix", "a", "--suffix", "b", "--revise", "[[a]]"],
            "a gap cannot be made of --prefix and --suffix and --revise",
        ),
        (["--revise", "no span"], "--revise must mark one span, with text in it"),
        (["--revise", "[[a]] and [[b]]"], "--revise must mark one span, with text in it"),
        (["--revise", "a [[]] b"], "--revise must mark one span, with text in it"),
        (["--revise", "[[a]] b"], "a span with text on one side alone"),
        (["--revise", "a [[b]]"], "a span with text on one side alone"),
        (["--prefix", "a", "--suffix", ""], "--suffix is empty"),
        (["--revise", "a [[b]] c", "a prompt"], "a PROMPT means nothing beside --revise"),
        (["--revise", "a [[b]] c", "--temperature", 1], "--temperature means nothing beside --revise"),
        (["--revise", "a [[b]] c", "--mode", "ar"], "a gap is filled by mode diffusion, not ar"),
        (["--revise", "a [[b]] c", "--max-new-tokens", 9], "the length of a gap is 9"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_makes_no_gap_is_refused(filling, options, message):
    assert message in refused(run("generate", filling, *options), 2)


def test_an_artifact_that_has_not_learned_to_fill_gaps_says_so(made):
    assert "objective.infill_share" in refused(run("generate", made, "--prefix", "a", "--suffix", "b"), 2)
