"""Requests in, tokens out: load an artifact or wrap a live model, then generate or stream in any mode.

Owns the loop (admit, prefill, step, retire) and the choice of strategy; knows no row, no token rule and no kernel.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retrofit.adapters.attach import Attached
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.live import refuse_live
from retrofit.artifact import folder as artifacts
from retrofit.errors import UsageError
from retrofit.hub import Base, live_fingerprint, load_base, resolved_device
from retrofit.runtime.asking import Params, asked_of, needs, requests_for, typical
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.exact_rows import Settled
from retrofit.runtime.backends.interface import BUCKET_ROWS, Backend, Stepper
from retrofit.runtime.chat_template import warn_of_differences
from retrofit.runtime.host.infilling import Filled, infill
from retrofit.runtime.host.modes import prefill_step
from retrofit.runtime.loading import asked_base, fits_fused, fused_backend, prepare, untrained, with_adapter
from retrofit.runtime.loading import check_options as check_loading
from retrofit.runtime.options import Decoding, check_options, flag
from retrofit.runtime.params import Keywords
from retrofit.runtime.plan import Cycle, Limits, cycle_of
from retrofit.runtime.prefixes.pieces import Pieces
from retrofit.runtime.prefixes.reuse import check_budget, pieces_for, pieces_of
from retrofit.runtime.prompts import Prompt, Prompts, listed
from retrofit.runtime.reading import Reader, in_thread
from retrofit.runtime.request import Request
from retrofit.runtime.results import Event, Result
from retrofit.runtime.run import Run
from retrofit.runtime.scheduler import Scheduler
from retrofit.sharing.pulling import local_folder


class Engine:
    """Decodes with one model in three modes.  Build with `Engine.load` or `Engine.from_model`, and close it after use.

        with Engine.from_model(model) as engine:
            engine.generate(prompts)

    Several threads may call it at once, and run a live model's own `forward` and `generate` beside it.
    """

    def __init__(
        self,
        backend: Backend,
        layout: DraftLayout,
        tokenizer: PreTrainedTokenizerBase | None,
        acceptance: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        base: Base | None = None,
        attached: Attached | None = None,
    ):
        self.backend = backend
        self.layout = layout
        self.tokenizer = tokenizer
        self.config = dict(config or {})
        self._told: set[str] = set()
        self.base = base
        self._attached = attached
        self.limits = Limits(backend.context_length, backend.rope_boundary)
        self._acceptance = acceptance or {}
        self.policy = AutoPolicy(self.layout, self._acceptance)
        self.device_policy = AutoPolicy(self.layout, self._acceptance)
        """What steps planned on the device cost; they are timed apart from those planned on the host."""
        self.settled: Settled | None = None
        """How the level of exactness was found, on the hf backend."""
        self.prefixes: Pieces | None = None
        """Base K/V of texts that are through, for prompts that begin alike; None: none are kept."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        exact: str = "auto",
        backend: str = "auto",
        *,
        rows: int | None = None,
        packed: bool | str = "auto",
        base: str | None = None,
        quantization: str = "auto",
        offline: bool = False,
        trust_remote_code: bool = False,
        prefix_cache: int | str = "auto",
    ) -> Engine:
        """Load an artifact and the base it belongs to.

        path: its folder, smollm2-135m, which ships with retrofit, or OWNER/NAME[@REVISION] on the Hub.  base: folder,
        GGUF file or Hub id in place of its own.  device auto: a GPU if there is one.  dtype auto: of its training.
        quantization: nf4, int8, int8wo or int4wo, as a recipe's base.quantization; none; auto: of its training.
        backend: hf (transformers' modules), fused (our kernels, on a GPU), auto (fused on a GPU in half precision,
        where it knows the model).  exact: how far rows are guaranteed not to depend on the rows beside them: off,
        bucket (every decoding forward has `rows` rows), invariant (any number of rows).  auto is bucket on the fused
        backend; on hf the cheapest level that a self-test finds to hold here, but off in fp32 with plain weights.
        `engine.backend.exact` says which it is, `engine.settled` why.
        packed: of hf on a CPU, hold weights as oneDNN lays them out, and nowhere else; auto is True where this machine
        has such products.  `state_dict` of the model gives the same bits as ever.
        prefix_cache: bytes, or a text such as 512MB, of base K/V that are kept of finished texts for prompts that begin
        like them; 0: none, auto: those of 8,192 tokens.  Only where a copy has the bits of what would be computed: on
        the hf backend at invariant; elsewhere auto is 0, and bytes are refused.
        Raises ArtifactError (corrupt, or another base), UsageError, ResourceError, UnsupportedModelError, and GateError
        where this machine does not keep what the level promises.
        """
        check_loading(backend, exact, dtype, packed)
        budget = check_budget(prefix_cache)
        device = resolved_device(device)
        artifact = artifacts.read(local_folder(path, offline))
        name, revision, dtype, held = asked_base(artifact, base, dtype, quantization, backend)
        if backend == "auto":
            fits = held is None and fits_fused(name, revision, device, dtype, offline)
            backend = "fused" if fits else "hf"
            check_loading(backend, exact, dtype, packed)
        options: dict[str, Any] = {"offline": offline, "trust_remote_code": trust_remote_code, "need_tokenizer": False}
        if backend == "hf":
            loaded = load_base(name, revision, dtype=dtype, device=device, quantization=held, **options)
            return cls._with_artifact(loaded, artifact, exact, rows, packed, alone=True)._keeping(budget)
        files = load_base(name, revision, device=device, with_model=False, **options)
        fused = fused_backend(
            files, artifact, device, dtype, "bucket" if exact == "auto" else exact, rows or BUCKET_ROWS
        )
        engine = cls(fused, fused.layout, files.tokenizer, artifact.config.get("acceptance"), artifact.config, files)
        return engine._keeping(budget)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: str | Path | None = None,
        *,
        layout: DraftLayout | None = None,
        exact: str = "auto",
        rows: int | None = None,
        packed: bool | str = False,
        prefix_cache: int | str = "auto",
    ) -> Engine:
        """Wrap a live model.  adapter None: `ar` is the model's own, and `self_spec` runs with an untrained draft.

        exact, rows, prefix_cache: as in `load`; kept prefixes go when the weights are written to.  packed: decode with
        a second copy of the weights, packed; they must not change then.  The model's projections are wrapped in place,
        gate closed: its own forward and `generate` stay bit-identical; `close()` takes the wrapping off.
        Raises as `load` does, UnsupportedModelError for a model that has an adapter of its own, is quantised, or is not
        on one CPU or CUDA device, and UsageError for what is no such model or while another engine has it.
        """
        check_loading("hf", exact, "auto", packed)
        budget = check_budget(prefix_cache)
        refuse_live(model)
        if adapter is not None:
            artifact = artifacts.read(Path(adapter))
            base = Base(model, tokenizer, artifact.config["base"]["model"], None, None, live_fingerprint(model))
            return cls._with_artifact(base, artifact, exact, rows, packed, alone=False)._keeping(budget)
        attached, backend = untrained(model, layout or DraftLayout())
        engine = cls(backend, attached.layout, tokenizer, attached=attached)
        return engine._prepared(backend, exact, rows, packed, alone=False)._keeping(budget)

    @classmethod
    def _with_artifact(
        cls, base: Base, artifact: artifacts.Artifact, exact: str, rows: int | None, packed: bool | str, alone: bool
    ) -> Engine:
        config = artifact.config
        attached, backend = with_adapter(base, artifact, alone)
        engine = cls(backend, attached.layout, base.tokenizer, config.get("acceptance"), config, base, attached)
        return engine._prepared(backend, exact, rows, packed, alone)

    def _prepared(self, backend: HFBackend, exact: str, rows: int | None, packed: bool | str, alone: bool) -> Engine:
        """This engine, its weights packed, at a level of exactness; closed if the level does not hold."""
        try:
            self.settled = prepare(backend, exact, self.layout.drafts, rows, packed, alone)
        except BaseException:
            self.close()
            raise
        return self

    def _keeping(self, budget: int | None) -> Engine:
        """This engine, keeping prefixes in so many bytes; closed if it cannot."""
        try:
            self.prefixes = pieces_for(self.backend, budget)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Give the live model back as it was: no adapter, no wrapping.  A second call does nothing.

        Waits for the steps that run in other threads.  Calls that are not finished then, streams among them, raise
        UsageError when they go on, as every later use does.  Raises UsageError itself from inside a step.
        """
        self.backend.close()
        if self.prefixes is not None:
            self.prefixes.clear()
        if self._attached is not None:
            self._attached.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def not_honoured(self) -> tuple[str, ...]:
        """Settings of the base's generation_config that would change what `generate` emits and do not change this."""
        return self.backend.settings.not_honoured

    @property
    def attached(self) -> Attached:
        """The transformers model with its adapter.  Raises UsageError: closed, or the fused backend, which has none."""
        self.backend.turns.check_open()
        if self._attached is None:
            raise UsageError(f"this needs the transformers model, which the {self.backend.name} backend does not hold")
        return self._attached

    def generate(
        self,
        prompts: Prompts,
        params: Params | Sequence[Params] | str | None = None,
        mode: str = "self_spec",
        *,
        strategy: str | None = None,
        prepare: str | int | None = None,
        tree: int | None = None,
        threshold: float | None = None,
        tolerance: float | None = None,
        batch_size: int = 8,
        original_settings: bool = True,
        **keywords: Unpack[Keywords],
    ) -> list[Result]:
        """Generate for every prompt; results in the order of the prompts, and of the n outputs of each.

        prompts: a list of text (raw), token ids, or messages (chat template; a last message of the assistant's is
        continued); or a tokenizer's output, a tensor [prompts, tokens], or one list of token ids: see `prompts.py`.
        params: `SamplingParams` or transformers' `GenerationConfig`, one for all or one per prompt; or a mode.
        keywords: fields of `SamplingParams`, which stand over `params`; seed and max_new_tokens may be one per prompt.
        batch_size: how many requests run together.
        original_settings: follow the base's generation_config as `generate` does in what forbids, forces or penalises
        tokens and limits the length; of the rest only temperature, top_k and top_p are not in `not_honoured`.
        Of self_spec: strategy auto (default), fused, two_forward, prompt_lookup or hybrid; of fused: prepare, for which
        accept lengths to draft ahead, all (default), last or so many; tree, how many draft nodes to verify, 0 for one
        chain, None for as many as fit into ROWS rows where candidates' chances are known; of hybrid: in as many rows,
        or with prepare none, which drafts and verifies in turn, as many.
        Of diffusion: threshold, confidence from which a token is filled in, by default SURE; tolerance, by how many
        nats it may fall short of the base's own choice to be kept, by default SHORT: 0 gives ar's text, inf keeps all.
        Raises UsageError for wrong options, for options that mean nothing beside the others, and for prompts that are
        none or are longer than the context.
        """
        how = (strategy, prepare, tree, batch_size, threshold, tolerance)
        events = self._decode(prompts, params, mode, how, original_settings, keywords, None)
        return [event.result for event in sorted(events, key=lambda e: (e.index, e.sample)) if event.result is not None]

    def stream(
        self,
        prompts: Prompts,
        params: Params | Sequence[Params] | str | None = None,
        mode: str = "self_spec",
        *,
        strategy: str | None = None,
        prepare: str | int | None = None,
        tree: int | None = None,
        threshold: float | None = None,
        tolerance: float | None = None,
        batch_size: int = 8,
        original_settings: bool = True,
        with_text: bool = True,
        **keywords: Unpack[Keywords],
    ) -> Generator[Event]:
        """As `generate`, yielding an event whenever a request has new output; its last event holds the result.

        with_text: text comes with the tokens, as soon as later tokens cannot change it.
        """
        how = (strategy, prepare, tree, batch_size, threshold, tolerance)
        return self._decode(prompts, params, mode, how, original_settings, keywords, flag("with_text", with_text))

    def infill(self, prefix: Prompt, suffix: Prompt, **options: Any) -> Filled:
        """The likeliest text between two others, greedily: `Filled`, with all candidates and what they cost.

        prefix, suffix: text or token ids.  longest: most tokens between them, or lengths: the ones to try; by default
        1 to as many as the artifact has learned.  given: what stands there now, judged beside the others.
        Raises UsageError where the artifact or the backend cannot, and for what is no such text.
        """
        self.backend.check_usable()
        return infill(self, prefix, suffix, **options)

    def astream(
        self,
        prompts: Prompts,
        params: Params | Sequence[Params] | str | None = None,
        mode: str = "self_spec",
        **options: Any,
    ) -> AsyncGenerator[Event]:
        """As `stream`, for `async for`: steps run in a worker thread.  Several may run at once.

        Where it is cancelled or closed the step that runs is waited for, and the cache is given back.
        """
        return in_thread(self.stream(prompts, params, mode, **options))

    def _decode(
        self,
        prompts: Prompts,
        params: Params | Sequence[Params] | str | None,
        mode: str,
        how: tuple[Any, ...],
        original_settings: bool,
        keywords: Mapping[str, Any],
        with_text: bool | None,
    ) -> Generator[Event]:
        """Check everything and make the requests, at once; decode as events are asked for.

        with_text: None: only the last event of each request comes.
        """
        self.backend.check_usable()
        options = None if isinstance(params, str) else params
        mode = params if isinstance(params, str) else mode
        way = check_options(mode, self.layout, *how)
        texts, original = listed(prompts), flag("original_settings", original_settings)
        asked = asked_of(options, keywords, len(texts), self.backend, original, way.mode)
        requests = requests_for(texts, asked, self.backend, self.limits.context, self.tokenizer, bool(with_text))
        warn_of_differences(self.config.get("template"), self.tokenizer, zip(texts, asked, strict=True), self._told)
        slots = min(way.batch_size, max(1, len(requests)), self.backend.most_rows or way.batch_size)
        cycle = cycle_of(way, self.layout, self._acceptance, self.backend, typical(requests), slots)
        return self._events(way, cycle, requests, slots, with_text)

    def _events(
        self, way: Decoding, cycle: Cycle | None, requests: list[Request], slots: int, with_text: bool | None
    ) -> Generator[Event]:
        turn, longest = self.backend.turns.turn, max((len(r.prompt) + r.max_new_tokens for r in requests), default=1)
        with turn():
            cache = self.backend.new_cache(slots, longest)
        confident = way.name == "auto" or (way.mode == "self_spec" and isinstance(way.prepare, int))
        run = Run(
            self.backend, cache, typical(requests), self.layout, self.limits, way.name, cycle, way.threshold,
            way.tolerance, confident, **needs(requests), pieces=pieces_of(self.backend, self.prefixes),
        )  # fmt: skip
        try:
            with turn():
                steps = self.backend.stepper(run, requests, slots, self.policy, self.device_policy)
            yield from self._loop(run, steps, requests, slots, with_text)
        finally:
            cache.release()

    def _loop(
        self, run: Run, steps: Stepper, requests: list[Request], slots: int, with_text: bool | None
    ) -> Generator[Event]:
        scheduler = Scheduler(requests, slots)
        reader = Reader(self.tokenizer, with_text)
        while scheduler:
            with self.backend.turns.turn():
                touched = self._turn(run, steps, scheduler)
            for request in touched:
                if event := reader.event(request):
                    yield event
                    if request is not touched[-1]:
                        self.backend.turns.check_open()  # whoever reads a stream may have closed the engine

    def _turn(self, run: Run, steps: Stepper, scheduler: Scheduler) -> list[Request]:
        """Admit what fits, prefill it, run a step of the others, retire what is done; returns all that took part."""
        begin = time.perf_counter()
        admitted = scheduler.admit()
        for request in admitted:
            request.started = begin
            run.cache.open(request.slot, len(request.prompt) + request.max_new_tokens)
        run.watch(admitted)
        with torch.inference_mode():
            if admitted:
                prefill_step(run, admitted)
            for request in admitted:
                request.stats.prefill_seconds = time.perf_counter() - begin
            steps.start([r for r in admitted if not r.done])
            running = [r for r in scheduler.running if not r.done and r not in admitted]
            if running:
                steps.step(running)
        touched = list(scheduler.running)
        for request in scheduler.retire():
            steps.finish(request)
            run.cache.close(request.slot)
            request.seen = request.counts = request.guard = request.lookup = request.continuations = None
        return touched
