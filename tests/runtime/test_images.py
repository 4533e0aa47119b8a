"""Prompts with images: what `generate` of the model makes of its processor's output is what every mode makes of it."""

from dataclasses import replace

import pytest
import tiny_vision
import torch
from decoding import Oracle, randomise
from tiny_models import build

from retrofit.adapters.given import Given, seen_until
from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UnsupportedModelError, UsageError
from retrofit.runtime.backends.hf.given import reading
from retrofit.runtime.engine import Engine
from retrofit.runtime.prefixes.pieces import Pieces

COUNT = 16
TEXTS = ["ab@cd, what is it?", "a? @ and @."]
SIZES = [(32, 24), (16, 16), (24, 40)]
CHAIN, TREE = ({"strategy": "fused", "tree": nodes} for nodes in (0, 12))
WAYS = ({"mode": "ar"}, {"strategy": "two_forward"}, CHAIN, TREE)


def engine_of(name, **options):
    return randomise(Engine.from_model(tiny_vision.build(name, **options), layout=DraftLayout(block=4)))


def own(name, inputs, count=COUNT, **options):
    """New tokens of the model's own greedy `generate`."""
    found = tiny_vision.build(name, **options).generate(**inputs, max_new_tokens=count, do_sample=False)
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def tokens_of(engine, inputs, **options):
    return [r.tokens for r in engine.generate(inputs, **{"max_new_tokens": COUNT, "ignore_eos": True, **options})]


@pytest.mark.parametrize("name", tiny_vision.CONFIGS)
def test_every_mode_is_generate_with_the_images_in_the_prompt(name, monkeypatch):
    inputs = tiny_vision.inputs(name, TEXTS, SIZES)
    want = own(name, inputs)
    assert len({token for row in want for token in row}) > 5
    with engine_of(name) as engine:
        for way in WAYS:
            assert tokens_of(engine, inputs, **way) == want, way
        Oracle(dict(enumerate(want))).plant(monkeypatch)
        for way in WAYS[1:]:
            assert tokens_of(engine, inputs, **way) == want, way


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_sampled_is_ar_at_equal_seed(name):
    inputs = tiny_vision.inputs(name, TEXTS, SIZES)
    with engine_of(name) as engine:
        sampled = {"temperature": 1.0, "seed": 3, "n": 2}
        want = tokens_of(engine, inputs, mode="ar", **sampled)
        assert tokens_of(engine, inputs, strategy="fused", **sampled) == want
        assert tokens_of(engine, inputs, strategy="two_forward", batch_size=1, **sampled) == want


def test_outputs_of_one_processor_come_together_alone_and_beside_text():
    both = tiny_vision.inputs("qwen3_vl", TEXTS, SIZES)
    alone = [tiny_vision.inputs("qwen3_vl", TEXTS[:1], SIZES[:1]), [3, 1, 4, 1, 5], both]
    want = own("qwen3_vl", both)
    with engine_of("qwen3_vl") as engine:
        first, text, *others = tokens_of(engine, alone)
        assert [first, *others] == [want[0], *want]
        assert text == tokens_of(engine, [[3, 1, 4, 1, 5]], mode="ar")[0]


def test_a_prompt_in_pieces_splits_no_image():
    inputs = tiny_vision.inputs("gemma3", TEXTS, SIZES, image_tokens=16)
    want = own("gemma3", inputs, image_tokens=16)
    with engine_of("gemma3", image_tokens=16) as engine:
        given = engine.backend.read_prompts(inputs)[1][1]
        starts = [t for t, limit in enumerate(given.limits) if limit == t + 16]
        assert len(starts) == 2
        assert given.whole(starts[0], 15) == 0
        assert given.whole(starts[0] - 3, 10) == 3
        for room in (16, 21, 40):
            engine.backend.prefill_rows = room
            assert tokens_of(engine, inputs) == want
        engine.backend.prefill_rows = 15
        with pytest.raises(UsageError, match="takes 16 positions that see each other; 15 fit"):
            engine.generate(inputs)


def test_nothing_is_kept_for_another_image():
    name = "qwen3_vl"
    texts = ["what is it, and where is it? @, abc"]
    prompts = [tiny_vision.inputs(name, texts, [(16, 16)]) for _ in range(2)]
    pixels = prompts[1]["pixel_values"]
    pixels += torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    want = [own(name, one)[0] for one in prompts]
    assert want[0] != want[1]
    with engine_of(name) as engine:
        engine.prefixes = Pieces(None, 4)
        assert tokens_of(engine, prompts) == want
        again = engine.generate(prompts, max_new_tokens=COUNT, ignore_eos=True)
        assert [r.tokens for r in again] == want
        assert [r.stats.reused for r in again] == [0, 0]
        text = [[5, 6, 7, 8, 9, 10, 11]]
        assert [engine.generate(text, max_new_tokens=4)[0].stats.reused for _ in range(2)] == [0, 4]


def test_the_first_prompt_with_images_is_decoded_both_ways(monkeypatch):
    inputs = tiny_vision.inputs("qwen3_vl", TEXTS, SIZES)
    made = reading._prompt

    def shifted(*given):
        tokens, found = made(*given)
        return tokens, replace(found, shift=found.shift + 1)

    monkeypatch.setattr(reading, "_prompt", shifted)
    with (
        engine_of("qwen3_vl") as engine,
        pytest.raises(UnsupportedModelError, match="other logits for a prompt with images"),
    ):
        engine.generate(inputs)


def test_a_mask_that_rows_cannot_say_is_refused():
    there = torch.ones(5, dtype=torch.bool)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    with engine_of("gemma3") as engine:
        assert reading._limits(engine.backend, causal[None, None], 0, there) is None
        image = causal.clone()
        image[1:4, 1:4] = True
        assert reading._limits(engine.backend, image[None, None], 0, there) == [1, 4, 4, 4, 5]
        image[4, 0] = False
        with pytest.raises(UnsupportedModelError, match="in a way of its own"):
            reading._limits(engine.backend, {"full_attention": image[None, None]}, 0, there)


def test_wrong_inputs_are_one_error():
    inputs = tiny_vision.inputs("qwen3_vl", TEXTS, SIZES)
    with engine_of("qwen3_vl") as engine:
        few = {**inputs, "pixel_values": inputs["pixel_values"][:4], "image_grid_thw": inputs["image_grid_thw"][:1]}
        with pytest.raises(UsageError, match="Qwen3VLForConditionalGeneration refuses these prompts"):
            engine.generate(few)
        with pytest.raises(UsageError, match="input_ids as a tensor"):
            engine.generate({**inputs, "input_ids": inputs["input_ids"].tolist()})
    with Engine.from_model(build("llama")) as engine, pytest.raises(UsageError, match="refuses these prompts"):
        engine.generate(dict(inputs))


def test_rows_of_an_image_see_all_of_it_and_others_those_before():
    given = Given(torch.zeros(6, 2), limits=[1, 4, 4, 4, 5, 6])
    assert seen_until(given, range(2, 8)) == [4, 4, 5, 6, 7, 8]
    assert [given.whole(start, 3) for start in range(6)] == [1, 3, 3, 3, 3, 3]
