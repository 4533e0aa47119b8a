"""A fused engine beside the `hf` engine of the same tiny random model: what the tests of the fused backend share.

Without a GPU the kernels run in Triton's interpreter, where a forward takes about a second.  So the models are smaller
than those of `tiny_models.py` (hidden 16, two heads, vocabulary 32), blocks have two rows, and where a test is about
the steps rather than about the decoder, `plain_decoder` puts the plain-torch specification in place of its kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decoding import randomise
from tiny_models import CONFIGS, randomize
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.backends.fused import backend as fused_gqa
from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.device import loop as device_loop
from retrofit.runtime.device.steps import DeviceSteps
from retrofit.runtime.engine import Engine
from retrofit.runtime.kernels import reference
from retrofit.runtime.kernels.state import State
from retrofit.runtime.rules.tree import DraftTree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 32
LAYOUT = DraftLayout(block=2)
WIDE = DraftLayout(block=3)
ROWS = 16
"""Rows of the tests' bucket: two requests' chains of two drafts with all their blocks."""
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def small(name: str, eos: Sequence[int] = (), **changes: Any) -> PreTrainedModel:
    """A model of `tiny_models.py`, smaller; fp32, on the CPU, the same whenever it is built."""
    config = CONFIGS[name]()
    for key, value in {**SMALL, **changes}.items():
        setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-config.num_hidden_layers :]
    config.eos_token_id = list(eos) or None
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0)
    return model.eval()


def fused(hf: Engine, checkpoint: dict[str, Tensor], exact: str = "off", rows: int = ROWS, **changes: Any) -> Engine:
    """A fused engine with the weights and the adapter of an `hf` engine, copied."""
    attached = hf.attached
    options = {"device": DEVICE, "dtype": torch.float32, "exact": exact, "rows": rows, **changes}
    backend = FusedGQA(
        attached.model.config,
        lambda name: checkpoint[name].clone(),
        attached.layout,
        copy.deepcopy(attached.heads),
        attached.adapter_state(),
        1.0,
        **options,
    )
    return Engine(backend, attached.layout, hf.tokenizer)


def pair(
    model: PreTrainedModel, layout: DraftLayout = LAYOUT, exact: str = "off", rows: int = ROWS, tokenizer: Any = None
) -> tuple[Engine, Engine]:
    """(fused engine, hf engine) of a model, with the same random adapter."""
    checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hf = randomise(Engine.from_model(model, tokenizer, layout=layout))
    return fused(hf, checkpoint, exact, rows), hf


def poisoned(hf: Engine, checkpoint: dict[str, Tensor], **options: Any) -> Engine:
    """A fused engine whose LoRA, mask vector and heads are NaN."""
    kept = [parameter.detach().clone() for parameter in hf.attached.parameters()]
    with torch.no_grad():
        for parameter in hf.attached.parameters():
            parameter.fill_(float("nan"))
        engine = fused(hf, checkpoint, **options)
        for parameter, value in zip(hf.attached.parameters(), kept, strict=True):
            parameter.copy_(value)
    return engine


def plain_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the decoder on the kernels' plain-torch specification; what happens between forwards stays as it is.

    On a GPU the kernels themselves are fast, and the specification could not be recorded.
    """
    if DEVICE != "cpu":
        return

    def row_attention(*args: Any, split: int = 0) -> Tensor:
        return reference.row_attention(*args)

    for name in ("embed_rms_norm", "add_rms_norm", "qkv", "swiglu"):
        monkeypatch.setattr(fused_gqa, name, getattr(reference, name))
    monkeypatch.setattr(fused_gqa, "row_attention", row_attention)


def plain_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise targets and drafts: noise costs the interpreter more than all else between two forwards."""
    if DEVICE != "cpu":
        return
    monkeypatch.setattr(fused_gqa, "choose", reference.choose)
    for name in ("candidates", "draft"):
        monkeypatch.setattr(device_loop, name, getattr(reference, name))


class Planted:
    """An override for `DeviceLoop`: drafts are the true continuation of each request, found by its seed, but for
    planted mistakes, keyed by (seed, output index).  Tensor operations only, so that a GPU can record it.

    Of a tree's siblings the one whose rank comes up for (seed, output index) holds the truth, or none does.
    """

    def __init__(
        self,
        truth: dict[int, Sequence[int]],
        mistakes: float = 0.25,
        vocab: int = VOCABULARY,
        tree: DraftTree | None = None,
    ):
        longest = max(map(len, truth.values())) + 64
        self.truth = torch.zeros(max(truth) + 1, longest, dtype=torch.int64)
        for seed, tokens in truth.items():
            self.truth[seed, : len(tokens)] = torch.tensor(list(tokens))
        drawn = torch.Generator().manual_seed(3)
        self.wrong = torch.rand(self.truth.shape, generator=drawn) < mistakes
        widest = 1 if tree is None else 1 + max(tree.ranks)
        self.holds = torch.randint(0, widest + (mistakes > 0), self.truth.shape, generator=drawn)
        self.truth, self.wrong, self.holds = (t.to(DEVICE) for t in (self.truth, self.wrong, self.holds))
        self.vocab, self.tree, self.calls = vocab, tree, 0
        if tree is not None:
            self.ranks, self.depths = (torch.tensor(v[1:], device=DEVICE) for v in (tree.ranks, tree.depths))

    def __call__(self, state: State) -> None:
        self.calls += 1
        seed, index = state.seed.clamp(0, len(self.truth) - 1), state.length - state.origin
        nodes = 16 if self.tree is None else len(self.ranks)
        ahead = torch.arange(nodes, device=seed.device) if self.tree is None else self.depths - 1
        place = (index[:, None] + ahead).clamp(0, self.truth.shape[1] - 1)
        true = self.truth[seed[:, None], place]
        if self.tree is None:
            drafts = (true + self.wrong[seed[:, None], place]) % self.vocab
        else:
            right = self.holds[seed[:, None], place] == self.ranks
            drafts = torch.where(right, true, (true + 1 + self.ranks) % self.vocab)
        state.drafts[:, :nodes] = drafts


def planted(engine: Engine, override: Callable[[State], None] | None) -> Engine:
    """The engine, its drafts changed by `override`."""
    stepper = engine.backend.stepper

    def with_override(*args: Any) -> Any:
        steps = stepper(*args)
        if isinstance(steps, DeviceSteps):
            steps.loop.override = override
        return steps

    engine.backend.stepper = with_override  # type: ignore[method-assign]
    return engine


def cycles(engine_result: Any) -> tuple[int, list[int], list[int]]:
    """(forwards after prefill, accepted, verified) of a result.

    Kinds of forward are not compared: a step on the device always holds its blocks, so where nothing is left to be
    prepared it counts as `fused` or `draft` what the host's plan calls `verify` or `ar`.
    """
    stats = engine_result.stats
    return stats.decode_forwards, stats.accepted, stats.verified
