"""An engine is opened, used and closed: what a closed one refuses, and that the model is as it was in all respects."""

import copy
import threading
from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise
from fused_models import pair, small
from tiny_models import build
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import SequenceRows
from retrofit.errors import UsageError
from retrofit.runtime.backends.hf import answers
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.engine import Engine

LAYOUT = DraftLayout(block=3)
PROMPTS = random_prompts((9, 5))
OPTIONS: dict[str, Any] = {"strategy": "fused", "tree": 4, "max_new_tokens": 8, "ignore_eos": True}


def opened(model: PreTrainedModel) -> Engine:
    return randomise(Engine.from_model(model, layout=LAYOUT))


def decode(engine: Engine) -> list[list[int]]:
    return [result.tokens for result in engine.generate(PROMPTS, **OPTIONS)]


def own_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPTS[0]]), use_cache=False).logits


def everything(model: PreTrainedModel) -> dict[str, Any]:
    """All that an engine could leave changed."""
    config = model.config
    return {
        "modules": {n: (id(m), type(m), set(vars(m)), m.training) for n, m in model.named_modules()},
        "forwards": {n: m.__dict__.get("forward") for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p._version, p.requires_grad) for n, p in model.named_parameters()},
        "config": copy.deepcopy(vars(config)),
        "answers": {name: getattr(type(config), name) for name in answers.ANSWERS},
        "class": dict(type(config).__dict__),
    }


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "phi3_longrope"])
def test_a_closed_engine_leaves_the_model_as_it_was(name: str) -> None:
    model = build(name)
    logits = own_logits(model)
    model.train()
    model.get_decoder().layers[0].eval()  # a user may train some parts only
    model.lm_head.requires_grad_(False)
    model.get_decoder().layers[1].register_forward_hook(lambda *_: None)
    before = everything(model)
    with opened(model) as engine:
        decode(engine)
        half = engine.stream(PROMPTS, **OPTIONS)
        next(half)
        assert everything(model) != before
    assert everything(model) == before
    assert torch.equal(own_logits(model.eval()), logits)


def test_closing_one_of_two_models_leaves_the_other_open() -> None:
    """They share the class of their configurations."""
    before = dict(answers._OPEN)
    first, second = opened(build("llama")), opened(build("llama", seed=1))
    want = decode(second)
    first.close()
    assert decode(second) == want
    second.close()
    assert before == answers._OPEN


def test_the_class_of_a_configuration_is_given_back() -> None:
    class Plain(LlamaConfig):
        pass

    class Own(LlamaConfig):
        @property
        def _attn_implementation(self) -> str:
            return "mine"

        @_attn_implementation.setter
        def _attn_implementation(self, value: str) -> None:
            pass

    for kind, said in ((Plain, "sdpa"), (Own, "mine")):
        before = dict(vars(kind))
        config = kind(attn_implementation="sdpa")
        undone = [answers.by_thread(config), answers.by_thread(kind())]
        with answers.answering(config, "ours", "experts", None):
            assert (config._attn_implementation, config._experts_implementation) == ("ours", "experts")
            assert kind(attn_implementation="sdpa")._attn_implementation == said
        for undo in undone:
            assert config._attn_implementation == said
            assert config._experts_implementation is None
            undo()
        assert dict(vars(kind)) == before


def test_a_closed_engine_refuses_and_says_why() -> None:
    model = build("llama")
    engine = opened(model)
    cache = KVCache(1, 16)
    with engine as same:
        assert same is engine
    engine.close()
    engine.close()
    plan = engine.backend.row_plan([SequenceRows(0, 0, [1, 2])])
    for use in (
        lambda: engine.generate(PROMPTS),
        lambda: engine.stream(PROMPTS),
        lambda: engine.attached,
        lambda: engine.backend.forward(plan, cache),
    ):
        with pytest.raises(UsageError, match="this engine is closed") as refused:
            use()
        assert "Engine.load or Engine.from_model" in str(refused.value.hint)
    assert own_logits(model).isfinite().all()


def test_a_fused_engine_closes_too() -> None:
    fused, hf = pair(small("llama", num_hidden_layers=1))
    stream = fused.stream([[1, 2]], "ar", max_new_tokens=4, ignore_eos=True)
    fused.close()
    fused.close()
    with pytest.raises(UsageError, match="this engine is closed"):
        next(stream)
    with pytest.raises(UsageError, match="this engine is closed"):
        fused.generate([[1, 2]])
    assert hf.generate([[1, 2]], "ar", max_new_tokens=1)


def test_a_stream_whose_engine_is_closed_raises_when_resumed() -> None:
    engine = opened(build("llama"))
    streams = [engine.stream(PROMPTS, **OPTIONS) for _ in range(2)]
    next(streams[0])
    engine.close()
    for stream in streams:
        with pytest.raises(UsageError, match="this engine is closed"):
            next(stream)
        assert next(stream, None) is None


def test_a_second_engine_on_a_model_is_refused_until_the_first_is_closed() -> None:
    model = build("llama")
    engine = opened(model)
    want = decode(engine)
    for again in (model, copy.deepcopy(model)):
        with pytest.raises(UsageError, match="in use by another engine") as refused:
            Engine.from_model(again, layout=LAYOUT)
        assert "close that one first" in str(refused.value.hint)
    assert decode(engine) == want
    engine.close()
    assert decode(opened(model)) == want


def test_of_two_threads_that_open_a_model_at_once_one_gets_it() -> None:
    model = build("llama")
    found: list[Any] = []
    ready = threading.Barrier(2)

    def attempt() -> None:
        ready.wait()
        try:
            found.append(opened(model))
        except UsageError as error:
            found.append(error)

    both = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    (engine,) = [one for one in found if isinstance(one, Engine)]
    (refused,) = [one for one in found if isinstance(one, UsageError)]
    assert "in use by another engine" in str(refused)
    assert decode(engine)


def test_close_waits_for_the_step_that_runs_and_ends_the_call() -> None:
    model = build("llama")
    before = own_logits(model)
    engine = opened(model)
    inside, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    ended: list[Any] = []

    def halt(*_: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    handle = model.get_decoder().layers[1].register_forward_pre_hook(halt)

    def run() -> None:
        try:
            ended.append(decode(engine))
        except BaseException as error:
            ended.append(error)

    def close() -> None:
        engine.close()
        closed.set()

    running, closing = threading.Thread(target=run), threading.Thread(target=close)
    running.start()
    assert inside.wait(60)
    closing.start()
    assert not closed.wait(0.2), "the adapter was taken off under a running forward"
    assert engine.backend.turns.closed
    go_on.set()
    running.join()
    closing.join()
    handle.remove()
    assert closed.is_set()
    assert isinstance(ended[0], UsageError) and "this engine is closed" in str(ended[0])
    assert torch.equal(own_logits(model), before)


def test_close_from_inside_a_step_is_refused() -> None:
    model = build("llama")
    engine = opened(model)
    want = decode(engine)
    handle = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: engine.close())
    with pytest.raises(UsageError, match="by a step of this very engine"):
        decode(engine)
    handle.remove()
    assert decode(engine) == want
    engine.close()


def test_an_interrupted_forward_leaves_its_thread_as_it_was() -> None:
    model = build("qwen3_moe")
    before, engine = own_logits(model), opened(model)
    implementation = (model.config._attn_implementation, model.config._experts_implementation)

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_decoder().layers[1].register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        decode(engine)
    handle.remove()
    assert engine.backend.gate.base_rows is None
    assert (model.config._attn_implementation, model.config._experts_implementation) == implementation
    assert torch.equal(own_logits(model), before)


def test_a_model_put_into_training_mode_is_refused() -> None:
    model = build("phi3")
    engine = opened(model)
    want = decode(engine)
    model.train()
    with pytest.raises(UsageError, match="put into training mode"):
        decode(engine)
    model.eval()
    assert decode(engine) == want


def test_a_model_with_compiled_parts_is_refused() -> None:
    """Compiled code remembers the gate that it was recorded with."""
    for compiled in ("layer", "method"):
        model = build("llama")
        engine = opened(model)
        layers = model.get_decoder().layers
        if compiled == "layer":
            layers[1] = torch.compile(layers[1], backend="eager")
        else:
            layers[0].mlp.compile(backend="eager")
        with pytest.raises(UsageError, match=r"went through torch\.compile"):
            decode(engine)
    model = build("llama")
    before = everything(model)
    model.get_decoder().layers[0].mlp.compile(backend="eager")
    with pytest.raises(UsageError, match=r"went through torch\.compile"):
        Engine.from_model(model)
    assert everything(model)["modules"].keys() == before["modules"].keys()
