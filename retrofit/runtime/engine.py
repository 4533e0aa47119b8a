"""Requests in, tokens out: load an artifact or wrap a live model, then generate or stream in any mode.

Owns the loop (admit, prefill, step, retire) and the choice of strategy; knows no row, no token rule and no kernel.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retrofit import artifact as artifacts
from retrofit.adapters.attach import Attached, attach
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.errors import UsageError
from retrofit.hub import Base, live_fingerprint, load_base
from retrofit.runtime.backends.hf import wrap
from retrofit.runtime.backends.interface import BUCKET_ROWS, Backend
from retrofit.runtime.host_steps import HostSteps
from retrofit.runtime.loading import check_options as check_loading
from retrofit.runtime.loading import check_same_base, fits_fused, fused_backend
from retrofit.runtime.modes import Run, prefill_step
from retrofit.runtime.plan import Limits
from retrofit.runtime.policy import ROWS, AutoPolicy, tree_shape
from retrofit.runtime.request import Request, Stats
from retrofit.runtime.sampling import SamplingParams
from retrofit.runtime.scheduler import Scheduler

if TYPE_CHECKING:
    # These need Triton, which exists on Linux only.
    from retrofit.runtime.device_loop import DeviceSteps

MODES = ("ar", "diffusion", "self_spec")
STRATEGIES = ("auto", "fused", "two_forward", "prompt_lookup")

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Result:
    """One finished request.  tokens include EOS; text has no special tokens and ends before the stop string."""

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
    """Decodes with one model in three modes.  Build with `Engine.load` or `Engine.from_model`."""

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
        self.policy = AutoPolicy(self.layout, self.limits, self._acceptance)
        self.device_policy = AutoPolicy(self.layout, self.limits, self._acceptance)
        """What steps planned on the device cost; they are timed apart from those planned on the host."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "auto",
        exact: str = "auto",
        backend: str = "auto",
        *,
        rows: int = BUCKET_ROWS,
        base: str | None = None,
        offline: bool = False,
        trust_remote_code: bool = False,
    ) -> Engine:
        """Load an artifact folder and the base it belongs to.

        base: folder or Hub id to use in place of the one the artifact names.  dtype auto: what it was trained against.
        backend: hf (transformers' modules), fused (our kernels, on a GPU), auto (fused on a GPU in half precision,
        where it knows the model).  exact: how far rows are guaranteed not to depend on each other's number on the fused
        backend: off, bucket (every decoding forward has `rows` rows), invariant (own kernels throughout); auto is
        bucket there, and off on hf.
        Raises ArtifactError (corrupt, or another base), UsageError, ResourceError, UnsupportedModelError, and GateError
        where this machine does not keep what the level promises.
        """
        check_loading(backend, exact, dtype)
        artifact = artifacts.read(Path(path))
        named = artifact.config["base"]
        name, revision = base or named["model"], None if base else named.get("revision")
        if dtype == "auto":
            dtype = named.get("dtype", "auto")
        if backend == "auto":
            backend = "fused" if fits_fused(name, revision, device, dtype, offline) else "hf"
            check_loading(backend, exact, dtype)
        options: dict[str, Any] = {"offline": offline, "trust_remote_code": trust_remote_code, "need_tokenizer": False}
        if backend == "hf":
            return cls._with_artifact(load_base(name, revision, dtype=dtype, device=device, **options), artifact)
        files = load_base(name, revision, device=device, with_model=False, **options)
        fused = fused_backend(files, artifact, device, dtype, "bucket" if exact == "auto" else exact, rows)
        if fused.device.type == "cuda" and fused.exact != "off":
            from retrofit.runtime.exact import demand, self_test

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
    ) -> Engine:
        """Wrap a live model.  adapter None: `ar` is the model's own, and `self_spec` runs with an untrained draft.

        The model's projections are wrapped in place, gate closed: its own forward and `generate` stay bit-identical.
        `close()` takes the wrapping off.  Raises as `load` does.
        """
        if adapter is not None:
            artifact = artifacts.read(Path(adapter))
            base = Base(model, tokenizer, artifact.config["base"]["model"], None, None, live_fingerprint(model))
            return cls._with_artifact(base, artifact)
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
        return cls(backend, attached.layout, tokenizer, attached=attached)

    @classmethod
    def _with_artifact(cls, base: Base, artifact: artifacts.Artifact) -> Engine:
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
        return cls(backend, attached.layout, base.tokenizer, config.get("acceptance"), config, base, attached)

    def close(self) -> None:
        """Give the live model back as it was: no adapter, no wrapping."""
        self.backend.close()
        if self._attached is not None:
            self._attached.detach()

    @property
    def attached(self) -> Attached:
        """The transformers model with its adapter.  Raises UsageError: the fused backend has none."""
        if self._attached is None:
            raise UsageError(f"this needs the transformers model, which the {self.backend.name} backend does not hold")
        return self._attached

    def generate(
        self,
        prompts: Sequence[Prompt],
        mode: str = "self_spec",
        *,
        strategy: str = "auto",
        prepare: str | int = "all",
        tree: int | None = None,
        max_new_tokens: int | Sequence[int] = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 8,
        ignore_eos: bool = False,
        threshold: float = 0.9,
    ) -> list[Result]:
        """Generate for every prompt; results in the order of the prompts.

        prompts: text (raw), token ids, or messages (chat template).  seed: one int (prompt i uses seed + i) or one
        per prompt, as max_new_tokens.  batch_size: how many requests run together.  threshold: diffusion's confidence.
        tree: with `fused`, how many draft nodes to verify; None: as many as keep a request within ROWS rows a forward,
        where the artifact knows the chances of its candidates; 0: one chain.
        Raises UsageError for wrong options and for prompts that are empty or longer than the context.
        """
        events = self.stream(
            prompts, mode, strategy=strategy, prepare=prepare, tree=tree, max_new_tokens=max_new_tokens,
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, stop=stop,
            seed=seed, batch_size=batch_size, ignore_eos=ignore_eos, threshold=threshold, with_text=False,
        )  # fmt: skip
        results = [event.result for event in events if event.result is not None]
        return sorted(results, key=lambda r: r.index)

    def stream(
        self,
        prompts: Sequence[Prompt],
        mode: str = "self_spec",
        *,
        strategy: str = "auto",
        prepare: str | int = "all",
        tree: int | None = None,
        max_new_tokens: int | Sequence[int] = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 8,
        ignore_eos: bool = False,
        threshold: float = 0.9,
        with_text: bool = True,
    ) -> Iterator[Event]:
        """As `generate`, yielding an event whenever a request has new output; its last event holds the result."""
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        check_options(mode, strategy, prepare, tree, self.layout, min(limits, default=1), batch_size, threshold)
        params = SamplingParams(temperature, top_k, top_p, repetition_penalty)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        requests = self._requests(prompts, seed, limits, stops, ignore_eos)
        longest = max((len(r.prompt) + r.max_new_tokens for r in requests), default=1)
        slots = min(batch_size, max(1, len(requests)), self.backend.most_rows or batch_size)
        shape = None
        if (mode, strategy) == ("self_spec", "fused"):
            shape = tree_shape(self.layout, self._acceptance, prepare, tree, temperature > 0, self._rows_each(slots))

        nodes = 0 if shape is None else shape.nodes
        if self.backend.most_nodes is not None and nodes > self.backend.most_nodes:
            raise UsageError(
                f"tree is {nodes}; the {self.backend.name} backend verifies up to {self.backend.most_nodes} draft nodes"
            )

        def events() -> Iterator[Event]:
            run = Run(
                self.backend,
                self.backend.new_cache(slots, longest),
                params,
                self.layout,
                self.limits,
                threshold,
                with_confidence=mode == "self_spec" and (strategy == "auto" or isinstance(prepare, int)),
                shape=shape,
            )
            try:
                run.watch(requests)
                steps = self._stepper(run, slots, requests, mode, strategy, prepare)
                yield from self._loop(run, steps, requests, slots, with_text)
            finally:
                run.cache.release()

        return events()

    def _rows_each(self, requests: int) -> int:
        """Rows that a request may have in a forward, if so many run."""
        most = self.backend.most_rows
        return ROWS if most is None else min(ROWS, most // self.backend.lanes(requests))

    def _loop(
        self,
        run: Run,
        steps: HostSteps | DeviceSteps,
        requests: list[Request],
        slots: int,
        with_text: bool,
    ) -> Iterator[Event]:
        scheduler = Scheduler(requests, slots)
        sent = {r.index: (0, 0) for r in requests}
        while scheduler:
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
            for request in touched:
                if event := self._event(request, sent, with_text):
                    yield event

    def _stepper(
        self, run: Run, slots: int, requests: list[Request], mode: str, strategy: str, prepare: str | int
    ) -> HostSteps | DeviceSteps:
        """Steps planned on the device where that is built: the fused backend, but for diffusion, n-gram drafts, a
        repetition penalty, and blocks without an anchor."""
        name = strategy if mode == "self_spec" else mode
        if (
            self.backend.name == "fused"
            and name not in ("diffusion", "prompt_lookup")
            and run.params.repetition_penalty in (None, 1.0)
            and (name == "ar" or (self.layout.anchored and self.backend.heads is not None))
        ):
            from retrofit.runtime.device_loop import DeviceSteps, loop_over
            from retrofit.runtime.kinds import fixed_template

            loop = loop_over(run)
            room = run.rows_each(loop.lanes_for(slots))
            template = None if name == "auto" else fixed_template(name, prepare, self.layout, run.shape, room)
            ignore_eos = all(not r.eos for r in requests)
            return DeviceSteps(run, loop, self.device_policy, template, ignore_eos)
        if name == "auto" and requests:
            self.policy.calibrate(run, slots)
        return HostSteps(run, self.policy, mode, strategy, prepare)

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
            stable = result.text if result is not None and result.text is not None else stable_text(request)
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

    def _requests(
        self,
        prompts: Sequence[Prompt],
        seed: int | Sequence[int],
        limits: Sequence[int],
        stop: tuple[str, ...],
        ignore_eos: bool,
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise UsageError("prompts is a string; give a list of prompts")
        if stop and (self.tokenizer is None or not all(stop)):
            raise UsageError("stop strings need a tokenizer" if self.tokenizer is None else "a stop string is empty")
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise UsageError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one int or one seed per prompt")
        if len(limits) != len(prompts):
            raise UsageError(f"{len(limits)} max_new_tokens for {len(prompts)} prompts; give one for all or one each")
        requests = []
        for i, prompt in enumerate(prompts):
            tokens = self._encode(prompt, i)
            room = self.limits.context - len(tokens)
            if room < 1:
                raise UsageError(
                    f"prompt {i} has {len(tokens)} tokens; the model's context is {self.limits.context} and must hold "
                    "at least one more",
                    "shorten the prompt",
                )
            request = Request(
                i, tokens, seeds[i], min(limits[i], room), frozenset() if ignore_eos else self.backend.eos, stop
            )
            request.decode = self._decode if self.tokenizer is not None else None
            requests.append(request)
        return requests

    def _encode(self, prompt: Prompt, number: int) -> list[int]:
        if len(prompt) == 0:
            raise UsageError(f"prompt {number} is empty", "a model needs at least one token to continue from")
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            tokens = [int(t) for t in prompt]  # type: ignore[arg-type]
            wrong = [t for t in tokens if not 0 <= t < self.backend.head.vocab]
            if wrong:
                raise UsageError(
                    f"prompt {number} holds token id {wrong[0]}; the vocabulary has {self.backend.head.vocab}"
                )
            return tokens
        if self.tokenizer is None:
            raise UsageError(
                "text prompts need a tokenizer; this engine has none", "give token ids, or pass tokenizer="
            )
        if isinstance(prompt, str):
            tokens = list(self.tokenizer(prompt)["input_ids"])
            if not tokens:
                raise UsageError(f"prompt {number} holds no token: {prompt!r}")
            return tokens
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError("messages need a chat template; this model's tokenizer has none", "give plain text")
        encoded = self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])


def stable_text(request: Request) -> str:
    """Output text that later tokens cannot change: no half character at the end, no possible start of a stop string."""
    text = request.text()
    while text.endswith("\ufffd"):
        text = text[:-1]
    for stop in request.stop:
        for size in range(min(len(stop), len(text)), 0, -1):
            if text.endswith(stop[:size]):
                text = text[:-size]
                break
    return text


def check_options(
    mode: str,
    strategy: str,
    prepare: str | int,
    tree: int | None,
    layout: DraftLayout,
    max_new_tokens: int,
    batch_size: int,
    threshold: float,
) -> None:
    """Raises UsageError naming the option and what it may be."""
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} does not exist", f"modes are {', '.join(MODES)}")
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy {strategy!r} does not exist", f"strategies are {', '.join(STRATEGIES)}")
    if prepare not in ("all", "last") and not (isinstance(prepare, int) and prepare >= 1):
        raise UsageError(f"prepare is {prepare!r}; it may be all, last, or a number of accept lengths >= 1")
    if strategy == "fused" and not layout.anchored:
        raise UsageError("strategy fused needs an artifact with draft.seed_row base", "use two_forward or auto")
    if tree is not None and not 0 <= tree <= 1024:
        raise UsageError(f"tree is {tree}; it is a number of draft nodes, 0 to 1024")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1")
    if not 0 <= threshold <= 1:
        raise UsageError(f"threshold is {threshold}; it is a probability, 0 to 1")
