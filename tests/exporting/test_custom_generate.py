"""Decoding by transformers alone: the tokens, and the forwards it takes, are those of our `two_forward`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saved import ADAPTER, save_artifact
from tiny_models import CONTEXT, build
from transformers import AutoModelForCausalLM

import retrofit
from benchmarks.cpu.subjects import write_artifact
from retrofit.adapters.attach import attach
from retrofit.adapters.heads import Heads
from retrofit.adapters.layout import DraftLayout
from retrofit.exporting import custom_generate
from retrofit.exporting.custom_generate import Drafter, bits, generate, gumbel
from retrofit.hub import live_fingerprint
from retrofit.runtime.engine import Engine
from retrofit.runtime.rules.sampling import gumbel_noise, hash_bits_plain

LAYOUTS = [
    DraftLayout(4),
    DraftLayout(4, input="noise", attention="causal"),
    DraftLayout(4, attention="causal", seed_row="draft"),
    DraftLayout(4, input="noise", shift=0, seed_row="draft"),
]
WAYS = [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.3, "seed": 2**40 + 3, "top_k": 7, "top_p": 0.9}]
PROMPTS = [[5, 9, 2, 33, 7, 1, 60, 12], [4, 5]]
LONGEST = max(map(len, PROMPTS))
NEW = 40
ALL_MODELS = {"rank": 2, "alpha": 2.0, "targets": ["q", "k", "v", "o"], "markov_rank": 2, "confidence": False}


@pytest.fixture
def model(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


def padded():
    rows = [[0] * (LONGEST - len(prompt)) + prompt for prompt in PROMPTS]
    mask = [[0] * (LONGEST - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def counted(model, run):
    """What it returns, and how many forwards of the model it took."""
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        return run(), len(forwards)
    finally:
        hook.remove()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: "-".join(map(str, one.to_dict().values())))
def test_tokens_and_forwards_are_ours(layout, base, model, tmp_path):
    mask = layout.input == "mask"
    heads = ADAPTER | {} if mask else ADAPTER | {"markov_rank": 0, "confidence": False}
    folder = save_artifact(tmp_path / "made", base, layout, heads)
    accepted = 0
    for options in WAYS:
        with Engine.from_model(model, adapter=folder) as engine:
            ours = engine.generate(PROMPTS, strategy="two_forward", max_new_tokens=NEW, **options)
        sampling = {"do_sample": True, "top_k": 0, **options} if options else {}
        found, forwards = counted(
            model,
            lambda: generate(model, **padded(), adapter=str(folder), max_new_tokens=NEW, **sampling),  # noqa: B023
        )
        assert found[:, LONGEST:].tolist() == [result.tokens for result in ours]
        assert forwards == sum(sum(result.stats.forwards.values()) for result in ours)
        accepted += sum(sum(result.stats.accepted) for result in ours)
    assert accepted > 5


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "phi3_window", "deepseek_v3_no_q_lora"])
def test_other_models_say_what_they_say(name, tmp_path):
    model = build(name)
    attached = attach(model, DraftLayout(4), **ALL_MODELS)
    torch.nn.init.normal_(attached.heads.markov_w2)
    folder = write_artifact(tmp_path / "made", name, live_fingerprint(model), model, attached, ALL_MODELS)
    attached.detach()
    with Engine.from_model(model, adapter=folder) as engine:
        [ours] = engine.generate(PROMPTS[:1], strategy="two_forward", max_new_tokens=NEW)
    ids = torch.tensor(PROMPTS[:1])
    found, forwards = counted(model, lambda: generate(model, ids, adapter=str(folder), max_new_tokens=NEW))
    assert found[0, LONGEST:].tolist() == ours.tokens
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    assert window or forwards == sum(ours.stats.forwards.values())


def test_nothing_stands_beyond_the_context(made, model):
    """Models with a table of positions have no row there."""
    at = []

    def positions(module, inputs, given):
        at.append(int(given["position_ids"].max()))

    hook = model.register_forward_pre_hook(positions, with_kwargs=True)
    found = generate(model, torch.tensor(PROMPTS[:1]), adapter=str(made), max_new_tokens=CONTEXT - LONGEST)
    hook.remove()
    plain = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=CONTEXT - LONGEST)
    assert torch.equal(found, plain) and max(at) < CONTEXT


def test_the_noise_is_ours():
    for seed, index in ((0, 0), (7, 3), (2**40 + 3, 2**31 + 5)):
        assert [bits(seed, index, token) for token in range(9)] == [hash_bits_plain(seed, index, t) for t in range(9)]
        ours = gumbel_noise(torch.tensor([seed]), torch.tensor([index]), 300)[0]
        assert torch.equal(gumbel(seed, index, 300, torch.device("cpu")), ours)


def test_the_markov_head_is_ours():
    torch.manual_seed(0)
    heads = Heads(hidden=8, vocab=16, drafts=3, markov_rank=4, confidence=False)
    torch.nn.init.normal_(heads.markov_w2)
    logits = torch.randn(16)
    ours = heads.draft_logits(logits[None], torch.tensor([5]))[0]
    torch.testing.assert_close(Drafter({}, dict(heads.state_dict())).biased(logits, 5), ours)
    assert not torch.allclose(ours, logits)


def test_the_models_own_settings_and_criteria_are_followed(made, model):
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.4, "min_new_tokens": 6}
    alone = [torch.tensor([prompt]) for prompt in PROMPTS]
    eos = model.generate(alone[0], **options)[0, LONGEST + 7].item()
    options |= {"eos_token_id": eos, "pad_token_id": 1}
    plain = [
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist() for ids in alone
    ]
    found = generate(model, **padded(), adapter=str(made), **options)[:, LONGEST:].tolist()
    longest = max(map(len, plain))
    assert longest > 6 and eos in plain[0] and len(plain[0]) != len(plain[1])
    assert found == [tokens + [1] * (longest - len(tokens)) for tokens in plain]


def test_the_model_is_afterwards_as_it_was(made, model):
    ids = torch.tensor(PROMPTS[:1])
    before = model(ids).logits
    for more, error in (({}, None), ({"num_beams": 2}, ValueError)):
        with pytest.raises(error) if error else torch.no_grad():
            generate(model, ids, adapter=str(made), max_new_tokens=4, **more)
        assert torch.equal(model(ids).logits, before)
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"adapter": None}, "no folder of a retrofit artifact"),
        ({"adapter": "./nowhere"}, "no folder of a retrofit artifact"),
        ({"num_beams": 2}, "no beams"),
        ({"do_sample": True, "num_return_sequences": 2}, "one output a prompt"),
        ({"input_ids": None}, "reads token ids"),
        ({"return_dict_in_generate": True}, "token ids alone"),
        ({"streamer": object()}, "streamer does not go with"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_it_cannot_do_is_refused(made, model, more, problem):
    with pytest.raises(ValueError, match=problem):
        generate(model, **{**padded(), "adapter": str(made), "max_new_tokens": 4, **more})


def test_keys_that_turn_by_the_length_of_the_text_are_refused(made):
    with pytest.raises(ValueError, match="rope_type longrope"):
        generate(build("phi3_longrope"), torch.tensor(PROMPTS[:1]), adapter=str(made), max_new_tokens=4)


def test_beyond_a_sliding_window_nothing_is_drafted(base, made, model, tmp_path):
    """A draft forward says itself what rows see, and says nothing of a window."""
    windowed = build("mistral_window")
    shutil.copytree(made, tmp_path / "made")
    plain = windowed.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=NEW)
    found = generate(windowed, torch.tensor(PROMPTS[:1]), adapter=str(tmp_path / "made"), max_new_tokens=NEW)
    assert torch.equal(found, plain)


PROGRAM = """
import json, sys
sys.modules["retrofit"] = None
import torch
from transformers import AutoModelForCausalLM

base, folder, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(base)
print(model.generate(
    torch.tensor([ids]), custom_generate=folder, trust_remote_code=True, adapter=folder, max_new_tokens=20
)[0].tolist())
"""


def test_transformers_runs_it_where_retrofit_is_not(base, made, model, tmp_path):
    folder = tmp_path / "exported"
    shutil.copytree(made, folder)
    (folder / "custom_generate").mkdir()
    shutil.copy(custom_generate.__file__, folder / "custom_generate" / "generate.py")
    root = str(Path(retrofit.__file__).parent.parent)
    path = os.pathsep.join(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p != root)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, base, folder, json.dumps(PROMPTS[0])],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": path},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=20)[0].tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == plain
