"""How much memory a conversion takes, by phase, before it is begun and without the model's weights.

The training itself is rehearsed (`rehearsal.py`): base, adapter, one optimizer step, measuring at the end, all in the
recipe's sizes on windows that are full.  Counted is what the process holds beyond Python and its imports; on a GPU,
what lies in its memory beyond the CUDA context.
Not here: disk, time (`report.py`), what to change (`fit.py`).
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from retrofit.adapters.attach import Attached, count
from retrofit.adapters.rows import RowPlan, SequenceRows
from retrofit.artifact.files import AT_ONCE
from retrofit.hub import Base, model_class
from retrofit.quantised.linear import weight_bytes
from retrofit.quantised.loading import rehearse
from retrofit.recipes.dry_run.rehearsal import BASE, Rehearsal, rehearsal
from retrofit.recipes.schema import Recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.regenerate import most_kept
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.recipes.training.clean.pairs import TOKENS, fill, mean_hidden, vocabulary
from retrofit.recipes.training.joint.trainer import JointTrainer, trainer_for
from retrofit.recipes.training.measure import held_out_acceptance
from retrofit.recipes.training.order import SHUFFLE_BUFFER
from retrofit.recipes.training.prepare import attached_to
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.cache import KVCache

ADAPTER, GRADIENTS, MOMENTS = "adapter weights", "gradients", "optimizer moments"
CLEAN, DRAFT, LOSS, OTHER = "clean forward", "draft rows", "logits of a chunk", "other tensors"
ORIGINAL = "the original's weights"
TEXT, FILES, CUDA = "text and tokenizer", "files in memory", "CUDA context (not measured)"
KEPT = "freed, not given back"

LOADING, ATTACHING, BUFFERS = "loading the base", "attaching the adapter", "beginning a step"
PAIRS = "beginning the Markov head"
CLEAN_FORWARD, CLEAN_AGAIN, MERGING = "clean forward", "clean half, backward", "merging"
FORWARD, CHUNKS, BACKWARD = "draft rows, forward", "loss, chunk by chunk", "draft rows, backward"
ADDING, STEP = "adding up gradients", "optimizer step"
SAVING, MEASURING = "writing a checkpoint", "measuring at the end"
PUBLISHING, WRITING, REST = "writing the artifact", "writing responses", "between two steps"

STEPS = 2
"""The second has the optimizer's moments beside it."""
MANY_LAYERS = 12
FEW_LAYERS = ((2, 4), (4, 8))
"""Of a model with more than MANY_LAYERS so many are rehearsed; the second pair where the first tells too little."""
FREED = 0.15
"""Of what lies on the heap of a CPU's process, how much more it holds that was freed: the C library keeps small blocks
for itself, and does not join those that others lie between.  Measured by `python -m benchmarks.memory`."""
CUDA_CONTEXT = 500_000_000
PACKED_TOKEN = 9
"""Bytes of a token in a checkpoint: its id, and whether it is part of a response."""


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a phase: bytes by what they hold."""

    holds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.holds.values())


@dataclass(frozen=True)
class Parameters:
    """How many, by kind; `modules`: projections that get a LoRA, by name, and how many of each."""

    base: int
    lora: int
    mask_vector: int
    markov_head: int
    confidence_head: int
    along: int
    """Of the base's, or of a LoRA on all rows; 0 in the profile `frozen`."""
    modules: dict[str, int]

    @property
    def trained(self) -> int:
        return self.lora + self.mask_vector + self.markov_head + self.confidence_head + self.along


@dataclass(frozen=True)
class Estimate:
    """Bytes of each phase at its fullest; `base`, the base alone; `weights` and `moments`, the
    files of a checkpoint."""

    device: str
    phases: dict[str, Moment]
    parameters: Parameters
    base: int
    weights: int
    moments: int

    @property
    def fullest(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> int:
        return self.phases[self.fullest].total


@dataclass(frozen=True)
class Surroundings:
    """What is not seen by running the training: bytes of the base's files by type, and of the tokenizer."""

    stored: str | None = None
    """Type the weights are stored in; None: the one they are to run in."""
    tokenizer: int = 0


def estimate(
    plan: Recipe, config: PreTrainedConfig, device: str = "cpu", around: Surroundings | None = None
) -> Estimate:
    """Rehearse a conversion.  Raises UsageError and UnsupportedModelError where converting would, by the same code.

    Of a model of many layers, all the same, FEW_LAYERS are rehearsed: each more adds the same to every phase, once a
    phase is at its fullest at the same moment.
    """
    around = around or Surroundings()
    for low, high in FEW_LAYERS if _alike(config) else ():
        fewer, more = (_whole(plan, _shorter(config, number), device, around) for number in (low, high))
        if _same_moments(fewer, more):
            return _extrapolated(fewer, more, (_layers(config) - low) / (high - low))
    return _whole(plan, config, device, around)


def _same_moments(fewer: Estimate, more: Estimate) -> bool:
    """Whether each phase is fullest at the same moment: with more layers nothing that it holds then has become less."""
    return all(
        more.phases[name].holds.get(kind, 0) >= size
        for name, moment in fewer.phases.items()
        for kind, size in moment.holds.items()
    )


def _layers(config: PreTrainedConfig) -> int:
    return int(config.get_text_config().num_hidden_layers)


def _alike(config: PreTrainedConfig) -> bool:
    """Whether a model has many layers, and all of them are the same."""
    text = config.get_text_config()
    if text is not config or _layers(config) <= MANY_LAYERS or len(set(getattr(text, "layer_types", None) or ())) > 1:
        return False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = getattr(model.get_decoder(), "layers", ())
    shapes = {tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers}
    return len(layers) == _layers(config) and len(shapes) == 1


def _shorter(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    found = copy.deepcopy(config)
    if getattr(found, "layer_types", None):
        found.layer_types = found.layer_types[:layers]
    found.num_hidden_layers = layers
    return found


def _extrapolated(fewer: Estimate, more: Estimate, steps: float) -> Estimate:
    """What `steps` times the difference of two estimates adds to the smaller one."""

    def on(a: int, b: int) -> int:
        return max(0, round(a + (b - a) * steps))

    def kinds(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
        return {kind: on(a.get(kind, 0), b.get(kind, 0)) for kind in {**a, **b}}

    one, two = fewer.parameters, more.parameters
    counted = {name: on(getattr(one, name), getattr(two, name)) for name in vars(one) if name != "modules"}
    phases = {name: Moment(kinds(moment.holds, more.phases[name].holds)) for name, moment in fewer.phases.items()}
    sizes = {name: on(getattr(fewer, name), getattr(more, name)) for name in ("base", "weights", "moments")}
    parameters = Parameters(**counted, modules=kinds(one.modules, two.modules))
    return Estimate(fewer.device, phases, parameters, **sizes)


def _whole(plan: Recipe, config: PreTrainedConfig, device: str, around: Surroundings) -> Estimate:
    """All layers."""
    kind = torch.device(device).type
    with rehearsal(kind) as stage:
        attached, trainer = _rehearse(plan, config, stage, kind)
        base = weight_bytes(attached.model) - _bytes(attached.lora_parameters()) + _bytes(attached.model.buffers())
        plain = _bytes(attached.base_parameters())
        weights = _bytes(trainer.trained)
        moments = _bytes(t for state in trainer.optimizer.state.values() for t in state.values())
        parameters, dtype = _parameters(attached, trainer), attached.model.dtype
    on_host = kind == "cpu"
    stored = getattr(torch, around.stored) if around.stored else dtype
    kept = on_host and (stored != dtype or plan.base.quantization is not None)
    file = plain * stored.itemsize // dtype.itemsize if kept else 0
    phases = {LOADING: {BASE: base, FILES: file}, **stage.fullest}
    rest = phases.pop(REST)
    phases.pop("", None)  # how the base came about here is not how it is loaded
    if on_host:
        # Tensors are written from where they lie, a piece at a time.
        if plan.train.save_every:
            documents = SHUFFLE_BUFFER * plan.data.max_length * PACKED_TOKEN
            phases[SAVING] = {**rest, FILES: min(AT_ONCE, moments) + documents}
        model = base if plan.profile == "joint" else 0  # transformers makes the whole file in memory
        phases[PUBLISHING] = {**rest, FILES: min(AT_ONCE, weights) + model}
    beside = {TEXT: _text(plan) + around.tokenizer} if on_host else {CUDA: CUDA_CONTEXT}
    moments_by_phase = {}
    for name, holds in phases.items():
        heap = sum(size for kind, size in holds.items() if kind not in (BASE, FILES))
        kept = {KEPT: round(FREED * heap)} if on_host else {}
        moments_by_phase[name] = Moment({kind: size for kind, size in {**holds, **kept, **beside}.items() if size})
    return Estimate(device, moments_by_phase, parameters, base, weights, moments)


def _rehearse(plan: Recipe, config: PreTrainedConfig, stage: Rehearsal, kind: str) -> tuple[Attached, Trainer]:
    """A conversion from the base without its adapter to what is measured at the end."""
    model = model_class(config).from_config(config, dtype=getattr(torch, plan.dtype))
    if plan.base.quantization is not None:
        rehearse(model, plan.base.quantization)
    stage.phase(ATTACHING, OTHER)
    base = Base(model, None, plan.base.model, None, None, {})
    attached, backend = attached_to(base, plan)
    stage.label(ADAPTER, attached.parameters())
    stage.phase(ATTACHING, ORIGINAL)
    trainer = trainer_for(attached, backend, plan)
    stage.label(ADAPTER, trainer.trained)
    stage.label(BASE, attached.base_parameters())
    for group in trainer.optimizer.param_groups:
        group["foreach"] = kind != "cpu"  # PyTorch's choice: all parameters at once on a GPU
    if plan.adapter.markov_init == "base" and plan.adapter.markov_rank:
        stage.phase(PAIRS, OTHER)
        _begin(plan, attached, backend)
    run, add_up = backend.run_trunk, trainer.set_gradients

    def added_up(*sums: Any) -> None:
        stage.phase(ADDING, GRADIENTS)
        add_up(*sums)

    trainer.set_gradients = added_up  # type: ignore[method-assign, assignment]
    for step in range(STEPS):
        backend.run_trunk = _with_phases(stage, trainer, run)  # type: ignore[method-assign]
        stage.phase(BUFFERS, GRADIENTS)
        trainer.gradients([[(document, step) for document in windows_of(plan, backend.head.vocab, step)]])
        stage.label(GRADIENTS, [p.grad for p in trainer.trained])
        backend.run_trunk = run  # type: ignore[method-assign]
        stage.phase(STEP, OTHER)
        trainer.update()
        stage.label(MOMENTS, [t for state in trainer.optimizer.state.values() for t in state.values()])
    stage.phase(REST, OTHER)
    if isinstance(trainer, JointTrainer):
        stage.phase(MERGING, ORIGINAL)
        trainer.weights.merge()
    if plan.data.responses == "regenerate":
        stage.phase(WRITING, CLEAN)
        _write_responses(plan, backend)
    if plan.data.held_out:
        stage.phase(MEASURING, LOSS)
        documents = windows_of(plan, backend.head.vocab, 0)[:1]
        held_out_acceptance(backend, attached, documents, plan.train.anchors, plan.train.seed)
    return attached, trainer


def _begin(plan: Recipe, attached: Attached, backend: HFBackend) -> None:
    """`begin_with_pairs` over all the text it reads, of which one window is run; each token in it is another one."""
    states = clean_forward(backend, windows_of(plan, backend.head.vocab, 0)[:1])[1].float()

    def hidden_states() -> tuple[Tensor, Tensor]:
        windows = [torch.empty(TOKENS, states.shape[1])]  # all of them, before they are one tensor
        return torch.zeros(TOKENS, dtype=torch.long), torch.cat(windows)

    fill(attached.heads, vocabulary(backend.head), mean_hidden(*hidden_states()))


def _with_phases(stage: Rehearsal, trainer: Trainer, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run_trunk`, where the phases of a step begin: base rows, draft rows, and the way back through those."""

    def backward(gradient: Tensor) -> None:
        stage.label(GRADIENTS, [p.grad for p in trainer.trained])
        stage.phase(BACKWARD, DRAFT)

    def run_trunk(rows: RowPlan, cache: KVCache) -> Tensor:
        stage.label(GRADIENTS, [p.grad for p in trainer.trained])
        if rows.draft is None and not torch.is_grad_enabled():
            stage.phase(CLEAN_FORWARD, CLEAN)
            return run(rows, cache)
        if rows.draft is None:
            stage.phase(CLEAN_AGAIN, CLEAN)
            return run(rows, cache)
        stage.phase(FORWARD, DRAFT)
        hidden = run(rows, cache)
        hidden.register_hook(backward)
        stage.phase(CHUNKS, LOSS)
        return hidden

    return run_trunk


def _write_responses(plan: Recipe, backend: HFBackend) -> None:
    """The K/V of all requests that run together, at their longest, and a decoding forward of theirs."""
    requests, tokens = most_kept(plan.data.max_length)
    rows = [SequenceRows(slot=slot, start=0, tokens=(0,)) for slot in range(requests)]
    with torch.no_grad():
        backend.forward(backend.row_plan(rows), backend.new_cache(requests, tokens))


def windows_of(plan: Recipe, vocab: int, step: int) -> list[Document]:
    """A batch of full windows, of any tokens."""
    length, batch = max(plan.data.lengths, default=plan.data.max_length), []
    for number in range(plan.train.batch_size):
        tokens = np.random.default_rng([step, number]).integers(1, vocab, length).tolist()
        batch.append(Document(f"{step}.{number}", tuple(tokens), (True,) * length))
    return batch


def _text(plan: Recipe) -> int:
    """Bytes of the windows held for shuffling and of the batch, all full."""
    tokens = tuple(range(1 << 20, (1 << 20) + plan.data.max_length))
    window = sum(map(sys.getsizeof, tokens)) + 2 * sys.getsizeof(tokens)
    return window * (SHUFFLE_BUFFER + plan.train.batch_size * plan.train.accumulation)


def _parameters(attached: Attached, trainer: Trainer | None = None) -> Parameters:
    heads = attached.heads
    named = dict(heads.named_parameters())
    markov = count(p for name, p in named.items() if name.startswith("markov"))
    confidence = count(p for name, p in named.items() if name.startswith("confidence"))
    lora = count(attached.lora_parameters())
    modules = Counter(n.rsplit(".", 1)[-1] for n, m in attached.peft_model.named_modules() if hasattr(m, "lora_A"))
    base = count(attached.base_parameters())
    along = count(trainer.weights.forwarded) if isinstance(trainer, JointTrainer) else 0
    if isinstance(trainer, JointTrainer) and not trainer.recipe.joint.gated:
        lora = 0
    vector = count([heads.mask_vector])
    return Parameters(base, lora, vector, markov, confidence, along, dict(sorted(modules.items())))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
