"""Quantised safetensors: refused by name, and unpacked as docs/bases.md says."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from retrofit.errors import UnsupportedModelError
from retrofit.hub import load_base

DOCS = Path(__file__).parents[2] / "docs" / "bases.md"
SIDE = 128


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A tiny model in fp8, each block of its projections with a scale of its own."""
    sizes = {"hidden_size": 2 * SIDE, "intermediate_size": 2 * SIDE, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)).to(torch.bfloat16)
    folder = tmp_path / "fp8"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("proj.weight")]:
        blocks = state[name].float().view(2, SIDE, 2, SIDE)
        scale = blocks.abs().amax((1, 3)) / 448
        state[name] = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(2 * SIDE, 2 * SIDE)
        state[f"{name}_scale_inv"] = scale
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [SIDE, SIDE], "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_blocks_of_fp8_are_refused_and_unpack_as_the_page_says(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModelError, match="fp8 in blocks of 128 x 128") as caught:
        load_base(str(fp8), offline=True)
    assert "docs/bases.md" in str(caught.value.hint)
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[-1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"MODEL"', repr(str(fp8))), {})
    unpacked = load_base(str(tmp_path / "model-bf16"), dtype="bfloat16", offline=True).model.state_dict()
    packed = load_file(fp8 / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    scale = packed[f"{name}_scale_inv"].repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)
    assert torch.equal(unpacked[name], (packed[name].float() * scale).bfloat16())
