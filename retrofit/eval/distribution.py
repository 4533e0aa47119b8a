"""Does `ar` draw from the model's distribution?  Chi-square on three tokens in a row over a tiny vocabulary.

The code under test is the engine's; the model is a random one of five words, small enough that the
probability of every three-token continuation is computed exactly, in fp64, with transformers' processors.
Three tokens, because noise that repeats from one output index to the next leaves the distribution of every
single token right.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from retrofit.adapters.layout import DraftLayout
from retrofit.eval.exactness import Verdict
from retrofit.eval.replay import Sampling
from retrofit.runtime.backends.interface import Backend
from retrofit.runtime.engine import Engine

VOCABULARY, TOKENS = 5, 3
ALPHA = 1e-3
LEAST_EXPECTED = 5.0
"""Cells expected less often are pooled, as the chi-square approximation asks for."""
CASES: tuple[tuple[tuple[int, ...], Sampling], ...] = (
    ((0,), Sampling(0.8)),
    ((3, 1, 4), Sampling(1.0, top_k=4)),
    ((4, 3, 4), Sampling(1.0, top_p=0.9)),
    ((0,), Sampling(1.3, repetition_penalty=2.0)),
)
"""Prompts after which much can come, and, under the penalty, words that only the output can make seen."""


def tiny_model() -> PreTrainedModel:
    """A random one-layer model of five words, the same at every call; its distributions are far from flat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config).float().eval()


def tiny_engine(backend: Backend | None) -> Engine:
    """The tiny model in fp32, on the kind of backend, the level and the device that `backend` is of; None: `hf`."""
    model = tiny_model()
    if backend is None or backend.name != "fused":
        engine = Engine.from_model(model, exact="off")
        if backend is not None:
            kept: Any = backend
            engine.backend.hold_as(kept)  # type: ignore[attr-defined]
        return engine
    from retrofit.runtime.backends.fused.backend import FusedGQA

    layout, tensors = DraftLayout(), model.state_dict()
    own = FusedGQA(model.config, lambda name: tensors[name], layout, device=backend.device, exact=backend.exact)
    return Engine(own, layout, None)


def distribution(samples: int, backend: Backend | None = None) -> Verdict:
    """`samples` continuations for each case, seeds 0, 1, ...; Holm-corrected over the cases.

    backend: what the tiny model runs on, see `tiny_engine`.
    """
    exact = [continuations(tiny_model().double(), prompt, sampling) for prompt, sampling in CASES]
    engine = tiny_engine(backend)
    cases, values = [], []
    for (prompt, sampling), probability in zip(CASES, exact, strict=True):
        results = engine.generate(
            [prompt] * samples,
            "ar",
            max_new_tokens=TOKENS,
            ignore_eos=True,
            batch_size=64,
            **sampling.options(),
        )
        statistic, freedom, p_value = chi_square(Counter(tuple(r.tokens) for r in results), probability, samples)
        values.append(p_value)
        cases.append(
            {
                "prompt": list(prompt),
                **sampling.options(),
                "chi_square": statistic,
                "freedom": freedom,
                "p": p_value,
            }
        )
    rejected = holm(values, ALPHA)
    detail = f"smallest p {min(values):.2g} of {len(values)} cases, {samples} samples each"
    return Verdict(not rejected, detail, {"samples": samples, "alpha": ALPHA, "cases": cases})


@torch.inference_mode()
def continuations(model: PreTrainedModel, prompt: Sequence[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every three-token continuation, the chain rule over exact fp64 distributions."""
    texts = list(itertools.product(range(VOCABULARY), repeat=TOKENS))
    ids = torch.tensor([[*prompt, *text] for text in texts])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    chance = torch.ones(len(texts), dtype=torch.float64)
    for step in range(TOKENS):
        end = len(prompt) + step
        scores = sampling.processors()(ids[:, :end], logits[:, end - 1])
        chance *= scores.softmax(dim=-1).gather(1, ids[:, end : end + 1])[:, 0]
    return dict(zip(texts, chance.tolist(), strict=True))


def chi_square(
    counts: Counter[tuple[int, ...]], probability: dict[tuple[int, ...], float], samples: int
) -> tuple[float, int, float]:
    """Pearson's statistic, its degrees of freedom and the p-value; 0 where something impossible was drawn."""
    cells: list[list[float]] = []
    pool = [0.0, 0.0]
    for text, chance in probability.items():
        expected, seen = samples * chance, float(counts[text])
        if chance == 0 and seen:
            return float("inf"), 0, 0.0
        if expected >= LEAST_EXPECTED:
            cells.append([expected, seen])
        else:
            pool = [pool[0] + expected, pool[1] + seen]
    if pool[0] >= LEAST_EXPECTED or not cells:
        cells.append(pool)
    else:
        smallest = min(cells)
        smallest[0], smallest[1] = smallest[0] + pool[0], smallest[1] + pool[1]
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    freedom = max(1, len(cells) - 1)
    above = torch.special.gammaincc(
        torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(statistic / 2, dtype=torch.float64)
    )
    return statistic, freedom, float(above)


def holm(values: Sequence[float], alpha: float) -> list[int]:
    """Indices rejected by Holm's step-down procedure (S. Holm, 1979), family-wise error rate `alpha`."""
    rejected: list[int] = []
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[index] >= alpha / (len(values) - rank):
            break
        rejected.append(index)
    return rejected
