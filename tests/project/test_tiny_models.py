"""The tiny models are worth testing on: varied output, clear margins, and the layers their names promise."""

import pytest
import torch
from tiny_models import ARCHITECTURES, REFUSED, VOCABULARY, WINDOW, build
from transformers import PreTrainedModel

MARGIN = 1e-5  # below this an fp32 argmax may flip between two correct implementations
PROMPT = 2 * WINDOW  # long enough that a sliding layer no longer sees the first token
NEW = 16
MIXED_LAYERS = ["qwen2_window", "qwen3_window", "gemma2", "gemma3"]
ALL_LAYERS_SLIDE = ["mistral_window", "phi3_window"]


def prompts(count: int = 3) -> torch.Tensor:
    """[count, PROMPT] random token ids, the same every time."""
    return torch.randint(0, VOCABULARY, (count, PROMPT), generator=torch.Generator().manual_seed(1))


def greedy(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    """[PROMPT + NEW] ids of transformers' own greedy decoding."""
    return model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=NEW, do_sample=False
    )[0]


@torch.no_grad()
def last_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None], use_cache=False).logits[0, -1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_output_varies_and_margins_are_clear(name: str) -> None:
    model = ARCHITECTURES[name]()
    assert not model.training and model.dtype == torch.float32
    outputs = [greedy(model, prompt) for prompt in prompts()]
    assert all(len(output) == PROMPT + NEW for output in outputs)
    assert all(len(set(output[PROMPT:].tolist())) > 1 for output in outputs)

    model.set_experts_implementation("eager")  # grouped_mm knows no fp64
    model.double()
    for output in outputs:
        with torch.no_grad():
            best = model(output[None], use_cache=False).logits[0, PROMPT - 1 : -1].topk(2)
        assert torch.equal(best.indices[:, 0], output[PROMPT:])
        assert (best.values[:, 0] - best.values[:, 1]).min() > MARGIN


@pytest.mark.parametrize("name", [*ARCHITECTURES, *REFUSED])
def test_seed_decides_the_weights_and_leaves_the_callers_random_state(name: str) -> None:
    state = torch.get_rng_state()
    first, same, other = build(name, seed=3), build(name, seed=3), build(name, seed=4, eos_token_id=5)
    assert torch.equal(torch.get_rng_state(), state)
    tokens = prompts(1)[0]
    assert torch.equal(last_logits(first, tokens), last_logits(same, tokens))
    assert not torch.equal(last_logits(first, tokens), last_logits(other, tokens))
    assert (first.config.eos_token_id, other.config.eos_token_id) == (None, 5)
    assert (first.generation_config.eos_token_id, other.generation_config.eos_token_id) == (None, 5)


@pytest.mark.parametrize("name", MIXED_LAYERS)
def test_windowed_models_have_sliding_and_full_layers(name: str) -> None:
    config = build(name).config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.sliding_window == WINDOW


@pytest.mark.parametrize("name", MIXED_LAYERS + ALL_LAYERS_SLIDE)
def test_the_window_matters(name: str) -> None:
    """Widening the window to the whole prompt changes the logits; masks are made from the config anew."""
    model, tokens = build(name), prompts(1)[0]
    narrow = last_logits(model, tokens)
    model.config.sliding_window = PROMPT
    assert (last_logits(model, tokens) - narrow).abs().max() > 1e-3
