"""Requests in, tokens out: load an artifact or wrap a live model, then generate or stream in any mode.

Owns the loop (admit, prefill, step, retire) and the choice of strategy; knows no row, no token rule and no kernel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retrofit.adapters.attach import Attached, attach
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.live import refuse_live
from retrofit.adapters.roles import ROLES
from retrofit.artifact import folder as artifacts
from retrofit.errors import UsageError
from retrofit.hub import Base, live_fingerprint, load_base
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.backends.hf.backend import HFBackend, wrap
from retrofit.runtime.backends.hf.exact_rows import Settled, settle
from retrofit.runtime.backends.interface import BUCKET_ROWS, Backend, Stepper
from retrofit.runtime.host.modes import prefill_step
from retrofit.runtime.loading import check_options as check_loading
from retrofit.runtime.loading import check_same_base, fits_fused, fused_backend
from retrofit.runtime.options import (
    check_options,
    each,
    flag,
    sampling,
    seeds_of,
    stop_tokens_of,
    stops_of,
    whole,
)
from retrofit.runtime.plan import Cycle, Limits, fixed_cycle
from retrofit.runtime.prompts import Prompts, encode, listed
from retrofit.runtime.request import Request, Stats
from retrofit.runtime.rules.sampling import SamplingParams
from retrofit.runtime.rules.tree import ROWS, fixed_tree
from retrofit.runtime.run import Run
from retrofit.runtime.scheduler import Scheduler
from retrofit.runtime.settings import Settings

ENCODING = threading.Lock()
"""Tokenizers keep truncation and padding in themselves, and refuse to be set while another thread encodes."""


@dataclass(frozen=True)
class Result:
    """One finished request.  tokens include EOS; text has no special tokens and ends before what stopped it."""

    index: int
    prompt: list[int]
    tokens: list[int]
    text: str | None
    finish_reason: str
    stats: Stats


@dataclass(frozen=True)
class Event:
    """New output of one request: text that can no longer change, and the tokens since the last event."""

    index: int
    tokens: list[int]
    text: str
    result: Result | None


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
        self.base = base
        self._attached = attached
        self.limits = Limits(backend.context_length, backend.rope_boundary)
        self._acceptance = acceptance or {}
        self.policy = AutoPolicy(self.layout, self._acceptance)
        self.device_policy = AutoPolicy(self.layout, self._acceptance)
        """What steps planned on the device cost; they are timed apart from those planned on the host."""
        self.settled: Settled | None = None
        """How the level of exactness was found, on the hf backend."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "auto",
        exact: str = "auto",
        backend: str = "auto",
        *,
        rows: int | None = None,
        base: str | None = None,
        offline: bool = False,
        trust_remote_code: bool = False,
    ) -> Engine:
        """Load an artifact folder and the base it belongs to.

        base: folder or Hub id to use in place of the one the artifact names.  dtype auto: what it was trained against.
        backend: hf (transformers' modules), fused (our kernels, on a GPU), auto (fused on a GPU in half precision,
        where it knows the model).  exact: how far rows are guaranteed not to depend on the rows beside them: off,
        bucket (every decoding forward has `rows` rows), invariant (any number of rows).  auto is bucket on the fused
        backend; on hf, in half precision, the cheapest level that a self-test finds to hold here, and off in fp32.
        `engine.backend.exact` says which it is, `engine.settled` why.
        Raises ArtifactError (corrupt, or another base), UsageError, ResourceError, UnsupportedModelError, and GateError
        where this machine does not keep what the level promises.
        """
        check_loading(backend, exact, dtype)
        artifact = artifacts.read(Path(path))
        named = artifact.config["base"]
        name, revision = base or artifacts.base_of(path, artifact.config), None if base else named.get("revision")
        if dtype == "auto":
            dtype = named.get("dtype", "auto")
        if backend == "auto":
            backend = "fused" if fits_fused(name, revision, device, dtype, offline) else "hf"
            check_loading(backend, exact, dtype)
        options: dict[str, Any] = {"offline": offline, "trust_remote_code": trust_remote_code, "need_tokenizer": False}
        if backend == "hf":
            loaded = load_base(name, revision, dtype=dtype, device=device, **options)
            return cls._with_artifact(loaded, artifact, exact, rows)
        files = load_base(name, revision, device=device, with_model=False, **options)
        fused = fused_backend(
            files, artifact, device, dtype, "bucket" if exact == "auto" else exact, rows or BUCKET_ROWS
        )
        if fused.device.type == "cuda" and fused.exact != "off":
            from retrofit.runtime.backends.fused.self_test import demand, self_test

            # Before any step is recorded: a shape may be switched to our own product.
            demand(self_test(fused, fused.layout.drafts))
        return cls(fused, fused.layout, files.tokenizer, artifact.config.get("acceptance"), artifact.config, files)

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
    ) -> Engine:
        """Wrap a live model.  adapter None: `ar` is the model's own, and `self_spec` runs with an untrained draft.

        exact, rows: as in `load`.  The model's projections are wrapped in place, gate closed: its own forward and
        `generate` stay bit-identical; `close()` takes the wrapping off.
        Raises as `load` does, UnsupportedModelError for a model that has an adapter of its own, is quantised, or is not
        on one CPU or CUDA device, and UsageError for what is no such model or while another engine has it.
        """
        check_loading("hf", exact, "auto")
        refuse_live(model)
        if adapter is not None:
            artifact = artifacts.read(Path(adapter))
            base = Base(model, tokenizer, artifact.config["base"]["model"], None, None, live_fingerprint(model))
            return cls._with_artifact(base, artifact, exact, rows)
        attached, backend = wrap(
            model,
            lambda: attach(
                model,
                layout or DraftLayout(),
                rank=8,
                alpha=8.0,
                targets=ROLES,
                markov_rank=8,
                confidence=True,
            ),
        )
        return cls(backend, attached.layout, tokenizer, attached=attached)._settled(backend, exact, rows)

    @classmethod
    def _with_artifact(cls, base: Base, artifact: artifacts.Artifact, exact: str, rows: int | None) -> Engine:
        config = artifact.config
        check_same_base(base, artifact)
        adapter = config["adapter"]

        def build() -> Attached:
            attached = attach(
                base.model,
                DraftLayout(**config["draft"]),
                rank=adapter["rank"],
                alpha=adapter["alpha"],
                targets=adapter["targets"],
                markov_rank=adapter["markov_rank"],
                confidence=adapter["confidence"],
                modules=adapter["modules"],
            )
            try:
                attached.load(artifact.adapter_state, artifact.heads)
            except BaseException:
                attached.detach()
                raise
            for parameter in attached.parameters():
                parameter.requires_grad_(False)
            return attached

        attached, backend = wrap(base.model, build)
        engine = cls(backend, attached.layout, base.tokenizer, config.get("acceptance"), config, base, attached)
        return engine._settled(backend, exact, rows)

    def _settled(self, backend: HFBackend, exact: str, rows: int | None) -> Engine:
        """This engine, at a level of exactness; closed if the level does not hold."""
        try:
            self.settled = settle(backend, exact, self.layout.drafts, rows)
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
        mode: str = "self_spec",
        *,
        strategy: str = "auto",
        prepare: str | int = "all",
        tree: int | None = None,
        max_new_tokens: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: int | Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 8,
        ignore_eos: bool = False,
        original_settings: bool = True,
        threshold: float = 0.9,
    ) -> list[Result]:
        """Generate for every prompt; results in the order of the prompts.

        prompts: a list of text (raw), token ids, or messages (chat template; a last message of the assistant's is
        continued); or a tokenizer's output, a tensor [prompts, tokens], or one list of token ids: see `prompts.py`.
        seed: one int (prompt i uses seed + i) or one per prompt, as max_new_tokens.  batch_size: how many requests run
        together.  threshold: diffusion's confidence.
        original_settings: follow the base's generation_config as `generate` does in what forbids, forces or penalises
        tokens and limits the length; what of it is not followed is in `not_honoured`.  Temperature, top_k and top_p are
        never taken from it.  repetition_penalty: None is the base's own, 1 is off.  max_new_tokens: None is the base's
        own, else 128.  stop, stop_token_ids: end a text before themselves; stop strings may hold special tokens.
        tree: with `fused`, how many draft nodes to verify; None: as many as keep a request within ROWS rows a forward,
        where the artifact knows the chances of its candidates; 0: one chain.
        Raises UsageError for wrong options, and for prompts that are none or are longer than the context.
        """
        events = self.stream(
            prompts, mode, strategy=strategy, prepare=prepare, tree=tree, max_new_tokens=max_new_tokens,
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, stop=stop,
            stop_token_ids=stop_token_ids, seed=seed, batch_size=batch_size, ignore_eos=ignore_eos,
            original_settings=original_settings, threshold=threshold, with_text=False,
        )  # fmt: skip
        results = [event.result for event in events if event.result is not None]
        return sorted(results, key=lambda r: r.index)

    def stream(
        self,
        prompts: Prompts,
        mode: str = "self_spec",
        *,
        strategy: str = "auto",
        prepare: str | int = "all",
        tree: int | None = None,
        max_new_tokens: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: int | Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 8,
        ignore_eos: bool = False,
        original_settings: bool = True,
        threshold: float = 0.9,
        with_text: bool = True,
    ) -> Iterator[Event]:
        """As `generate`, yielding an event whenever a request has new output; its last event holds the result."""
        self.backend.check_usable()
        prepare, tree, batch_size, threshold = check_options(
            mode, strategy, prepare, tree, self.layout, batch_size, threshold
        )
        settings = self.backend.settings if flag("original_settings", original_settings) else Settings()
        params = sampling(temperature, top_k, top_p, settings.penalty(repetition_penalty))
        rules = settings.rules_without_eos() if flag("ignore_eos", ignore_eos) else settings.rules
        asked = listed(prompts)
        requests = self._requests(
            asked, seeds_of(seed, len(asked)), max_new_tokens, stops_of(stop),
            stop_tokens_of(stop_token_ids, self.backend.head.vocab), settings, ignore_eos,
        )  # fmt: skip
        longest = max((len(r.prompt) + r.max_new_tokens for r in requests), default=1)
        slots = min(batch_size, max(1, len(requests)), self.backend.most_rows or batch_size)
        name = strategy if mode == "self_spec" else mode
        cycle = None if name in ("auto", "diffusion") else self._cycle(name, prepare, tree, params, slots)

        def events() -> Iterator[Event]:
            turn = self.backend.turns.turn
            with turn():
                cache = self.backend.new_cache(slots, longest)
            run = Run(
                self.backend,
                cache,
                params,
                self.layout,
                self.limits,
                name,
                cycle,
                threshold,
                with_confidence=name == "auto" or (mode == "self_spec" and isinstance(prepare, int)),
                rules=rules if rules.active else None,
            )
            try:
                with turn():
                    run.watch(requests)
                    steps = self.backend.stepper(run, requests, slots, self.policy, self.device_policy)
                yield from self._loop(run, steps, requests, slots, with_text)
            finally:
                run.cache.release()

        return events()

    def _cycle(self, strategy: str, prepare: str | int, tree: int | None, params: SamplingParams, slots: int) -> Cycle:
        """The plans of `ar` or of a fixed strategy.  Raises UsageError for a tree that the backend cannot verify."""
        grown = None
        if strategy == "fused":
            sampled = params.temperature > 0
            grown = fixed_tree(self.layout, self._acceptance, prepare, tree, sampled, self._rows_each(slots))
        most = self.backend.most_nodes
        if grown is not None and most is not None and grown.nodes > most:
            raise UsageError(
                f"tree is {grown.nodes}; the {self.backend.name} backend verifies up to {most} draft nodes"
            )
        return fixed_cycle(strategy, prepare, self.layout, grown)

    def _rows_each(self, requests: int) -> int:
        """Rows that a request may have in a forward, if so many run."""
        most = self.backend.most_rows
        return ROWS if most is None else min(ROWS, most // self.backend.lanes(requests))

    def _loop(
        self,
        run: Run,
        steps: Stepper,
        requests: list[Request],
        slots: int,
        with_text: bool,
    ) -> Iterator[Event]:
        scheduler = Scheduler(requests, slots)
        sent = {r.index: (0, 0) for r in requests}
        while scheduler:
            with self.backend.turns.turn():
                touched = self._turn(run, steps, scheduler)
            for request in touched:
                if event := self._event(request, sent, with_text):
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
        with torch.inference_mode():
            self._prefill(run, admitted)
            steps.start([r for r in admitted if not r.done])
            running = [r for r in scheduler.running if not r.done and r not in admitted]
            if running:
                steps.step(running)
        touched = list(scheduler.running)
        for request in scheduler.retire():
            steps.finish(request)
            run.cache.close(request.slot)
        return touched

    def _prefill(self, run: Run, admitted: list[Request]) -> None:
        if not admitted:
            return
        begin = time.perf_counter()
        prefill_step(run, admitted)
        for request in admitted:
            request.stats.prefill_seconds = time.perf_counter() - begin

    def _event(self, request: Request, sent: dict[int, tuple[int, int]], with_text: bool) -> Event | None:
        if not with_text and not request.done:
            return None
        tokens_sent, text_sent = sent[request.index]
        emitted = request.emitted
        if len(emitted) == tokens_sent and not request.done:
            return None
        result = self._result(request) if request.done else None
        text = ""
        if self.tokenizer is not None and with_text:
            stable = result.text if result is not None and result.text is not None else request.stable_text()
            text = stable[text_sent:]
        sent[request.index] = (len(emitted), text_sent + len(text))
        return Event(request.index, emitted[tokens_sent:], text, result)

    def _result(self, request: Request) -> Result:
        text = request.text() if request.decode is not None else None
        assert request.finish_reason is not None
        return Result(request.index, request.prompt, request.emitted, text, request.finish_reason, request.stats)

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _spell(self, tokens: Sequence[int]) -> str:
        """Text with special tokens."""
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _requests(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        max_new_tokens: int | Sequence[int] | None,
        stop: tuple[str, ...],
        stop_tokens: frozenset[int],
        settings: Settings,
        ignore_eos: bool,
    ) -> list[Request]:
        """One request per prompt.  Raises UsageError for a prompt or an option that cannot be."""
        if stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer; this engine has none", "give stop_token_ids")
        limits = each("max_new_tokens", max_new_tokens, len(prompts))
        requests = []
        for i, prompt in enumerate(prompts):
            with ENCODING:
                tokens = encode(prompt, f"prompt {i}", self.tokenizer, self.backend.input_vocab)
            room = self.limits.context - len(tokens)
            if room < 1:
                raise UsageError(
                    f"prompt {i} has {len(tokens)} tokens; the model's context is {self.limits.context} and must hold "
                    "at least one more",
                    "shorten the prompt",
                )
            limit = settings.new_tokens(len(tokens)) if limits[i] is None else whole("max_new_tokens", limits[i], 1)
            if limit < 1:
                raise UsageError(
                    f"prompt {i} has {len(tokens)} tokens; the model's own generation settings allow {settings.limit}",
                    "give max_new_tokens",
                )
            request = Request(
                i, tokens, seeds[i], min(limit, room), frozenset() if ignore_eos else self.backend.eos, stop,
                stop_tokens=stop_tokens, asked=limit,
            )  # fmt: skip
            if self.tokenizer is not None:
                request.decode, request.spell = self._decode, self._spell
            requests.append(request)
        return requests
