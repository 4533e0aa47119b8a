"""Checkpoints of Nemotron-Labs-Diffusion: a small model of that container says the same tokens and keeps the same
drafts; what it cannot say is refused by name.

The replay is `replay.py`, in plain torch; the export reads itself back by another one, of transformers' parts.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from artifact_folders import contents
from commands import done, refused, run
from replay import Replay
from safetensors.torch import load_file
from saved import save_artifact, save_tokenizer
from tiny_conversion import LETTERS
from tiny_conversion import run as convert
from tiny_models import VOCABULARY, build
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from benchmarks.cpu.subjects import write_artifact
from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.artifact import folder as artifacts
from retrofit.artifact.engines import WANTED
from retrofit.errors import GateError, UnsupportedModelError, UsageError
from retrofit.exporting import nemotron
from retrofit.exporting.export import export
from retrofit.hub import file_fingerprint
from retrofit.recipes.schema import by_key, load_recipe
from retrofit.runtime.engine import Engine

BLOCK = DraftLayout(4, shift=0, seed_row="draft")
ALONE = {"rank": 4, "alpha": 16.0, "targets": ["o"], "markov_rank": 0, "confidence": False}
PROMPTS = [[5, 9, 2, 33, 12, 1, 60, 3], [4, 5], *([n] * 5 for n in range(6))]
NEW = 40
MASK = 7


class Exported(Replay):
    """The two forwards of that program over an exported folder, whose names are the container's."""

    def __init__(self, folder):
        super().__init__(folder, folder / "linear_spec_lora", trunk="encoder")
        renamed = {name.replace("encoder.", "model."): tensor for name, tensor in self.weights.items()}
        self.weights = {name.replace("diffusion_head.", "lm_head."): tensor for name, tensor in renamed.items()}


@pytest.fixture
def fit(base, tmp_path):
    return save_artifact(tmp_path / "fit", base, BLOCK, ALONE)


def decoded(artifact, base=None):
    with Engine.load(artifact, "cpu", "float32", base=base) as engine:
        found = engine.generate(PROMPTS, strategy="two_forward", max_new_tokens=NEW, ignore_eos=True)
    return [(one.tokens, one.stats.accepted) for one in found]


def replayed(folder, mask=None):
    told, replay = json.loads((folder / "config.json").read_text()), Exported(folder)
    mask = told["mask_token_id"] if mask is None else mask
    return [replay.nemotron(prompt, NEW, told["block_size"], mask) for prompt in PROMPTS]


def test_the_program_it_is_for_says_what_we_say(fit, base, tmp_path):
    folder = tmp_path / "out"
    told = run("export", fit, "--format", "nemotron", "-o", folder, "--mask-token", MASK)
    assert told.exit_code == 0, told.stderr
    assert told.stdout.strip() == str(folder) and "a model of that container reads it" in told.stderr
    kept = 0
    for (tokens, accepted), (theirs, theirs_accepted) in zip(decoded(fit, str(base)), replayed(folder), strict=True):
        assert theirs == tokens
        assert theirs_accepted[:-2] == accepted[: len(theirs_accepted) - 2]  # the last are cut to the budget
        kept += sum(theirs_accepted[:-2])
    others = [accepted for _, accepted in replayed(folder, MASK + 1)]
    assert kept > 5 and others != [accepted for _, accepted in replayed(folder)]


def test_what_is_in_the_folder(fit, base, tmp_path):
    folder = export(fit, "nemotron", tmp_path / "out", mask_token=MASK).folder
    assert set(contents(folder)) >= {
        *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("linear_spec_lora/adapter_config.json", "linear_spec_lora/adapter_model.safetensors"),
    }
    stored, found = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    own = {name.replace("encoder.", "model.").replace("diffusion_head.", "lm_head.") for name in found}
    assert own == stored.keys()
    assert torch.equal(found["diffusion_head.weight"], stored["lm_head.weight"])
    differing = (found["encoder.embed_tokens.weight"] != stored["model.embed_tokens.weight"]).any(1).nonzero().flatten()
    assert differing.tolist() == [MASK]
    told = json.loads((folder / "config.json").read_text())
    assert told["architectures"] == ["NemotronLabsDiffusionModel"] and told["tie_word_embeddings"] is False
    assert (told["block_size"], told["mask_token_id"], told["rope_parameters"]["llama_4_scaling_beta"]) == (4, MASK, 0)
    lora = json.loads((folder / "linear_spec_lora" / "adapter_config.json").read_text())
    assert (lora["target_modules"], lora["r"], lora["alora_invocation_tokens"], lora["task_type"]) == (
        ["o_proj"], 4, None, None,
    )  # fmt: skip
    text = (folder / "README.md").read_text()
    assert f"Token {MASK} is the mask" in text and "None of these programs has been run on it" in text


@pytest.mark.parametrize("name", ["llama_rope_llama3", "llama_rope_yarn", "llama_tied", "llama_bf16"])
def test_bases_of_other_kinds_are_read_back_too(name, tmp_path):
    base, half = tmp_path / "base", name == "llama_bf16"
    model = LlamaForCausalLM(LlamaConfig(**small(tie_word_embeddings=True))) if name == "llama_tied" else None
    model = model or build("llama" if half else name)
    (model.bfloat16() if half else model).save_pretrained(base)
    save_tokenizer(base)
    attached = attach(model.float(), BLOCK, **ALONE)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_(std=0.05)
    fingerprint = file_fingerprint(base, model.config.to_dict())
    made = write_artifact(tmp_path / "made", str(base), fingerprint, model, attached, ALONE)
    folder = export(made, "nemotron", tmp_path / "out", mask_token=MASK, dtype="float32").folder
    kept, stored = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    names = {name.replace("model.", "encoder.", 1): name for name in stored if name.startswith("model.layers")}
    assert all(
        torch.equal(kept[new], stored[old]) and kept[new].dtype == stored[old].dtype for new, old in names.items()
    )
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16 if half else torch.float32}


def test_a_model_that_was_trained_along_is_exported_with_its_drafts(tmp_path, texts):
    keys = {
        "profile": "joint", "joint__weights": "full", "joint__lr": 1e-3, "draft__shift": 0,
        "draft__seed_row": "draft", "adapter__markov_rank": 0, "adapter__confidence": False,
    }  # fmt: skip
    made = convert(tmp_path / "made", texts, **keys).folder
    beyond = export(made, "nemotron", tmp_path / "beyond").folder
    assert json.loads((beyond / "config.json").read_text())["mask_token_id"] == len(LETTERS)
    ours = decoded(made)  # a model of random weights says what no tokenizer knows
    said = {token for prompt in PROMPTS for token in prompt} | {token for tokens, _ in ours for token in tokens}
    unsaid = min(set(range(VOCABULARY)) - said)
    folder = export(made, "nemotron", tmp_path / "out", mask_token=unsaid).folder
    kept, own = load_file(folder / "model.safetensors"), load_file(made / "model" / "model.safetensors")
    assert all(
        torch.equal(kept[n.replace("model.", "encoder.", 1)], own[n]) for n in own if n.startswith("model.layers")
    )
    assert [theirs for theirs, _ in replayed(folder)] == [tokens for tokens, _ in ours]
    assert "made/model/" in (folder / "README.md").read_text()


def test_what_reads_otherwise_is_not_there_afterwards(fit, tmp_path, monkeypatch):
    right = nemotron.files

    def changed(name):
        def files(*arguments):
            made = right(*arguments)
            for file, tensors in made.items():
                if not isinstance(tensors, bytes) and name in tensors:
                    made[file] = {**tensors, name: tensors[name] * 1.01}
            return made

        return files

    for name, what in (
        ("encoder.layers.1.mlp.up_proj.weight", "rows"),
        ("base_model.model.encoder.layers.1.self_attn.o_proj.lora_B.weight", "drafts"),
    ):
        monkeypatch.setattr(nemotron, "files", changed(name))
        with pytest.raises(GateError, match=f"{what} of the container are"):
            export(fit, "nemotron", tmp_path / "out", mask_token=MASK)
        assert not (tmp_path / "out").exists()


def test_drafts_that_it_cannot_say_are_told_at_once(made, tmp_path):
    refusal = refused(run("export", made, "--format", "nemotron", "-o", tmp_path / "out"), 2)
    assert "draft.shift is 1, not 0; draft.seed_row is base, not draft; adapter.markov_rank is 2, not 0" in refusal
    assert "--recipe nemotron" in refusal and "draft.seed_row=draft adapter.markov_rank=0" in refusal
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (lambda: build("qwen3"), "it is a Qwen3ForCausalLM"),
        (lambda: build("bloom"), "it is a BloomForCausalLM"),
        (lambda: LlamaForCausalLM(LlamaConfig(**small(attention_bias=True))), "attention_bias is True"),
        (lambda: MistralForCausalLM(MistralConfig(**small(sliding_window=8))), "sliding_window is 8"),
        (lambda: LlamaForCausalLM(LlamaConfig(**small(rope_parameters=DYNAMIC))), "its RoPE is dynamic"),
    ],
    ids=["qk norms", "no RoPE", "biases", "windows", "dynamic"],
)
def test_bases_that_it_cannot_say_are_told_by_name(model, problem, fit, tmp_path):
    base = SimpleNamespace(model=model(), name="mine", precision=None)
    with pytest.raises(UnsupportedModelError, match=f"of its base mine, .*{problem}"):
        nemotron._refuse_base(artifacts.read(fit), base, tmp_path)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def small(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return {"vocab_size": 64, "num_key_value_heads": 2, **sizes, **changes}


@pytest.mark.parametrize(
    ("token", "problem"),
    [(64, "mask token 64 is none of the 64"), ("<mask>", "'<mask>' is no token of"), (None, "every token of")],
)
def test_a_mask_token_is_one_that_no_text_has(fit, tmp_path, token, problem, monkeypatch):
    if token is None:
        monkeypatch.setattr(nemotron, "_mask", full_vocabulary(nemotron._mask))
    with pytest.raises(UsageError, match=problem) as caught:
        export(fit, "nemotron", tmp_path / "out", mask_token=token)
    assert "--mask-token" in caught.value.hint


def full_vocabulary(right):
    def mask(base, token):
        tokenizer = SimpleNamespace(get_vocab=lambda: {str(n): n for n in range(VOCABULARY)})
        return right(SimpleNamespace(model=base.model, name=base.name, tokenizer=tokenizer), token)

    return mask


def test_other_formats_have_no_mask_token(made, tmp_path):
    with pytest.raises(UsageError, match="the format peft has none"):
        export(made, "peft", tmp_path / "out", mask_token=3)


def test_the_recipe_qualifies():
    keys = by_key(load_recipe("nemotron"))
    assert {key: keys[key] for key in WANTED["nemotron"]} == WANTED["nemotron"]
    assert "nemotron" in done("export", "--help")
