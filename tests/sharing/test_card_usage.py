"""The lines of a card are run as they are printed, by whoever they are for, against a Hub that holds artifact and base.

What cannot run here is parsed: vLLM's command and SGLang's by our own `serve`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import done
from huggingface_hub import ModelCard
from loopback_hub import Hub
from reporting import only, small
from saved import save_artifact
from transformers import AutoModelForCausalLM

from retrofit import push
from retrofit.adapters.layout import DraftLayout
from retrofit.artifact import folder as artifact
from retrofit.artifact.card import card
from retrofit.runtime.loading import attach_artifact
from retrofit.sharing.usage import BASE, usage

NAME, MODEL = "user/adapter", "owner/base"
NOISE = DraftLayout(3, input="noise", attention="causal")
ALONE = {"rank": 2, "alpha": 4.0, "targets": ["q", "v"], "markov_rank": 0, "confidence": False}
IDS = torch.arange(20)[None] * 3 % 64


@pytest.fixture
def own(hub: Hub, base: Path, tmp_path: Path) -> Path:
    """An artifact of a base on the Hub, which retrofit, PEFT, vLLM and SGLang can all use."""
    revision = hub.add(MODEL, {path.name: path.read_bytes() for path in base.iterdir()})
    saved = artifact.read(save_artifact(tmp_path / "saved", base, NOISE, ALONE))
    named = {**saved.config["base"], "model": MODEL, "revision": revision, "local": False}
    measured = {"acceptance": {"conditional": {"greedy": [0.5] * 3, "sampled": [0.5, 0.5, 0.5]}}}
    text = card(MODEL, local=False, on_hub=True, greedy=[0.5] * 3, sampled=[0.5] * 3, block=3, added=1, share=0.1)
    return artifact.write(
        tmp_path / "own",
        **{name: getattr(saved, name) for name in ("adapter_config", "adapter_state", "heads")},
        config={**saved.config, "base": named, **measured},
        recipe_yaml="profile: frozen\n",
        card=text,
    )


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, lines) of each."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    found = [shlex.split(line) for kind, lines in blocks(text) if kind == "sh" for line in lines.splitlines()]
    assert all(words[0] == "retrofit" for words in found)
    return [words[1:] for words in found]


def python(text: str, word: str) -> dict[str, Any]:
    """What the block of Python with a word in it has defined when it was run."""
    [code] = [lines for kind, lines in blocks(text) if kind == "python" and word in lines]
    defined: dict[str, Any] = {}
    exec(code, defined)
    return defined


def test_retrofit(hub: Hub, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = push(own, NAME, uncertified=True).card
    [command] = [words for words in commands(text) if words[0] == "generate"]
    assert done(*command).strip()
    python(text, "import retrofit")["engine"].close()
    assert capsys.readouterr().out.strip()


def test_plain_peft(hub: Hub, own: Path) -> None:
    text = push(own, NAME, uncertified=True).card
    [code] = [lines for kind, lines in blocks(text) if "PeftModel" in lines]
    acting = python(text, "PeftModel")["model"](input_ids=IDS).logits
    asleep = python(re.sub(r"(?m)^config\.alora.*$", "", text), "PeftModel")["model"](input_ids=IDS).logits
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    assert f'revision="{artifact.read_config(own)["base"]["revision"]}"' in code
    assert torch.equal(asleep, base(IDS).logits)
    attached = attach_artifact(base, artifact.read(own))
    attached.gate.base_rows = 0
    torch.testing.assert_close(acting, base(IDS).logits)
    assert not torch.allclose(acting, asleep)


def test_engines(hub: Hub, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = push(own, NAME, uncertified=True).card
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("retrofit.serving.starting.installed", lambda: "0.32.0")
    vllm, export, sglang = [words for words in commands(text) if words[0] != "generate"]
    told = shlex.split(done(*vllm, "--print"))
    assert told[told.index("--port") + 1] == "8000" and told[told.index("--served-model-name") + 1] == MODEL
    assert done(*export).strip() == "uno-folder" and (tmp_path / "uno-folder" / "adapter_model.safetensors").is_file()
    told = shlex.split(done(*sglang))
    assert told[told.index("--uno-lora-path") + 1] == "uno-folder" and told[told.index("--model-path") + 1] == MODEL


def test_only_what_works_is_there(own: Path) -> None:
    config = artifact.read_config(own)
    changed: dict[str, dict[str, Any]] = {
        "mask": {"draft": {**config["draft"], "input": "mask"}},
        "gguf": {"base": {**config["base"], "gguf": {"file": "x.gguf", "kind": "Q4_1", "sha256": "0" * 64}}},
        "ours": {"base": {**config["base"], "model": "tiny", "revision": None}},
        "local": {"base": {**config["base"], "model": "folder", "revision": None, "local": True}},
    }
    found = {name: usage(NAME, {**config, **change}) for name, change in changed.items()}
    programs = {"PEFT": "PeftModel", "vLLM": "--engine vllm", "SGLang": "--engine sglang"}
    told = {name: [program for program, word in programs.items() if word in text] for name, text in found.items()}
    assert told == {
        "mask": ["PEFT", "vLLM"], "gguf": ["vLLM"], "ours": ["vLLM", "SGLang"], "local": ["PEFT", "vLLM", "SGLang"],
    }  # fmt: skip
    assert all(words[-2:] == ["--base", BASE] for words in commands(found["local"]))
    assert f'from_pretrained("{BASE}")' in found["local"]


def test_a_card_that_was_pulled_loads_what_it_is_pushed_to(hub: Hub, own: Path) -> None:
    first = push(own, NAME, uncertified=True).card
    (own / "README.md").write_text(first)
    again = push(own, "user/another", uncertified=True).card
    assert again == first.replace(NAME, "user/another").replace("name: adapter\n", "name: another\n")


def test_the_hub_reads_the_figures_of_a_report(hub: Hub, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "acceptance", "speed")
    report = small(monkeypatch, own, out=own)
    text = push(own, NAME, uncertified=True).card
    told = ModelCard(text).data.eval_results
    [held_out] = [one.metric_value for one in told if one.dataset_type == "held-out"]
    assert held_out == 1 + 0.5 + 0.25 + 0.125
    read = {(one.metric_type, one.metric_name): one.metric_value for one in told if one.dataset_type != "held-out"}
    for kind, name in (("tau", "tokens per verify cycle"), ("tpf", "tokens per forward")):
        assert read[kind, name] == report.data["figures"][kind]
    assert {name for name in report.data["figures"] if name.startswith("tokens_per_s_user")} == {
        f"tokens_per_s_user_batch_{batch}" for batch in (1, 2)
    }
    for batch in (1, 2):
        [rate] = [v for (kind, name), v in read.items() if kind == "tokens_per_s_user" and f"batch {batch}," in name]
        assert rate == report.data["figures"][f"tokens_per_s_user_batch_{batch}"]
    machine = report.section("compared")["hardware"]
    assert all(machine["cpu"] in name for _, name in read if "batch" in name)
    assert f"Measured by `{report.data['command']}`" in text
