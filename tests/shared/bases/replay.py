"""Drafting and verifying as two other programs do it, written from their contracts: it shares no code with ours.

    uno         `exporting/uno.py`
    nemotron    arXiv 2607.05722, linear self-speculation: the newest token and masks in one block with the adapter on,
                each of whose rows says what stands in its own place; then the drafts as plain causal rows

A Llama decoder in plain torch that knows adapter_config.json and whatever safetensors lie beside it.
"""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class Replay:
    """Greedy decoding of a request, two forwards a cycle, nothing cached.

    trunk: what stands before `layers` in the names of the adapter's tensors.
    """

    def __init__(self, base, folder, trunk="model"):
        self.config = json.loads((base / "config.json").read_text())
        self.weights = load_file(base / "model.safetensors")
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["peft_type"] == "LORA" and not settings.get("use_dora")
        self.trunk = trunk
        self.scale = settings["lora_alpha"] / settings["r"]
        self.lora = {}
        for path in folder.glob("*.safetensors"):
            self.lora |= load_file(path)

    def linear(self, x_TH, name, first):
        """first: the row from which the adapter acts."""
        out = x_TH @ self.weights[f"{name}.weight"].T
        own = f"base_model.model.{self.trunk}{name.removeprefix('model')}"
        down = self.lora.get(f"{own}.lora_A.weight")
        if down is not None:
            up = self.lora[f"{own}.lora_B.weight"]
            out[first:] += self.scale * (x_TH[first:] @ down.T @ up.T)
        return out

    def norm(self, x_TH, name):
        scale = torch.rsqrt(x_TH.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x_TH * scale * self.weights[f"{name}.weight"]

    def attention(self, x_TH, name, first, whole):
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
        later[first:, first:] &= not whole
        shares = scores_HTT.masked_fill(later, -torch.inf).softmax(-1)
        return self.linear(torch.einsum("hts,shd->thd", shares, value).reshape(T, -1), f"{name}.o_proj", first)

    def best(self, tokens, first, whole=False):
        """The likeliest token of each row; from row `first` on with the adapter, and causally or in a block."""
        x_TH = self.weights["model.embed_tokens.weight"][tokens]
        for n in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{n}"
            x_TH = x_TH + self.attention(self.norm(x_TH, f"{name}.input_layernorm"), f"{name}.self_attn", first, whole)
            y_TH = self.norm(x_TH, f"{name}.post_attention_layernorm")
            gate, up = (self.linear(y_TH, f"{name}.mlp.{one}_proj", first) for one in ("gate", "up"))
            x_TH = x_TH + self.linear(F.silu(gate) * up, f"{name}.mlp.down_proj", first)
        logits = self.norm(x_TH, "model.norm") @ self.weights["lm_head.weight"].T
        return logits.argmax(-1).tolist()

    def uno(self, prompt, count, width, noise):
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

    def nemotron(self, prompt, count, width, mask):
        """As `uno`, drafts of `linear_spec_generate`; width: its `block_length`; mask: its `mask_token_id`."""
        tokens, accepted = [*prompt, self.best(prompt, len(prompt))[-1]], []
        while len(tokens) < len(prompt) + count:
            first = len(tokens) - 1
            drafts = self.best([*tokens, *[mask] * (width - 1)], first, whole=True)[first + 1 :]
            verified = self.best([*tokens, *drafts], first + width)[first:]
            kept = 0
            while kept < len(drafts) and drafts[kept] == verified[kept]:
                kept += 1
            tokens += [*drafts[:kept], verified[kept]]
            accepted.append(kept)
        return tokens[len(prompt) :][:count], accepted
