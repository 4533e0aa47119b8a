"""One engine in several threads, and the live model's own forward and `generate` beside it: right, or refused at once.

Where two threads have to meet inside a forward, a hook makes them: nothing here depends on how fast they run.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise
from fused_models import pair, plain_decoder, plain_sampling, small
from tiny_models import build
from torch import Tensor
from transformers import PreTrainedModel

from retrofit.adapters import gated_lora
from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto import cost
from retrofit.runtime.backends import threads
from retrofit.runtime.backends.hf import answers
from retrofit.runtime.engine import Engine

LAYOUT = DraftLayout(block=3)
PROMPTS = random_prompts((20, 7))
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("ar", {}),
    ("self_spec", {"strategy": "auto"}),
    ("self_spec", {"strategy": "fused", "tree": 5}),
    ("self_spec", {"strategy": "two_forward", "temperature": 0.8, "top_k": 20}),
    ("self_spec", {"strategy": "prompt_lookup"}),
    ("self_spec", {"strategy": "hybrid", "prepare": "none"}),
    ("diffusion", {}),
    ("self_spec", {"strategy": "fused", "tree": 0, "repetition_penalty": 1.3}),
    ("self_spec", {"strategy": "auto", "temperature": 1.0}),
]
NEW = 12


@pytest.fixture
def changing() -> Iterator[None]:
    """Threads change every few operations."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def quick_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "REPEATS", 1)


def opened(model: PreTrainedModel) -> Engine:
    return randomise(Engine.from_model(model, layout=LAYOUT))


def call(engine: Engine, way: int) -> list[list[int]]:
    mode, options = WAYS[way]
    results = engine.generate(PROMPTS, mode, max_new_tokens=NEW, ignore_eos=True, seed=way, **options)
    return [result.tokens for result in results]


def own_text(model: PreTrainedModel) -> list[int]:
    ids = torch.tensor([PROMPTS[0]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return out[0].tolist()


def own_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPTS[0]]), use_cache=False).logits


def in_thread(function: Callable[[], Any]) -> Any:
    """What the function returns, or raises, in a thread of its own."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if not found:
        raise TimeoutError("a thread does not come back")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def during_a_forward(engine: Engine, meanwhile: Callable[[], Any]) -> list[Any]:
    """What `meanwhile` gives in another thread in the middle of each forward of a call in this one."""
    found: list[Any] = []
    here = threading.get_ident()

    def meet(*_: Any) -> None:
        if not torch.compiler.is_dynamo_compiling() and threading.get_ident() == here:
            found.append(in_thread(meanwhile))

    handle = engine.backend.trunk.layers[1].self_attn.o_proj.register_forward_hook(meet)
    try:
        call(engine, 2)
    finally:
        handle.remove()
    assert len(found) > 2
    return found


# Right


@pytest.mark.usefixtures("changing")
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "phi3_longrope"])
def test_four_threads_on_one_engine_and_the_users_generate_in_a_fifth(name: str) -> None:
    model = build(name)
    text, logits = own_text(model), own_logits(model)
    with opened(model) as engine:
        want = [call(engine, way) for way in range(len(WAYS))]
        got: dict[tuple[int, int], Any] = {}
        texts: list[Any] = []
        done = threading.Event()

        def decode(thread: int) -> None:
            for n in range(len(WAYS)):
                way = (thread * 2 + n) % len(WAYS)
                got[thread, way] = call(engine, way)

        def user() -> None:
            while not done.is_set():
                texts.append((own_text(model), own_logits(model)))

        running = [threading.Thread(target=decode, args=(n,)) for n in range(4)]
        fifth = threading.Thread(target=user)
        for thread in (*running, fifth):
            thread.start()
        for thread in running:
            thread.join()
        done.set()
        fifth.join()
    assert all(got.get((thread, way)) == want[way] for thread in range(4) for way in range(len(WAYS)))
    assert texts and all(said == text and torch.equal(found, logits) for said, found in texts)
    assert torch.equal(own_logits(model), logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_a_forward_of_the_users_in_the_middle_of_one_of_ours(name: str) -> None:
    model = build(name)
    if name == "gemma2":
        model.set_attn_implementation("eager")
    want, text = own_logits(model), own_text(model)
    engine = opened(model)
    alone = call(engine, 2)
    assert all(torch.equal(found, want) for found in during_a_forward(engine, lambda: own_logits(model)))
    assert all(found == text for found in during_a_forward(engine, lambda: own_text(model)))
    assert all(found == alone for found in during_a_forward(engine, lambda: call(engine, 2)))
    implementation = (model.config._attn_implementation, model.config._experts_implementation)
    asked = during_a_forward(
        engine, lambda: (engine.backend.config._attn_implementation, engine.backend.config._experts_implementation)
    )
    assert set(asked) == {implementation}


class Shared:
    """In place of what each thread has its own of."""

    base_rows = config = attention = experts = rows = None


def test_what_threads_would_share_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: once with a shared gate, once with a shared choice of attention."""
    model = build("llama")
    want = own_logits(model)
    engine = opened(model)
    gate: Any = Shared()
    engine.backend.gate = gate
    for module in model.modules():
        if isinstance(module, gated_lora.GatedLoraLinear):
            module.gate = gate
    assert not all(torch.equal(found, want) for found in during_a_forward(engine, lambda: own_logits(model)))
    engine.close()
    engine = opened(model)
    monkeypatch.setattr(answers, "_ASKED", Shared())
    with pytest.raises(RuntimeError, match=r"needs a row plan|shape mismatch"):
        during_a_forward(engine, lambda: own_logits(model))


def test_streams_that_are_half_read_stand_in_nobodys_way() -> None:
    engine = opened(build("llama"))
    want = [call(engine, way) for way in range(len(WAYS))]
    streams = []
    for mode, options in WAYS:
        seed = len(streams)
        streams.append(engine.stream(PROMPTS, mode, max_new_tokens=NEW, ignore_eos=True, seed=seed, **options))
    got: list[list[list[int]]] = [[[], []] for _ in WAYS]
    turn = 0
    while any(streams):
        for way, stream in enumerate(streams):
            turn += 1
            step = (lambda s=stream: next(s, None)) if stream else lambda: None
            event = in_thread(step) if turn % 3 else step()
            if event is None:
                streams[way] = None
            else:
                got[way][event.index] += event.tokens
        if turn == 3 * len(WAYS):
            assert in_thread(lambda: call(engine, 1)) == want[1]
    assert got == want


def test_one_thread_at_a_time_changes_the_rotation() -> None:
    """Longrope writes the frequencies of a call into the module, and reads them again."""
    model = build("phi3_longrope")
    engine = opened(model)
    rotary = engine.backend.trunk.rotary_emb
    rows = torch.zeros(1, 1, 32)
    near, far = (rotary(rows, torch.tensor([[position]])) for position in (3, 100))
    inside, released = threading.Event(), threading.Event()
    copied = type(rotary.inv_freq).copy_

    class Halting(Tensor):
        """Frequencies that wait, once written, for another thread to write its own."""

        def copy_(self, *arguments: Any) -> Tensor:  # type: ignore[override]
            copied(self.as_subclass(Tensor), *arguments)
            if threading.current_thread().name == "near":
                inside.set()
                released.wait(2)
            return self

    rotary.inv_freq = rotary.inv_freq.as_subclass(Halting)
    found: list[Any] = []
    other = threading.Thread(name="near", target=lambda: found.extend(rotary(rows, torch.tensor([[3]]))))
    other.start()
    inside.wait(60)
    after = threading.Timer(0.2, released.set)
    after.start()
    beside = rotary(rows, torch.tensor([[100]]))
    released.set()
    other.join()
    for got, want in zip([*found, *beside], [*near, *far], strict=True):
        assert torch.equal(torch.Tensor(got), want)


def test_a_copy_of_the_model_is_a_model_of_its_own() -> None:
    model = build("qwen3_moe")
    want = own_logits(model)
    engine = opened(model)
    twin = copy.deepcopy(model)
    assert all(torch.equal(found, want) for found in during_a_forward(engine, lambda: own_logits(twin)))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "experts" in name:
                parameter.zero_()
    assert not torch.equal(own_logits(twin), want)
    assert torch.equal(own_logits(model), want)


def test_a_compiled_forward_of_the_users_stays_theirs() -> None:
    model = build("llama")
    want = own_logits(model)
    engine = opened(model)
    alone = call(engine, 2)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)

    def logits() -> Tensor:
        with torch.no_grad():
            return compiled(torch.tensor([PROMPTS[0]]), use_cache=False).logits

    assert all(torch.equal(found, want) for found in during_a_forward(engine, logits))
    assert call(engine, 2) == alone


def test_threads_that_begin_meanwhile_keep_their_count(monkeypatch: pytest.MonkeyPatch) -> None:
    count = torch.get_num_threads()
    cpu = torch.device("cpu")

    def begun() -> int:
        torch.ones(100).sum()
        return torch.get_num_threads()

    def broken() -> None:
        with threads.thread_limit(cpu, 1.0):
            assert torch.get_num_threads() == 1
            assert in_thread(begun) == 3
            raise KeyError

    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError):
            broken()
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(threads, "_setters", lambda: (None, int))
        with threads.thread_limit(cpu, 1.0):
            assert torch.get_num_threads() == (1 if threading.active_count() == 1 else 3)
        assert torch.get_num_threads() == in_thread(begun) == 3
    finally:
        torch.set_num_threads(count)


# The fused backend


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Engine:
    plain_decoder(monkeypatch)
    plain_sampling(monkeypatch)
    return pair(small("llama", num_hidden_layers=1))[0]


FUSED = [("ar", {}), ("self_spec", {"strategy": "fused"}), ("self_spec", {"strategy": "prompt_lookup"})]


def fused_call(engine: Engine, way: int) -> list[list[int]]:
    mode, options = FUSED[way]
    return [r.tokens for r in engine.generate([[1, 2, 3], [4]], mode, max_new_tokens=5, ignore_eos=True, **options)]


@pytest.mark.usefixtures("changing")
def test_threads_take_turns_on_the_fused_backend(fused: Engine) -> None:
    want = [fused_call(fused, way) for way in range(len(FUSED))]
    got: dict[tuple[int, int], Any] = {}

    def decode(thread: int) -> None:
        for way in range(len(FUSED)):
            got[thread, way] = fused_call(fused, way)

    running = [threading.Thread(target=decode, args=(n,)) for n in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert [got.get((thread, way)) == want[way] for thread in range(3) for way in range(len(FUSED))] == [True] * 9


def test_two_streams_on_the_fused_backend(fused: Engine) -> None:
    want = [fused_call(fused, way) for way in range(len(FUSED))]
    streams = [
        fused.stream([[1, 2, 3], [4]], mode, max_new_tokens=5, ignore_eos=True, **options) for mode, options in FUSED
    ]
    got: list[list[list[int]]] = [[[], []] for _ in FUSED]
    while any(streams):
        for way, stream in enumerate(streams):
            event = next(stream, None) if stream else None
            if event is None:
                streams[way] = None
            else:
                got[way][event.index] += event.tokens
    assert got == want
