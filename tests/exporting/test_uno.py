"""UNO folders, replayed by a small model of the engine they are for: its tokens and accepted drafts are ours.

The replay is written from that engine's contract (`exporting/uno.py`) and shares no code with ours: a Llama decoder in
plain torch that knows adapter_config.json and whatever safetensors lie beside it.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from commands import done, refused, run
from safetensors.torch import load_file
from saved import save_artifact

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.artifact import folder as artifacts
from retrofit.errors import UsageError
from retrofit.exporting.export import export
from retrofit.exporting.uno import WANTED, files
from retrofit.recipes.schema import by_key, load_recipe
from retrofit.runtime.engine import Engine
from retrofit.runtime.plan import noise_token

LAYOUT = DraftLayout(3, input="noise", attention="causal")
ALONE = {"rank": 4, "alpha": 32.0, "targets": list(ROLES), "markov_rank": 0, "confidence": False}
PROMPTS = [[5, 9, 2, 33, 7, 1, 60, 12], [4, 5], *([n] * 5 for n in range(6))]
NEW = 60
VOCABULARY = 64


class Replay:
    """Greedy decoding of a request, two forwards a cycle, nothing cached."""

    def __init__(self, base, folder):
        self.config = json.loads((base / "config.json").read_text())
        self.weights = load_file(base / "model.safetensors")
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["peft_type"] == "LORA" and not settings.get("use_dora")
        self.scale = settings["lora_alpha"] / settings["r"]
        self.lora = {}
        for path in folder.glob("*.safetensors"):
            self.lora |= load_file(path)

    def linear(self, x_TH, name, first):
        """first: the row from which the adapter acts."""
        out = x_TH @ self.weights[f"{name}.weight"].T
        down = self.lora.get(f"base_model.model.{name}.lora_A.weight")
        if down is not None:
            up = self.lora[f"base_model.model.{name}.lora_B.weight"]
            out[first:] += self.scale * (x_TH[first:] @ down.T @ up.T)
        return out

    def norm(self, x_TH, name):
        scale = torch.rsqrt(x_TH.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x_TH * scale * self.weights[f"{name}.weight"]

    def attention(self, x_TH, name, first):
        T, heads, groups = len(x_TH), self.config["num_attention_heads"], self.config["num_key_value_heads"]
        query, key, value = (
            self.linear(x_TH, f"{name}.{one}_proj", first).view(T, -1, self.config["hidden_size"] // heads)
            for one in "qkv"
        )
        D = query.shape[-1]
        angle_TD = torch.arange(T)[:, None] / 10_000 ** (torch.arange(0, D, 2) / D)
        cos, sin = (f(torch.cat([angle_TD, angle_TD], -1))[:, None] for f in (torch.cos, torch.sin))
        query, key = (
            one * cos + torch.cat([-one[..., D // 2 :], one[..., : D // 2]], -1) * sin for one in (query, key)
        )
        key, value = (one.repeat_interleave(heads // groups, 1) for one in (key, value))
        scores_HTT = torch.einsum("thd,shd->hts", query, key) * D**-0.5
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        shares = scores_HTT.masked_fill(later, -torch.inf).softmax(-1)
        return self.linear(torch.einsum("hts,shd->thd", shares, value).reshape(T, -1), f"{name}.o_proj", first)

    def best(self, tokens, first):
        """The likeliest token after each row, causally; from row `first` on with the adapter."""
        x_TH = self.weights["model.embed_tokens.weight"][tokens]
        for n in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{n}"
            x_TH = x_TH + self.attention(self.norm(x_TH, f"{name}.input_layernorm"), f"{name}.self_attn", first)
            y_TH = self.norm(x_TH, f"{name}.post_attention_layernorm")
            gate, up = (self.linear(y_TH, f"{name}.mlp.{one}_proj", first) for one in ("gate", "up"))
            x_TH = x_TH + self.linear(F.silu(gate) * up, f"{name}.mlp.down_proj", first)
        logits = self.norm(x_TH, "model.norm") @ self.weights["lm_head.weight"].T
        return logits.argmax(-1).tolist()

    def decode(self, prompt, count, width, noise):
        """(tokens, accepted drafts of each cycle); width: `--speculative-num-draft-tokens`; noise: position -> id."""
        tokens, accepted = [*prompt, self.best(prompt, len(prompt))[-1]], []
        while len(tokens) < len(prompt) + count:
            end = len(tokens)
            read = [noise(end + n) for n in range(width - 1)]
            root, *drafts = self.best(tokens + read, end)[end - 1 :]
            verified = self.best([*tokens, root, *drafts], end + width)[end:]
            kept = 0
            while kept < len(drafts) and drafts[kept] == verified[kept]:
                kept += 1
            tokens += [root, *drafts[:kept], verified[kept]]
            accepted.append(kept)
        return tokens[len(prompt) :][:count], accepted


@pytest.fixture
def fit(base, tmp_path):
    return save_artifact(tmp_path / "fit", base, LAYOUT, ALONE)


def test_the_engine_it_is_for_says_what_we_say(fit, base, tmp_path):
    folder = export(fit, "uno", tmp_path / "uno").folder
    width = int((folder / "README.md").read_text().split("--speculative-num-draft-tokens ")[1].split()[0])
    assert width == LAYOUT.block + 1
    replay, wrong = Replay(base, folder), Replay(base, folder)
    wrong.scale = -replay.scale
    with Engine.load(fit, base=str(base), dtype="float32") as engine:
        ours = engine.generate(PROMPTS, strategy="two_forward", max_new_tokens=NEW)
    kept, told_apart = 0, False
    for n, (prompt, result) in enumerate(zip(PROMPTS, ours, strict=True)):
        tokens, accepted = replay.decode(prompt, NEW, width, lambda place: noise_token(n, place, VOCABULARY))  # noqa: B023
        assert tokens == result.tokens
        assert accepted[:-2] == result.stats.accepted[: len(accepted) - 2]  # the last drafts are cut to the budget
        kept += sum(accepted[:-2])
        other, others = wrong.decode(prompt, NEW, width, lambda place: noise_token(n, place, VOCABULARY))  # noqa: B023
        assert other == tokens  # a wrong scale costs drafts, never a token
        told_apart |= accepted != others
    assert kept > 5 and told_apart


def test_what_does_not_qualify_is_told_at_once(made, base, tmp_path):
    refusal = refused(run("export", made, "--format", "uno", "-o", tmp_path / "out"), 2)
    assert "draft.input is mask, not noise; draft.attention is bidirectional, not causal; adapter.mark" in refusal
    assert "draft.input=noise draft.attention=causal adapter.markov_rank=0 adapter.confidence=false" in refusal
    assert "draft.shift" not in refusal and not (tmp_path / "out").exists()
    one = save_artifact(tmp_path / "one", base, LAYOUT, ALONE | {"confidence": True})
    with pytest.raises(UsageError, match=r"uno: adapter\.confidence is true, not false$"):
        export(one, "uno", tmp_path / "out")


def test_a_strangers_words_are_no_commands(fit, tmp_path):
    artifact = artifacts.read(fit)
    artifact.config["base"]["revision"] = "$(touch x)"
    text = files(artifact, "a/b; touch x\n")["README.md"].decode()
    assert "--model-path PATH-OF-THE-BASE --revision '$(touch x)' " in text and "touch x\n" not in text


def test_the_recipe_qualifies():
    keys = by_key(load_recipe("uno"))
    assert {key: keys[key] for key in WANTED} == WANTED


def test_it_says_how_it_is_started(fit, base, tmp_path):
    text = files(artifacts.read(fit), "owner/model")["README.md"].decode()
    assert "--model-path owner/model --attention-backend fa3" in text and "base_model: owner/model\n" in text
    assert "alpha 32," in text and "not run" in text
    assert done("export", fit, "--format", "uno", "-o", tmp_path / "out").strip() == str(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
