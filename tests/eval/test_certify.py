"""The certificate: ok where it should be, and every planted fault is caught by the check meant for it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retrofit.adapters import gated_lora
from retrofit.adapters.layout import DraftLayout
from retrofit.artifact import folder as artifacts
from retrofit.errors import ArtifactError, UsageError
from retrofit.eval import audit, certify, differences, distribution, exactness, replay, weights
from retrofit.eval.subject import Subject
from retrofit.hub import load_base
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes
from retrofit.runtime.host import steps as host_steps
from retrofit.runtime.plan import Cycle, StepPlan
from retrofit.runtime.request import Request
from retrofit.runtime.rules import sampling

LIMIT = 16
PROMPTS = [[5, 9, 2, 7, 7, 1], [3], [8, 8, 4, 200, 17, 30, 2, 2, 11], [64, 65, 66, 67]]
LAYOUT = DraftLayout(block=4)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A tiny Llama over bytes.  Its distributions are rather flat, so coupled drafts are often accepted."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.12, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def make_engine(base_folder, layout=LAYOUT, dtype="float32"):
    base = load_base(str(base_folder), dtype=dtype)
    engine = Engine.from_model(base.model, base.tokenizer, layout=layout)
    engine.base = base
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in engine.attached.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=drawn) * 0.02)
    return engine


@pytest.fixture
def subject(base_folder):
    return Subject(make_engine(base_folder), base_folder)


def write_artifact(engine, folder, base_folder, **extra):
    heads = engine.attached.heads
    return artifacts.write(
        folder,
        adapter_config=engine.attached.adapter_config(),
        adapter_state={**engine.attached.adapter_state(), **extra},
        heads=engine.attached.heads_state(),
        config={
            "format": 1,
            "retrofit": "0",
            "base": {
                "model": str(base_folder),
                "revision": None,
                "fingerprint": engine.base.fingerprint,
                "architecture": "LlamaForCausalLM",
            },
            "profile": "frozen",
            "draft": LAYOUT.to_dict(),
            "adapter": {
                "rank": 8,
                "alpha": 8.0,
                "targets": ["q", "k", "v", "o", "gate", "up", "down"],
                "modules": [],
                "markov_rank": heads.markov_w1.shape[1],
                "confidence": True,
            },
            "parameters": {"adapter": 1, "heads": 1, "base": 1},
            "acceptance": {},
            "training": {},
        },
        recipe_yaml="data:\n  source: elsewhere\n",
        card="card",
    )


@pytest.fixture
def small(monkeypatch):
    """`quick` in a few seconds."""
    monkeypatch.setitem(certify.LEVELS, "quick", certify.Size(3, 12, 400))


def statuses(certificate):
    return {check.name: check.status for check in certificate.checks}


def test_artifact_is_certified_and_the_certificate_goes_into_it(base_folder, tmp_path, small):
    folder = write_artifact(make_engine(base_folder), tmp_path / "made", base_folder)
    certificate = certify.certify(folder, dtype="float32", progress=False)
    assert certificate.ok, certificate.to_dict()
    assert certificate.save(folder) == folder / "certificate.json"
    artifacts.check(folder)
    written = json.loads((folder / "certificate.json").read_text())
    assert written["ok"] and written["dtype"] == "float32" and written["level"] == "quick"
    assert written["base"]["model"] == str(base_folder)
    assert len(written["manifest_sha256"]) == 64
    assert written["hardware"]["cpu"]
    assert {check["status"] for check in written["checks"]} == {"passed"}
    sha = next(c for c in written["checks"] if c["name"] == "base-weights")["details"]["sha256"]
    assert sha == certificate.check("base-weights").details["sha256"]


def test_live_engine_without_checkpoint_is_not_ok(base_folder, small):
    engine = make_engine(base_folder)
    engine.base = None
    certificate = certify.certify(engine, prompts=["def f():", [1, 2, 3]], progress=False)
    assert not certificate.ok
    found = statuses(certificate)
    assert found.pop("base-weights") == "skipped"
    assert set(found.values()) == {"passed"}
    with pytest.raises(certify.GateError, match="base-weights skipped"):
        certificate.require()


def test_too_little_memory_skips(subject, monkeypatch):
    monkeypatch.setattr("retrofit.eval.subject.free_memory", lambda device: 1000)
    check = certify._run("greedy-fp32", lambda: exactness.greedy(subject, PROMPTS, 4))
    assert check.status == "skipped"
    assert "float32" in check.detail


def test_bad_arguments(base_folder, tmp_path):
    with pytest.raises(UsageError, match="level"):
        certify.certify("x", "thorough")
    with pytest.raises(UsageError, match="no such artifact"):
        certify.certify(tmp_path / "none", progress=False)
    folder = write_artifact(make_engine(base_folder), tmp_path / "made", base_folder)
    (folder / "heads.safetensors").write_bytes(b"0" * 20)
    with pytest.raises(ArtifactError):
        certify.certify(folder, progress=False)


# The checks' own parts


def test_the_auditors_noise_is_the_engines():
    for seed, index in ((0, 0), (17, 3), (2**40 + 5, 99)):
        own = sampling.gumbel_noise(torch.tensor([seed]), torch.tensor([index]), 300)[0]
        assert torch.equal(replay.gumbel(seed, index, 300), own)


def test_chi_square_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    chance = {(i,): p for i, p in enumerate((0.5, 0.3, 0.15, 0.05))}
    counts = distribution.Counter({(0,): 260, (1,): 140, (2,): 80, (3,): 20})
    statistic, freedom, p_value = distribution.chi_square(counts, chance, 500)
    want = stats.chisquare([260, 140, 80, 20], [250, 150, 75, 25])
    assert freedom == 3
    assert (statistic, p_value) == pytest.approx((want.statistic, want.pvalue))


def test_chi_square_of_the_impossible():
    counts = distribution.Counter({(0,): 99, (1,): 1})
    assert distribution.chi_square(counts, {(0,): 1.0, (1,): 0.0}, 100)[2] == 0


def test_holm_steps_down():
    assert distribution.holm([0.01, 0.03, 0.04], 0.05) == [0]
    assert distribution.holm([0.01, 0.02, 0.03], 0.05) == [0, 1, 2]
    assert distribution.holm([0.5, 0.0], 0.05) == [1]


@pytest.mark.parametrize(("ulp", "name"), [(0, "match"), (2, "tie"), (2.1, "near"), (8, "near"), (8.1, "bug")])
def test_classes(ulp, name):
    assert differences.classify(ulp) == name


def test_ulp():
    assert differences.ulp(20.0, torch.bfloat16) == 0.125
    assert differences.ulp(-16.0 * -1, torch.float16) == 2.0**-6


def test_a_wrong_text_is_a_bug_and_a_tie_is_not(base_folder):
    model = load_base(str(base_folder), dtype="float32").model
    prompt = PROMPTS[0]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    best, worst = int(logits.argmax()), int(logits.argmin())
    found = differences.class_differences(lambda: model, [prompt], [[best]], [[worst]], torch.float32)
    assert found["bug"] == 1
    assert found["first_differences"][0]["got"] == worst
    same = differences.class_differences(lambda: model, [prompt], [[best]], [[best]], torch.float32)
    assert (same["match"], same["bug"]) == (1, 0)


# Mutants


def test_nan_adapter_is_put_back(subject):
    before = [p.clone() for p in subject.run.attached.parameters()]
    assert exactness.gate(subject, PROMPTS).ok
    assert all(torch.equal(a, b) for a, b in zip(before, subject.run.attached.parameters(), strict=True))


def test_mutant_accepts_one_too_many(subject, monkeypatch):
    right = modes.accepted_length

    def mutant(drafts, targets, lengths):
        return torch.minimum(right(drafts, targets, lengths) + 1, lengths)

    monkeypatch.setattr(modes, "accepted_length", mutant)
    assert not exactness.greedy(subject, PROMPTS, LIMIT).ok
    verdict = audit.audit(subject, PROMPTS, LIMIT)
    assert not verdict.ok
    assert verdict.details["problems"] > 0


@pytest.mark.parametrize("times", [1.0, 0.0])
def test_mutant_gate_leak(subject, monkeypatch, times):
    """The adapter on all rows; and a gate that multiplies by zero, which only NaN tells from a closed one."""

    def mutant(self, x, *args, **kwargs):
        adapter = self.active_adapters[0]
        update = self.lora_B[adapter](self.lora_A[adapter](x)) * self.scaling[adapter]
        first = self.gate.base_rows
        if first is not None:
            gate = torch.ones(x.shape[-2], 1)
            gate[:first] = times
            update = update * gate
        return self.base_layer(x) + (update if first is not None else 0)

    monkeypatch.setattr(gated_lora.GatedLoraLinear, "forward", mutant)
    verdict = exactness.gate(subject, PROMPTS)
    assert not verdict.ok
    assert verdict.details["changed"] == verdict.details["base_rows"]


def test_mutant_rollback_forgotten(subject, monkeypatch):
    """Rejected rows count as committed: what follows reads stale K/V at wrong positions."""
    step = modes.speculative_step

    def mutant(run, requests, plans):
        before = [r.committed for r in requests]
        step(run, requests, plans)
        for request, was, plan in zip(requests, before, plans, strict=True):
            if request.committed > was:
                request.committed = was + 1 + plan.verify

    monkeypatch.setattr(host_steps, "speculative_step", mutant)
    verdict = audit.audit(subject, PROMPTS, LIMIT)
    assert not verdict.ok
    assert any("(rows)" in problem for problem in verdict.details["first_problems"])


def test_mutant_stale_cache_slot(subject, monkeypatch):
    """A slot once written keeps its K/V: the rejected draft's stands where the accepted token's belongs."""
    right = KVCache.write

    def mutant(self, layer, slots, columns, key, value):
        if layer in self.layers:
            keys, values = self.layers[layer]
            filled = (keys[slots, :, columns] != 0).flatten(1).any(1)[:, None, None]
            key = torch.where(filled, keys[slots, :, columns], key)
            value = torch.where(filled, values[slots, :, columns], value)
        right(self, layer, slots, columns, key, value)

    monkeypatch.setattr(KVCache, "write", mutant)
    assert not exactness.greedy(subject, PROMPTS, LIMIT).ok


def test_mutant_noise_key_reused(subject, monkeypatch):
    """The output index never advances: every token is still a fair draw, but three in a row are not."""
    right = sampling.gumbel_noise
    monkeypatch.setattr(sampling, "gumbel_noise", lambda seed, index, *rest: right(seed, index * 0, *rest))
    assert not distribution.distribution(400).ok
    assert not audit.audit(subject, PROMPTS, LIMIT).ok


def test_mutant_noise_key_reused_in_verify_rows(subject, monkeypatch):
    right = modes._targets

    def mutant(run, logits, owners, steps, paths=None):
        return right(run, logits, owners, [0] * len(steps), paths)

    monkeypatch.setattr(modes, "_targets", mutant)
    assert not exactness.sampled(subject, PROMPTS, LIMIT).ok


def test_mutant_wrong_temperature_on_verify_rows(subject, monkeypatch):
    right = modes._targets

    def mutant(run, logits, owners, steps, paths=None):
        hot = any(steps) and run.params.temperature > 0
        params = replace(run.params, temperature=1.0) if hot else run.params
        return right(replace(run, params=params), logits, owners, steps, paths)

    monkeypatch.setattr(modes, "_targets", mutant)
    assert not exactness.sampled(subject, PROMPTS, LIMIT).ok
    assert not audit.audit(subject, PROMPTS, LIMIT).ok


def test_mutant_penalty_on_the_committed_prefix_only(monkeypatch):
    """It shows where an accepted draft changes the odds of the next token: few words, short prompts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    subject = Subject(Engine.from_model(LlamaForCausalLM(config).eval(), layout=LAYOUT), None)
    prompts = [[i] for i in range(16)]
    assert audit.audit(subject, prompts, 16).ok

    def mutant(seen, drafts):
        return seen.expand(len(drafts) + 1, -1)

    monkeypatch.setattr(modes, "path_seen", mutant)
    verdict = audit.audit(subject, prompts, 16)
    assert not verdict.ok
    assert any("(token)" in problem for problem in verdict.details["first_problems"])


def test_mutant_verify_length_looks_ahead(subject, monkeypatch):
    """Drafts are dropped unless all will be accepted: the text stays right, but acceptance is a lie."""
    right = host_steps.planned
    peek = subject.base(torch.float32)

    def mutant(cycle: Cycle, request: Request, *rest) -> StepPlan:
        plan = right(cycle, request, *rest)
        drafts = request.drafts[: plan.verify]
        if not drafts:
            return plan
        ids = torch.tensor([[*request.tokens, *drafts[:-1]]])
        targets = peek(ids).logits[0, -len(drafts) :].argmax(-1).tolist()
        return plan if targets == drafts else StepPlan(0, plan.hang[:1])

    monkeypatch.setattr(host_steps, "planned", mutant)
    assert exactness.greedy(subject, PROMPTS, LIMIT).ok
    verdict = audit.audit(subject, PROMPTS, LIMIT)
    assert not verdict.ok
    assert all("(length)" in problem for problem in verdict.details["first_problems"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mutant_one_bit_of_the_base(base_folder, dtype):
    engine = make_engine(base_folder, dtype=dtype)
    subject = Subject(engine, base_folder)
    assert certify._base_weights(subject).ok
    weight = dict(engine.attached.model.named_parameters())["model.layers.1.mlp.up_proj.base_layer.weight"].data
    bits = weight.view(torch.int32 if dtype == "float32" else torch.int16)
    bits[3, 4] ^= 1
    verdict = certify._base_weights(subject)
    assert not verdict.ok
    assert verdict.details["changed_names"] == ["model.layers.1.mlp.up_proj.weight"]


def test_tensor_missing_from_the_checkpoint_is_named(base_folder, tmp_path):
    engine = make_engine(base_folder)
    tensors = load_file(base_folder / "model.safetensors")
    tensors["model.layers.9.other"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    found = weights.compare_base(engine.attached.model, tmp_path)
    assert found["not_loaded_names"] == ["model.layers.9.other"]
    assert found["not_in_checkpoint_names"] == ["model.norm.weight"]


def test_mutant_base_tensor_in_the_artifact(base_folder, tmp_path, small):
    extra = {"base_model.model.model.norm.weight": torch.ones(32)}
    folder = write_artifact(make_engine(base_folder), tmp_path / "made", base_folder, **extra)
    certificate = certify.certify(folder, progress=False)
    assert not certificate.ok
    found = statuses(certificate)
    assert found.pop("artifact") == "failed"
    assert set(found.values()) == {"skipped"}
    assert "norm.weight" in certificate.check("artifact").detail


def test_mutant_base_tensor_beside_the_adapter(base_folder, tmp_path):
    folder = write_artifact(make_engine(base_folder), tmp_path / "made", base_folder)
    assert certify._artifact(folder).ok
    save_file({"weight": torch.ones(3)}, folder / "base.safetensors")
    assert not certify._artifact(folder).ok
    assert not weights.foreign_tensors({artifacts.ADAPTER: {"q.lora_A.weight": (8, 32)}}, 8, 8)
    assert weights.foreign_tensors({artifacts.ADAPTER: {"q.lora_A.weight": (32, 32)}}, 8, 8)
