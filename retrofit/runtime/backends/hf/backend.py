"""The `hf` backend: a model's own transformers modules, driven by row plans.

All rows of a forward travel as one packed sequence [1, N]; the plan goes along as a keyword argument and arrives in the
attention function of `attention.py`, which keeps base K/V itself (the model runs with `use_cache=False`) and lets every
row see what the plan says.  Any decoder that calls transformers' AttentionInterface works; the others are refused by
name.  What a forward of ours needs of the shared model (how many base rows, which attention) it sets for its own thread
only, so a live model keeps working, also in other threads meanwhile.

Not here: which rows to run, sampling, acceptance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from retrofit.adapters.attach import WRAPPING, Attached
from retrofit.adapters.gated_lora import Gate, GatedLoraLinear
from retrofit.adapters.given import Given
from retrofit.adapters.heads import Heads
from retrofit.adapters.roles import trunk_of
from retrofit.adapters.rows import RowPlan, SequenceRows, is_prefill
from retrofit.adapters.written import written
from retrofit.errors import UsageError
from retrofit.machine import cpu_name
from retrofit.runtime.backends.context import context_length, restarts_at_boundary, rope_boundary
from retrofit.runtime.backends.hf import elementwise
from retrofit.runtime.backends.hf.answers import answering, by_thread
from retrofit.runtime.backends.hf.attention import ATTENTION, ForwardContext, number_layers
from retrofit.runtime.backends.hf.cache import STEP, KVCache
from retrofit.runtime.backends.hf.exact_attention import Form
from retrofit.runtime.backends.hf.given.reading import read_prompts
from retrofit.runtime.backends.hf.given.rows import with_given
from retrofit.runtime.backends.hf.linear.experts import separate_experts
from retrofit.runtime.backends.hf.linear.packing import install
from retrofit.runtime.backends.hf.linear.products import Cut, Product, packed_weights
from retrofit.runtime.backends.hf.load_check import check_model
from retrofit.runtime.backends.hf.positions.rotation import lock_rotation
from retrofit.runtime.backends.hf.positions.row_positions import asked_of_cache, instead_of_cache
from retrofit.runtime.backends.hf.recorded.steps import Recorded, through_trunk
from retrofit.runtime.backends.hf.recurrent import mixers
from retrofit.runtime.backends.hf.refused import chunks_of, refuse_unsupported
from retrofit.runtime.backends.hf.sparse import indexers
from retrofit.runtime.backends.interface import EXACT_PREFILL_ROWS, PREFILL_ROWS, Output, Stepper, eos_set
from retrofit.runtime.backends.turns import Turns
from retrofit.runtime.rules.sampling import Processing, choose
from retrofit.runtime.settings import read_settings

if TYPE_CHECKING:
    from retrofit.runtime.auto.policy import AutoPolicy
    from retrofit.runtime.request import Request
    from retrofit.runtime.run import Run

FEW_ROWS = 128
"""Up to here routed experts run `batched_mm`, whose rows do not depend on each other's bits; it gathers a lot."""
FEW_DRAFT_ROWS = 32
"""Up to here draft rows join the base rows' vocabulary projection, those of blocks that may not come true with them:
that many cost less than reading the weights once more."""


def wrap(model: PreTrainedModel, build: Callable[[], Attached]) -> tuple[Attached, HFBackend]:
    """Attach an adapter and a backend to a model, or leave the model as it was.

    Raises UnsupportedModelError, and what `build` raises: UsageError where another engine has the model.
    """
    refuse_unsupported(model)
    with WRAPPING:
        attached = build()
        try:
            return attached, HFBackend(model, attached.gate, attached.heads, attached.layout.causal)
        except BaseException:
            attached.detach()
            raise


class VocabHead:
    """The model's own way from last hidden state to logits: projection, then soft-cap or scaling."""

    def __init__(self, model: PreTrainedModel, gate: Gate):
        self.gate = gate
        self.linear: nn.Module = model.get_output_embeddings()
        self.project = outermost(model, self.linear, beside=trunk_of(model))
        """What holds it: itself, or in BERT's family a block of its own with a layer before it."""
        head = getattr(model, "lm_head", None)
        beside = isinstance(head, nn.Module) and self.linear not in set(head.modules())
        self.before: nn.Module | None = head if beside else None
        """The layer before it where it stands beside it (ModernBERT)."""
        config = model.config.get_text_config()
        self.vocab = int(self.linear.weight.shape[0])
        softcap = getattr(config, "final_logit_softcapping", None)
        self.softcap: float | None = softcap or getattr(config, "logits_soft_cap", None)  # RecurrentGemma
        times, over = (float(getattr(config, name, None) or 1.0) for name in ("logit_scale", "logits_scaling"))
        self.scale = times * float(getattr(config, "lm_head_multiplier", None) or 1.0) / over

    def trained(self) -> list[nn.Parameter]:
        """Its parameters that require gradients."""
        modules = [self.project] if self.before is None else [self.project, self.before]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> [N, V]."""
        before = self.gate.base_rows
        self.gate.base_rows = len(hidden_NH)  # ours, and all of them the base's
        try:
            logits: Tensor = self.project(hidden_NH if self.before is None else self.before(hidden_NH))
        finally:
            self.gate.base_rows = before
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * elementwise.by_one_thread(torch.tanh, logits / self.softcap)
        return logits


class HFBackend:
    """Runs row plans through a transformers model."""

    name = "hf"
    most_nodes: int | None = None
    exact = "off"
    """The level of exactness that is kept; `hold` sets it."""
    form: Form | None = None
    """How base rows attend; None: as is fastest."""
    most_rows: int | None = None
    least_rows = 1
    """Rows that every decoding forward is filled up to."""
    prefill_alone = False
    prefill_rows = PREFILL_ROWS
    one_order = True
    packed = False
    """Whether products read packed weights; `packing.py` sets it."""
    why_plain: str | None = None
    """Why they do not, where packing was tried in vain."""
    gives_checked = False
    """Whether a prompt with images was decoded both ways, by the model and as rows."""

    def __init__(self, model: PreTrainedModel, gate: Gate, heads: Heads | None = None, causal_blocks: bool = False):
        """Raises UnsupportedModelError, naming what it is, for a model that cannot be driven by row plans."""
        self.model = model
        self.turns = Turns()
        self.was_training = [module for module in model.modules() if module.training]
        """Modules that were in training mode."""
        model.eval()  # dropout and router noise have no place in decoding, nor in the teacher of a drafter
        self.config = model.config.get_text_config()
        self.gate = gate
        self.heads = heads
        self.causal_blocks = causal_blocks
        self.trunk = trunk_of(model)
        self.recorded = Recorded(self.trunk, lambda: packed_weights(self.products.values()))
        self.embedding = model.get_input_embeddings()
        self.cut = Cut()
        """How products are cut; `hold` sets it."""
        self.products: dict[str, Product] = {}
        """Linear layers by name, once they run as products of ours."""
        self.head = VocabHead(model, gate)
        self.per_layer: Callable[[Tensor], Tensor] | None = per_layer_inputs(self.trunk)
        self.asked_of_cache = asked_of_cache(self.trunk, self.config)
        self.chunks = chunks_of(self.config)
        self.recurrent = frozenset(mixers.mixers_of(self.trunk))
        """Layers that have a state in the place of K/V."""
        self.indexed = bool(indexers.indexers_of(self.trunk))
        """Whether layers attend to what an indexer picks."""
        # Recurrent layers run prompts in chunks, and steps row by row; so do indexers.
        self.one_order = not (self.recurrent or self.indexed)
        self.device = self.embedding.weight.device
        self.dtype = self.embedding.weight.dtype
        self.work_per_row = 2.0 * sum(p.numel() for p in model.parameters())
        """About how many floating-point operations a row costs."""
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos = getattr(self.config, "eos_token_id", None) if eos is None else eos
        self.eos = eos_set(eos)
        self.settings = read_settings(model.generation_config, self.eos, self.head.vocab)
        self.input_vocab = min(self.head.vocab, int(self.embedding.weight.shape[0]))
        self.context_length = context_length(self.config)
        self.rope_boundary = rope_boundary(self.config)
        restarts = restarts_at_boundary(model)
        self.rope_restarts = bool(restarts)
        if self.rope_boundary is not None and restarts is None:
            # What the model's own code does at the crossing is not known, so there is nothing to equal.
            cut = f"max_position_embeddings={self.context_length} (longrope: texts end at {self.rope_boundary})"
            self.settings = replace(self.settings, not_honoured=(*self.settings.not_honoured, cut))
            self.context_length, self.rope_boundary = self.rope_boundary, None
        self.experts: str | None = self.config._experts_implementation
        """Which experts run: as it was, whatever a `generate` of the user's sets meanwhile."""
        self.sliding: dict[int, int] = {}
        """layer -> its window, of layers that slide; known once the model has been checked."""
        self._undone = [by_thread(self.config), separate_experts(model, gate, self.cut), lock_rotation(self.trunk)]
        self._undone += [mixers.install(self.trunk), number_layers(self.trunk), indexers.install(self.trunk)]
        try:
            self.check_usable()
            self.sliding = check_model(self)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the live model back as it was, once the steps that run are done.  A second call does nothing.

        Raises UsageError from inside a step.
        """
        if not self.turns.end():
            return
        self.recorded.forget()
        while self._undone:
            self._undone.pop()()
        for module in self.was_training:
            module.training = True

    def check_usable(self) -> None:
        """Raises UsageError when this is closed, or the model compiled: recorded code does not ask whose forward it is.

        The model's own compiled `forward` is another matter: decoding goes past it.
        """
        self.turns.check_open()
        modules = [self.trunk]
        while modules:
            module = modules.pop()
            recorded = hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
            if recorded or module._compiled_call_impl is not None:
                raise UsageError(
                    f"a {type(module).__name__} inside this {type(self.model).__name__} went through torch.compile; "
                    "retrofit cannot decode with recorded code",
                    "give the engine a model of which at most the whole is compiled, not its parts",
                )
            if not isinstance(module, GatedLoraLinear):  # most modules of a model are in those
                modules.extend(module.children())

    def hold(self, exact: str, form: Form | None, rows: int = 1, most: int | None = None) -> None:
        """Keep a level of exactness from now on: fill every decoding forward up to so many rows.

        At `bucket` none has more.  most: at `invariant`, products of more rows run in several of so many; None: as they
        are.  Whether a level holds on this machine is for `exact_rows.settle` to find out.
        """
        self.exact, self.form, self.least_rows = exact, form, rows
        self.recorded.forget()
        self.most_rows = rows if exact == "bucket" else None
        # A prompt's bits then depend on nothing but the prompt, however products of many rows are made.
        self.prefill_alone = exact != "off"  # `exact_prompts.py` finds out where they need not
        self.prefill_rows = EXACT_PREFILL_ROWS if exact == "invariant" else PREFILL_ROWS
        self.cut.least, self.cut.most = (rows, most) if exact == "invariant" else (1, None)
        if exact == "invariant":
            install(self)
        if exact != "off":
            elementwise.install(self)

    def made_by(self) -> Hashable:
        return written(self.model), self.exact, self.form, self.least_rows, self.cut.most, self.packed

    def hold_as(self, other: HFBackend) -> None:
        """Keep what another backend keeps."""
        self.hold(other.exact, other.form, other.least_rows, other.cut.most)
        self.prefill_alone = other.prefill_alone

    def until_closed(self, undo: Callable[[], None]) -> None:
        """Something was done to the model: undo it when this is closed."""
        self._undone.append(undo)

    def lanes(self, requests: int) -> int:
        return requests

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        # Where a text is run again at a RoPE boundary its rows come in one forward, more than sliding layers take in.
        sliding = self.sliding if self.rope_boundary is None else {}
        if self.form is not None and self.form.piece > STEP:
            sliding = {}  # what is kept would begin elsewhere than the form cuts keys
        return KVCache(slots, -(-capacity // STEP) * STEP, sliding)

    def stepper(
        self, run: Run, requests: Sequence[Request], slots: int, on_host: AutoPolicy, on_device: AutoPolicy
    ) -> Stepper:
        """Every step is planned on the host."""
        from retrofit.runtime.host.steps import HostSteps

        return HostSteps(run, on_host)

    def priced_by(self) -> dict[str, Any]:
        on = cpu_name() if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        how = [self.name, str(self.dtype), self.exact, self.packed]
        return {"on": on, "backend": how, "model": self._shape}

    @cached_property
    def _shape(self) -> str:
        """Stands for all sizes of base, adapter and heads."""
        parts = [self.model, *([] if self.heads is None else [self.heads])]
        sizes = [(name, list(p.shape)) for part in parts for name, p in part.named_parameters()]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()

    def choose(self, scores: Tensor, params: Processing, seed: Tensor, index: Tensor) -> Tensor:
        return choose(scores, params, seed, index)

    def read_prompts(self, inputs: Mapping[str, Any]) -> list[tuple[list[int], Given]]:
        with self.turns.turn():
            return read_prompts(self, inputs)

    def row_plan(self, sequences: list[SequenceRows]) -> RowPlan:
        # At `invariant` the rows of a prompt have the bits of a step's, so that others may copy what they left.
        least = 1 if is_prefill(sequences) and self.exact != "invariant" else self.least_rows
        return RowPlan(sequences, self.device, self.causal_blocks, least)

    def forward(self, plan: RowPlan, cache: KVCache) -> Output:
        """One forward.  Writes the base rows' K/V to `cache`; draft rows leave nothing behind."""
        hidden = self.run_trunk(plan, cache)
        base = hidden[: plan.num_base]
        wanted = base if plan.logit_rows is None else base[plan.logit_rows]
        drafts = hidden[plan.first_draft :]
        # One pass over the vocabulary's weights serves targets and drafts, as one pass over the others' did.
        joined = 0 < len(drafts) <= (self.most_rows or FEW_DRAFT_ROWS) and len(wanted) > 0
        rows = torch.cat([wanted, drafts]) if joined else wanted
        filler = max(0, plan.least_rows - len(rows))
        logits = self.head(F.pad(rows, (0, 0, 0, filler)) if filler else rows)
        n = len(wanted)
        return Output(logits[:n], wanted, drafts, base, logits[n : len(rows)] if joined else None)

    def run_trunk(self, plan: RowPlan, cache: KVCache, context: ForwardContext | None = None) -> Tensor:
        """[N, H] last hidden states of all rows.  Raises UsageError when this is closed, or the model being trained."""
        self.turns.check_open()
        context = context or ForwardContext(plan, cache, self.form, chunks=self.chunks)
        for sequence in plan.sequences:
            cache.make_room(sequence.slot, sequence.start, len(sequence.tokens))
        if self.recurrent:
            cache.states.begin(plan)
        arguments: dict[str, Any] = {"inputs_embeds": self.embed(plan)[None], "position_ids": plan.positions}
        arguments |= instead_of_cache(self.asked_of_cache, plan.positions)
        if self.per_layer is not None:
            arguments["per_layer_inputs"] = self.per_layer(plan.ids[None])
        if self.indexed:
            arguments["attention_mask"] = indexers.masks()
        arguments = with_given(plan, arguments)
        with self.switched(context):
            hidden = through_trunk(self, plan, context, arguments)[0]
        if self.trunk.training:
            raise UsageError(
                f"this {type(self.model).__name__} was put into training mode while an engine decodes with it",
                "call its eval() before decoding, or close the engine before training",
            )
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
    def switched(self, context: ForwardContext) -> Iterator[None]:
        """The model as a forward of these rows needs it, for this thread and no other."""
        plan = context.plan
        few = plan.num_rows <= FEW_ROWS or (plan.least_rows > 1 and not is_prefill(plan.sequences))
        experts = "batched_mm" if self.experts is not None and few else self.experts
        before = self.gate.base_rows
        with answering(self.config, ATTENTION, experts, context):
            try:
                self.gate.base_rows = plan.first_draft
                yield
            finally:
                self.gate.base_rows = before


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
