"""Draft rows run W + alpha / rank * B A, with the alpha and the rank that the artifact was trained with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_conversion import run, tokenizer
from tiny_models import build
from torch import Tensor
from transformers import PreTrainedModel

from retrofit.adapters.rows import Block, SequenceRows
from retrofit.artifact import folder as artifacts
from retrofit.hub import load_base
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.engine import Engine
from retrofit.runtime.loading import fused_backend

RANK, ALPHA = 2, 10.0
TOKENS = [3, 14, 15, 9, 26, 5]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    out = tmp_path_factory.mktemp("scaled") / "out"
    run(out, texts, adapter__rank=RANK, adapter__alpha=ALPHA, draft__attention="causal", draft__block=len(TOKENS))
    return out


def merged(artifact: Path, scaling: float) -> PreTrainedModel:
    """The base with the artifact's matrices added to its weights."""
    model = build("llama")
    state = load_file(artifact / "adapter" / "adapter_model.safetensors")
    for name in (n for n in state if n.endswith(".lora_A.weight")):
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = state[name], state[name.replace("lora_A", "lora_B")]
        assert down.shape[0] == up.shape[1] == RANK and up.abs().max() > 1e-3, "an adapter that was trained"
        with torch.no_grad():
            model.get_submodule(path).weight += scaling * up @ down
    return model


def draft_logits(engine: Engine) -> Tensor:
    """Of a block that nothing precedes and that reads tokens: no row of its forward is a base row."""
    cache = KVCache(2, 64)
    engine.backend.forward(engine.backend.row_plan([SequenceRows(0, 0, TOKENS)]), cache)  # another sequence's
    rows = SequenceRows(1, 0, [], [Block(0, TOKENS)])
    return engine.backend.head(engine.backend.run_trunk(engine.backend.row_plan([rows]), cache))


@torch.inference_mode()
def own_logits(model: PreTrainedModel) -> Tensor:
    return model(torch.tensor([TOKENS])).logits[0]


def test_a_live_model_takes_the_adapter_at_its_own_scale(artifact: Path) -> None:
    engine = Engine.from_model(build("llama"), tokenizer(), adapter=artifact)
    right = own_logits(merged(artifact, ALPHA / RANK))
    with torch.inference_mode():
        torch.testing.assert_close(draft_logits(engine), right, rtol=1e-4, atol=1e-4)
    for parameter in engine.attached.parameters():
        parameter.requires_grad_(True)
    # Gradients are formed by hand, and the rows with them.
    torch.testing.assert_close(draft_logits(engine).detach(), right, rtol=1e-4, atol=1e-4)
    for wrong in (0.0, 1.0, ALPHA, RANK / ALPHA):
        assert (own_logits(merged(artifact, wrong)) - right).abs().max() > 0.01, "scales that would show"


def test_the_fused_backend_reads_the_same_scale(artifact: Path, model: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(str(model), device=device, with_model=False, need_tokenizer=False)
    backend = fused_backend(base, artifacts.read(artifact), device, "float32", "off", 16)
    state = load_file(artifact / "adapter" / "adapter_model.safetensors")
    for number, layer in enumerate(backend.weights.layers):
        up = state[f"base_model.model.model.layers.{number}.mlp.down_proj.lora_B.weight"]
        torch.testing.assert_close(layer.down.up.cpu(), ALPHA / RANK * up.T)
