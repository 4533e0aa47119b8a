"""Which conversations are put as in training, and what is said where they are not."""

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, done, refused, run
from saved import TEMPLATE, save_artifact, save_base
from tiny_models import VOCABULARY
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from retrofit.artifact import folder as artifacts
from retrofit.errors import ArtifactError, UsageError
from retrofit.runtime import prompts
from retrofit.runtime.chat_template import TAKEN, check_arguments, differences, identity
from retrofit.runtime.engine import Engine
from retrofit.runtime.params import SamplingParams

pytestmark = pytest.mark.usefixtures("somewhere")

ASK = [{"role": "user", "content": "def"}]
FAST = TEMPLATE.replace("assistant:", "{{ 'fast' if fast is defined and fast else 'slow' }}:")


class Tokenizer:
    """Has a template and nothing else."""

    def __init__(self, template: Any) -> None:
        self.chat_template = template


def differ(trained: dict[str, Any], template: Any = FAST, **arguments: Any) -> list[str]:
    return differences(identity(Tokenizer(FAST), trained), Tokenizer(template), arguments)


def test_no_argument_of_transformers_reaches_a_template() -> None:
    given = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert set(TAKEN) == given - {"kwargs"} | {"messages"}


@pytest.mark.parametrize("arguments", [{"tokenize": False}, {"no name": 1}, {3: 1}, [], "fast"])
def test_what_is_no_argument_of_a_template_is_refused(arguments: Any) -> None:
    with pytest.raises(UsageError, match="template"):
        check_arguments(arguments, "template")
    with pytest.raises(UsageError, match="template"):
        SamplingParams(template=arguments)


@pytest.mark.parametrize(
    ("trained", "given"),
    [({}, {}), ({"fast": True}, {"fast": True}), ({"fast": [True, False]}, {"fast": False}), ({"fast": [1, 2]}, {})],
)
def test_what_was_trained_is_nothing_to_speak_of(trained: dict[str, Any], given: dict[str, Any]) -> None:
    assert differ(trained, **given) == []
    assert differ(trained, {"default": FAST, "tool_use": "x"}, **given) == [], "the one that is used counts"
    assert differences(None, Tokenizer("other"), given) == [], "an older artifact says nothing"


@pytest.mark.parametrize(
    ("trained", "given", "words"),
    [
        ({}, {"fast": True}, "fast is true, and was left to the template in training"),
        ({"fast": False}, {}, "fast is left to the template, and was false in training"),
        ({"fast": False}, {"fast": True}, "give fast=false"),
        ({"fast": [1, 2]}, {"fast": 3}, "fast is 3, and was 1 or 2 in training"),
    ],
)
def test_other_arguments_are_told(trained: dict[str, Any], given: dict[str, Any], words: str) -> None:
    (line,) = differ(trained, **given)
    assert words in line and "fewer drafts may be accepted" in line


def test_another_template_is_told() -> None:
    for other in (FAST + " ", "", None):
        (line,) = differ({}, other)
        assert "chat template is not the one the adapter was trained with" in line
    assert identity(Tokenizer(None), {}) is None


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Trained with `fast` true on FAST."""
    base = save_base(tmp_path / "base", template=FAST)
    return save_artifact(tmp_path / "out", base, template=identity(Tokenizer(FAST), {"fast": True}))


def test_an_engine_warns_once_and_of_messages_only(artifact: Path) -> None:
    with Engine.load(artifact, device="cpu") as engine, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.generate(["def", [1, 2]], max_new_tokens=1)
        engine.generate([ASK], max_new_tokens=1, template={"fast": True})
        assert caught == []
        for _ in range(2):
            engine.generate([ASK, ASK], max_new_tokens=1)
        assert ["fast is left to the template" in str(one.message) for one in caught] == [True]
        assert caught[0].filename == __file__, "it points to who asked"
        engine.tokenizer.chat_template = TEMPLATE
        engine.generate([ASK], max_new_tokens=1, template={"fast": True})
        assert len(caught) == 2 and "is not the one" in str(caught[1].message)


def test_the_arguments_reach_the_template(artifact: Path) -> None:
    with Engine.load(artifact, device="cpu") as engine:
        for given, word in ((None, "slow:"), ({"fast": True}, "fast:")):
            tokens = prompts.encode(ASK, "it", engine.tokenizer, VOCABULARY, given)
            assert tokens[-3:] == engine.tokenizer(word)["input_ids"][-3:]
            (asked,) = engine.generate([ASK], max_new_tokens=8, template=given)
            assert asked.tokens == engine.generate([tokens], max_new_tokens=8)[0].tokens


def test_the_command_line_notes_what_differs(artifact: Path) -> None:
    ask = ["generate", artifact, "def", "--max-new-tokens", "1"]
    assert "note: the template argument fast" in run(*ask, "--chat").stderr
    assert "note: the template argument" not in run(*ask, "--chat", "--template", "fast=true").stderr
    assert "note: the template argument" not in run(*ask).stderr, "raw text goes through no template"
    assert "add --chat" in refused(run(*ask, "--template", "fast=true"), 2)
    assert "must be NAME=V" in refused(run(*ask, "--chat", "--template", "fast"), 2)
    assert "no argument of a template's own" in refused(run(*ask, "--chat", "--template", "tokenize=1"), 2)
    talk = run("chat", artifact, "--max-new-tokens", "1", "--template", "fast=false", stdin="def\nclass\n")
    assert talk.stderr.count("fast is false, and was true in training") == 1


def test_a_conversion_keeps_the_template_and_its_arguments(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", template=FAST)
    talk = {"messages": [*ASK, {"role": "assistant", "content": "class Stack: pass"}]}
    (tmp_path / "talk.jsonl").write_text((json.dumps(talk) + "\n") * 4)
    keys = [f"data.source={tmp_path / 'talk.jsonl'}", "data.template.fast=[true,false]"]
    done("convert", base, *SHORT, *keys, "data.max_length=64", "-o", "out")
    kept = artifacts.read(Path("out")).config["template"]
    assert kept == identity(AutoTokenizer.from_pretrained(base), {"fast": [True, False]})
    assert "fast" in Path("out/recipe.yaml").read_text()


@pytest.mark.parametrize("broken", [{"sha256": 3, "arguments": {}}, {"sha256": "x", "arguments": []}])
def test_a_damaged_record_is_refused(tmp_path: Path, broken: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="`template"):
        artifacts.read(save_artifact(tmp_path / "out", save_base(tmp_path / "base"), template=broken))
