"""The `hf` backend: a model's own transformers modules, driven by row plans.

All rows of a forward travel as one packed sequence [1, N]; the plan goes along as a keyword argument and arrives in the
attention function of `attention.py`, which keeps base K/V itself (the model runs with `use_cache=False`) and lets every
row see what the plan says.  Any decoder that calls transformers' AttentionInterface works; the others are refused by
name.  The model's configuration is set for the forward and restored after it, so a live model keeps working.

Not here: which rows to run, sampling, acceptance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from retrofit.adapters.attach import Attached
from retrofit.adapters.gated_lora import Gate
from retrofit.adapters.heads import Heads
from retrofit.adapters.roles import trunk_of
from retrofit.adapters.rows import RowPlan, SequenceRows
from retrofit.runtime.backends.attention import ATTENTION, ForwardContext
from retrofit.runtime.backends.interface import Output, eos_set
from retrofit.runtime.backends.load_check import check_model
from retrofit.runtime.backends.refused import refuse_unsupported
from retrofit.runtime.cache import KVCache
from retrofit.runtime.sampling import SamplingParams, choose

FEW_ROWS = 128
"""Up to here routed experts run `batched_mm`, whose rows do not depend on each other's bits; it gathers a lot."""
CACHE_STEP = 256
"""The K/V cache grows in steps of so many positions."""
GATHER_BYTES = 1 << 28
"""Expert weights that one `batched_mm` call may gather; more rows run in several calls, with the same bits."""


def wrap(model: PreTrainedModel, build: Callable[[], Attached]) -> tuple[Attached, HFBackend]:
    """Attach an adapter and a backend to a model, or leave the model as it was.  Raises UnsupportedModelError."""
    refuse_unsupported(model)
    attached = build()
    try:
        return attached, HFBackend(model, attached.gate, attached.heads, attached.layout.causal)
    except BaseException:
        attached.detach()
        raise


class VocabHead:
    """The model's own way from last hidden state to logits: projection, then soft-cap or scaling."""

    def __init__(self, model: PreTrainedModel):
        self.linear: nn.Module = model.get_output_embeddings()
        self.project = outermost(model, self.linear, beside=trunk_of(model))
        """What holds it: itself, or in BERT's family a block of its own with a layer before it."""
        config = model.config.get_text_config()
        self.vocab = int(self.linear.weight.shape[0])
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> [N, V]."""
        logits: Tensor = self.project(hidden_NH)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class HFBackend:
    """Runs row plans through a transformers model."""

    name = "hf"
    most_rows: int | None = None
    most_nodes: int | None = None
    prefill_alone = False

    def __init__(self, model: PreTrainedModel, gate: Gate, heads: Heads | None = None, causal_blocks: bool = False):
        """Raises UnsupportedModelError, naming what it is, for a model that cannot be driven by row plans."""
        self.model = model
        self.was_training = model.training
        model.eval()  # dropout and router noise have no place in decoding, nor in the teacher of a drafter
        self.config = model.config.get_text_config()
        self.gate = gate
        self.heads = heads
        self.causal_blocks = causal_blocks
        self.trunk = trunk_of(model)
        self.embedding = model.get_input_embeddings()
        self.head = VocabHead(model)
        self.per_layer: Callable[[Tensor], Tensor] | None = per_layer_inputs(self.trunk)
        self.device = self.embedding.weight.device
        self.dtype = self.embedding.weight.dtype
        self.work_per_row = 2.0 * sum(p.numel() for p in model.parameters())
        """About how many floating-point operations a row costs."""
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos = getattr(self.config, "eos_token_id", None) if eos is None else eos
        self.eos = eos_set(eos)
        self.context_length = int(self.config.max_position_embeddings)
        self.rope_boundary = rope_boundary(self.config)
        if self.rope_boundary is not None and self.config.model_type != "phi3":
            # Only Phi-3's own code recomputes its cache at the crossing, so only there is there something to equal.
            self.context_length, self.rope_boundary = self.rope_boundary, None
        self._undone = [separate_experts(model, gate)]
        try:
            check_model(self)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the live model back as it was."""
        while self._undone:
            self._undone.pop()()
        self.model.train(self.was_training)

    def until_closed(self, undo: Callable[[], None]) -> None:
        """Something was done to the model: undo it when this is closed."""
        self._undone.append(undo)

    def lanes(self, requests: int) -> int:
        return requests

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        return KVCache(slots, -(-capacity // CACHE_STEP) * CACHE_STEP)

    def choose(self, scores: Tensor, params: SamplingParams, seed: Tensor, index: Tensor) -> Tensor:
        return choose(scores, params, seed, index)

    def plan(self, sequences: list[SequenceRows]) -> RowPlan:
        return RowPlan(sequences, self.device, self.causal_blocks)

    def forward(self, plan: RowPlan, cache: KVCache) -> Output:
        """One forward.  Writes the base rows' K/V to `cache`; draft rows leave nothing behind."""
        hidden = self.run_trunk(plan, cache)
        base = hidden[: plan.num_base]
        wanted = base if plan.logit_rows is None else base[plan.logit_rows]
        return Output(self.head(wanted), wanted, hidden[plan.num_base :])

    def run_trunk(self, plan: RowPlan, cache: KVCache, context: ForwardContext | None = None) -> Tensor:
        """[N, H] last hidden states of all rows."""
        context = context or ForwardContext(plan, cache)
        embeds = self.embed(plan)
        extra = {} if self.per_layer is None else {"per_layer_inputs": self.per_layer(plan.ids[None])}
        with self.switched(plan):
            hidden: Tensor = self.trunk(
                inputs_embeds=embeds[None],
                position_ids=plan.positions,
                use_cache=False,
                retrofit_rows=context,
                **extra,
            ).last_hidden_state[0]
        return hidden

    def embed(self, plan: RowPlan) -> Tensor:
        """[N, H]: token embeddings, and the mask vector where a draft row has no token."""
        embeds: Tensor = self.embedding(plan.ids)
        if plan.masked is None:
            return embeds
        if self.heads is None:
            raise RuntimeError("a masked draft row needs a mask vector")
        # Gemma-3 scales inside its embedding module; the mask vector meets the same factor.
        vector = self.heads.mask_vector * float(getattr(self.embedding, "embed_scale", 1.0))
        return embeds.index_put((plan.masked,), vector.to(embeds.dtype).expand(len(plan.masked), -1))

    @contextmanager
    def switched(self, plan: RowPlan) -> Iterator[None]:
        """The model's configuration as a forward of these rows needs it."""
        settings = vars(self.config)  # past the configuration's own __setattr__, which costs more than a small kernel
        attention, experts = settings["_attn_implementation_internal"], settings["_experts_implementation_internal"]
        before = self.gate.base_rows
        settings["_attn_implementation_internal"] = ATTENTION
        if experts is not None and plan.num_rows <= FEW_ROWS:
            settings["_experts_implementation_internal"] = "batched_mm"
        self.gate.base_rows = plan.num_base
        try:
            yield
        finally:
            settings["_attn_implementation_internal"] = attention
            settings["_experts_implementation_internal"] = experts
            self.gate.base_rows = before


def rope_boundary(config: Any) -> int | None:
    """Position at which longrope switches its frequencies for a whole forward; None for every other RoPE."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    return int(parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def outermost(model: nn.Module, inner: nn.Module, beside: nn.Module) -> nn.Module:
    """The largest module that holds `inner` and not `beside`."""
    for child in model.children():
        inside = set(child.modules())
        if inner in inside:
            return outermost(child, inner, beside) if beside in inside and child is not beside else child
    return inner


def per_layer_inputs(trunk: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The decoder's second look-up of token ids, one vector for each layer (Gemma 3n, 4), where it has one.

    It goes by ids alone, so a draft row without a token takes that of id 0, as `RowPlan.ids` says.
    """
    if not getattr(trunk, "hidden_size_per_layer_input", None):
        return None
    return cast(Callable[[Tensor], Tensor], trunk.get_per_layer_inputs)


def separate_experts(model: PreTrainedModel, gate: Gate) -> Callable[[], None]:
    """Make routed experts run base rows and draft rows in calls of their own; returns the undo.

    Grouped kernels change a row's bits with the rows beside it, and a base row's must not depend on a draft row's.
    """
    undone: list[Callable[[], None]] = []
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] == "experts" and not isinstance(module, nn.ModuleList):
            undone.append(instead(module, _split_rows(module, gate, model.config.get_text_config())))

    def undo() -> None:
        for one in undone:
            one()

    return undo


def instead(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let a module run another `forward`; returns the undo, which gives back one that was the module's own."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before

    return undo


def _split_rows(experts: nn.Module, gate: Gate, config: Any) -> Callable[..., Tensor]:
    forward = experts.forward
    per_row = _gathered_bytes_per_row(experts)

    def split(hidden: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        n = gate.base_rows
        if n is None:
            return forward(hidden, index_NK, weights_NK)
        hidden_NH = hidden.reshape(-1, hidden.shape[-1])  # DBRX hands [1, N, H] on
        parts = [slice(0, n), slice(n, len(hidden_NH))]
        if config._experts_implementation_internal == "batched_mm":
            size = max(1, GATHER_BYTES // (per_row * index_NK.shape[1]))
            parts = [slice(i, min(i + size, p.stop)) for p in parts for i in range(p.start, p.stop, size)]
        parts = [p for p in parts if p.stop > p.start]
        out = [forward(hidden_NH[p], index_NK[p], weights_NK[p]) for p in parts]
        return (out[0] if len(out) == 1 else torch.cat(out)).reshape(hidden.shape)

    return split


def _gathered_bytes_per_row(experts: nn.Module) -> int:
    """Bytes of one expert's weights: what `batched_mm` copies per row and chosen expert."""
    return sum(p[0].numel() * p.element_size() for p in experts.parameters() if p.dim() == 3) or 1
