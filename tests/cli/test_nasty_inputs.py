"""Whatever a person hands over ends in output or in one clear error: never in a traceback, never in "not foreseen"."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from saved import TEMPLATE, save_artifact, save_base, save_tokenizer
from tiny_models import CONTEXT, VOCABULARY, build
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from retrofit.adapters.layout import DraftLayout
from retrofit.cli import main as cli
from retrofit.errors import UsageError
from retrofit.runtime.engine import Engine

TEXT = "def area"
HALF = "half a character: \ud800"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, TEMPLATE)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    return Engine.from_model(build("llama"), tokenizer, layout=DraftLayout(block=4))


@cache
def endless() -> Any:
    return iter(int, 1)


USER = {"role": "user", "content": "def"}
NOT_PROMPTS: dict[str, Any] = {
    "a string": TEXT,
    "nothing": None,
    "a number": 5,
    "bytes": b"def",
    "a set": {"def"},
    "a generator": (text for text in [TEXT]),
    "an endless iterator": endless(),
    "one conversation": [USER],
    "one message": USER,
    "an empty mapping": {},
    "ids of text": {"input_ids": "def"},
    "ids of nothing": {"input_ids": None},
    "ids and a mask of another shape": {"input_ids": [[1, 2]], "attention_mask": [[1]]},
    "ids and nothing but padding": {"input_ids": [[1, 2]], "attention_mask": [[0, 0]]},
    "ids with holes": {"input_ids": [[1, None]]},
    "a tensor of numbers": torch.tensor([[1.0, 2.0]]),
    "a tensor of one number": torch.tensor(3),
    "a tensor too deep": torch.ones(1, 2, 3, dtype=torch.long),
    "an array of texts": np.array([TEXT]),
    "an array of truths": np.array([[True]]),
    "ragged ids": {"input_ids": [[1, 2], 3]},
}
BAD_PROMPTS: dict[str, Any] = {
    "nothing": None,
    "True": True,
    "a number": 1.5,
    "a mapping": {"input_ids": [1]},
    "a message": USER,
    "an empty text": "",
    "no token": [],
    "no message": (),
    "half a character": HALF,
    "negative": [-1],
    "beyond the vocabulary": [VOCABULARY],
    "far beyond": [10**30],
    "longer than Python prints": [10**5000],
    "truths": [True, False],
    "fractions": [1.0],
    "texts": ["def", "area"],
    "mixed": [1, "def"],
    "nested": [[1, 2]],
    "holes": [1, None],
    "bytes": b"def",
    "a generator": (n for n in [1]),
    "a set": {1, 2},
    "too long": [1] * CONTEXT,
    "too long a text": TEXT * 99,
    "two rows": torch.ones(2, 3, dtype=torch.long),
    "an empty tensor": torch.ones(0, dtype=torch.long),
    "fractions in an array": np.array([0.5]),
    "a message without a role": [{"content": "def"}],
    "a message without a content": [{"role": "user"}],
    "a role that is no text": [{"role": 3, "content": "def"}],
    "a message and a text": [USER, "def"],
    "a message and an id": [USER, 3],
    "an id and a message": [3, USER],
    "half a character in a message": [{"role": "user", "content": HALF}],
    "half a character in a role": [{"role": "\ud800", "content": "def"}],
    "an object": object(),
}
BAD_OPTIONS: dict[str, list[Any]] = {
    "mode": ["fast", None, ["ar"], 1],
    "strategy": ["fastest", ["fused"], True],
    "prepare": [0, -1, True, 1.5, "some", math.nan, [1]],
    "tree": [-1, 1.5, True, "9", 10**9],
    "max_new_tokens": [0, -1, 2.0, "12", True, [], [2.0], [None, 1], math.nan, {"a": 1}, {3}],
    "temperature": [-0.1, 10**400, -(10**400), math.nan, math.inf, "hot", None, True, 1e-30, 1j, [1.0]],
    "top_k": [0, -1, 2.5, "5", True, math.nan],
    "top_p": [0, 10**400, 0.0, 1.01, -1, math.nan, "half", True],
    "repetition_penalty": [0, 10**400, -1.0, math.nan, math.inf, "much", True],
    "stop": ["", [""], 5, [5], b"stop", [b"stop"], {"a": 1}, [None], True, (s for s in "ab")],
    "stop_token_ids": [-1, VOCABULARY, 1.5, "5", ["5"], [True], {"a": 1}, [10**40]],
    "seed": [-1, 2**63, 10**5000, 1.5, "7", None, True, [], [1, 2], [-1], [2**63], [1.5], math.nan],
    "batch_size": [0, -1, 2.0, "8", None, True],
    "ignore_eos": ["no", 1, None],
    "original_settings": ["no", 0, None],
    "threshold": [-0.1, 10**400, 1.1, math.nan, "high", [0.5], True],
    "min_p": [-0.1, 1.5, math.nan, "some", True],
    "presence_penalty": [-2.5, 3, math.nan, None, "some"],
    "frequency_penalty": [-2.5, 3, math.inf, None, "some"],
    "logit_bias": [5, [(1, 2)], {"a": 1}, {1: "b"}, {1: math.inf}, {-1: 1.0}, {VOCABULARY: 1.0}, {True: 1.0}],
    "n": [0, -1, 1.5, None, True],
    "min_new_tokens": [-1, 1.5, True, 3],
    "logprobs": [-1, 1.5, True],
    "prompt_logprobs": [-1, 1.5, True],
}


def refused(call: Callable[[], Any]) -> str:
    """The message of the one clear error."""
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    message.encode()  # can be printed
    (caught.value.hint or "").encode()
    return message


@pytest.mark.parametrize("prompts", NOT_PROMPTS.values(), ids=NOT_PROMPTS)
def test_what_is_no_list_of_prompts(prompts: Any, engine: Engine) -> None:
    assert "prompt" in refused(lambda: engine.generate(prompts, max_new_tokens=2))


@pytest.mark.parametrize("prompt", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_what_is_no_prompt(prompt: Any, engine: Engine) -> None:
    assert "prompt 1" in refused(lambda: engine.generate([TEXT, prompt], max_new_tokens=2))


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_of_the_wrong_type_or_range(name: str, engine: Engine) -> None:
    for value in BAD_OPTIONS[name]:
        message = refused(lambda: engine.generate([TEXT], **{"max_new_tokens": 2, name: value}))  # noqa: B023
        assert name.rstrip("s").replace("_id", " id").split("_")[0] in message, (name, value, message)


@pytest.mark.parametrize("mode", ["ar", "self_spec", "diffusion"])
def test_numbers_of_other_libraries_are_numbers(mode: str, engine: Engine) -> None:
    plain = engine.generate(
        [[1, 2, 3]] * 2, mode, max_new_tokens=[4, 5], temperature=0.5, top_k=9, top_p=0.5, seed=[3, 4]
    )
    other = engine.generate(
        [[np.int64(1), np.int32(2), torch.tensor(3)], torch.tensor([1, 2, 3])], mode,
        max_new_tokens=np.array([4, 5]), temperature=np.float32(0.5), top_k=np.int64(9), top_p=np.float64(0.5),
        seed=torch.tensor([3, 4]), batch_size=np.int8(2),
    )  # fmt: skip
    assert [r.tokens for r in other] == [r.tokens for r in plain]
    assert all(type(token) is int for r in other for token in r.prompt)


def test_extremes_that_are_allowed(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10**30, "top_k": 10**30, "temperature": 1e30, "seed": 2**63 - 1}
    (result,) = engine.generate([[1, 2]], **options)
    assert len(result.tokens) == CONTEXT - 2
    (cold,) = engine.generate([[1, 2]], max_new_tokens=8, temperature=1e-6)
    assert cold.tokens == engine.generate([[1, 2]], max_new_tokens=8)[0].tokens
    assert engine.generate([], max_new_tokens=3) == []


def test_a_tokenizer_of_another_model(engine: Engine, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    larger = AutoTokenizer.from_pretrained(tmp_path)
    larger.add_tokens([f"<{n}>" for n in range(99)])
    other = Engine(engine.backend, engine.layout, larger)
    assert f"holds token id {len(larger) - 1}; the vocabulary has {VOCABULARY}" in refused(
        lambda: other.generate(["def <98>"])
    )


TEMPLATES = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "is no template": "{% if %}",
    "asks for what is not there": "{{ messages[0]['parts'][0] }}",
    "divides by zero": "{{ 1 / 0 }}",
    "says nothing": "",
    "adds text and nothing": "{{ 'a' + none }}",
    "says half a character": "\ud800",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_that_fails(template: str, engine: Engine, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, TEMPLATE)
    broken = AutoTokenizer.from_pretrained(tmp_path)
    broken.chat_template = template or "{# nothing #}"
    assert "prompt 0" in refused(lambda: Engine(engine.backend, engine.layout, broken).generate([[USER]]))


# The command line


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return save_artifact(folder / "artifact", save_base(folder / "base", template=TEMPLATE))


def run(*arguments: Any, stdin: Any = None) -> Result:
    return CliRunner(env={"RETROFIT_DEVICE": "cpu"}).invoke(cli.main, [str(a) for a in arguments], input=stdin)


def ends_well(result: Result, code: int) -> None:
    assert result.exit_code == code, (result.exit_code, result.output)
    assert "not foreseen" not in result.stderr
    assert "Traceback" not in result.stderr


WRONG_OPTIONS: list[list[str]] = [
    ["--temperature", "nan"], ["--temperature", "inf"], ["--temperature", "-1"], ["--temperature", "1e-40"],
    ["--temperature", "warm"], ["--top-p", "0"], ["--top-p", "1.5"], ["--top-p", "nan"], ["--top-k", "0"],
    ["--top-k", "-1"], ["--top-k", "1.5"], ["--repetition-penalty", "0"], ["--repetition-penalty", "nan"],
    ["--repetition-penalty", "inf"], ["--max-new-tokens", "2.0"], ["--max-new-tokens", "0"],
    ["--max-new-tokens", "9" * 5000], ["--seed", str(2**63)], ["--seed", "-1"], ["--seed", "1e3"],
    ["--seed", "9" * 5000], ["--prepare", "0"], ["--prepare", "-1"], ["--prepare", "1.5"], ["--prepare", "9" * 5000],
    ["--prepare", "²"], ["--prepare", ""], ["--tree", "-1"], ["--tree", "1000000"], ["--stop", ""],
    ["--stop-token-id", "64"], ["--stop-token-id", "-1"], ["--stop-token-id", "9" * 5000], ["--threshold", "2"],
    ["--threshold", "nan"], ["--mode", "fast"], ["--strategy", ""], ["--batch-size", "0"],
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG_OPTIONS, ids=lambda options: " ".join(options)[:40])
def test_generate_with_wrong_options(options: list[str], made: Path) -> None:
    result = run("generate", made, TEXT, *options)
    ends_well(result, 2)
    assert result.stdout == ""


@pytest.mark.parametrize(
    "prompt", ["", "\udcff\udcfe", TEXT * 99, "def \ud83d"], ids=["empty", "bytes", "long", "half a character"]
)
def test_generate_with_wrong_prompts(prompt: str, made: Path) -> None:
    ends_well(run("generate", made, prompt, "--max-new-tokens", "2"), 2)


GOOD: list[list[str]] = [
    ["\x00"], ["\ufffd"], ["\U0001f40d"], ["<|im_end|>"], ["\r\n"], ["--", "--mode"], ["e\u0301" * 8], ["\u202e"],
    [TEXT, "--max-new-tokens", "9" * 40], [TEXT, "--top-k", "9" * 40], [TEXT, "--seed", str(2**63 - 1)],
    [TEXT, "--prepare", "99999999", "--strategy", "fused"], [TEXT, "--stop", "\udcff"], [TEXT, "--stop", "\x00"],
    [TEXT, "--temperature", "1e300", "--top-p", "1e-300"], [TEXT, "--prepare", "٣", "--strategy", "fused"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", GOOD, ids=lambda arguments: ascii(" ".join(arguments))[:40])
def test_generate_with_odd_but_allowed_input(arguments: list[str], made: Path) -> None:
    more = [] if "--max-new-tokens" in arguments else ["--max-new-tokens", "3"]
    ends_well(run("generate", made, *more, *arguments), 0)


LINES: dict[str, tuple[str | bytes, int]] = {
    "seed of nothing": ("/seed\n", 2),
    "seed too large": (f"/seed {2**63}\n", 2),
    "seed longer than Python reads": (f"/seed {'9' * 5000}\n", 2),
    "negative seed": ("/seed -1\n", 2),
    "seed in other digits": ("/seed ٣\ndef\n", 0),
    "square seed": ("/seed ²\n", 2),
    "seeds that run out": (f"/seed {2**63 - 1}\ndef\ndef\n", 2),
    "mode of nothing": ("/mode\n", 0),
    "slash": ("/\n", 2),
    "too long": (TEXT * 99 + "\n", 2),
    "bytes": (b"def\n\xff\xfe\n", 1),
    "nothing": ("", 0),
    "blank": ("\n \n\t\n", 0),
    "no end of line": ("def", 0),
    "NUL": ("\x00\n", 0),
}


@pytest.mark.parametrize(("lines", "code"), LINES.values(), ids=LINES)
def test_chat_from_a_pipe(lines: str | bytes, code: int, made: Path) -> None:
    ends_well(run("chat", made, "--max-new-tokens", "2", stdin=lines), code)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_template_that_fails_in_chat(command: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", template=TEMPLATES["raises"])
    made = save_artifact(tmp_path / "artifact", base)
    result = run(command, made, "--max-new-tokens", "2", stdin="def\n")
    ends_well(result, 2 if command == "chat" else 0)
    assert ("roles must alternate" in result.stderr) == (command == "chat")
