"""The certificate of the fused backend: what is certified is what runs, here in Triton's interpreter.

The steps between two forwards are the real ones; the decoder and the noise are the kernels' plain specification, which
is what keeps these tests in seconds (other tests hold the kernels against it).
"""

import json
import shutil

import pytest
import torch
from certifying import command, converted, flat_base, ranks_of, small
from fused_models import DEVICE, plain_decoder, plain_sampling

from retrofit.errors import UsageError
from retrofit.eval import audit, bitwise, certify, distribution, exactness, weights
from retrofit.eval.recording import recording
from retrofit.eval.replay import Sampling, cut, paths_of
from retrofit.eval.subject import Subject
from retrofit.runtime.auto import cost
from retrofit.runtime.device import loop as device_loop
from retrofit.runtime.engine import Engine

FUSED = ("--backend", "fused")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory, texts):
    base = flat_base(tmp_path_factory.mktemp("base"), **SIZES)
    folder = converted(tmp_path_factory.mktemp("made") / "artifact", base, texts, draft__block=2)
    assert ranks_of(folder) is not None
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    plain_decoder(monkeypatch)
    plain_sampling(monkeypatch)
    monkeypatch.setattr(cost, "REPEATS", 0)
    return shutil.copytree(made, tmp_path / "artifact")


def engine_of(folder, exact="off"):
    return Engine.load(folder, DEVICE, "float32", exact, "fused")


def audited(engine, names, count=4, tokens=6):
    """The ways of decoding of these names, audited."""
    prompts = [[7 * i % 60, i, 3 * i % 50, 5][: 1 + i % 4] for i in range(count)]
    return {w.name: audit._audit_way(engine, w, prompts, tokens) for w in audit.ways(engine) if w.name in names}


def test_the_command_certifies_the_fused_backend(folder, monkeypatch):
    small(monkeypatch, 3, 8, only=("base-weights", "gate", "audit", "bitwise", "greedy-fp32"))
    monkeypatch.setattr(certify, "token_prompts", lambda *_: [[5, 9, 2], [8, 1, 17, 30], [4, 4, 4]])
    monkeypatch.setattr(bitwise, "BATCHES", (2, 1))
    monkeypatch.setattr(bitwise, "SAMPLINGS", (Sampling(0.8),))  # greedy texts are held against transformers
    right = audit.ways
    ways = ("two_forward", "prompt_lookup", "fused, chain", "fused, ragged")
    monkeypatch.setattr(audit, "ways", lambda engine: [way for way in right(engine) if way.name in ways])
    result, checks = command(folder, *FUSED, "--exact", "invariant")
    assert result.exit_code == 0, result.output
    assert {check["status"] for check in checks.values()} == {"passed"}
    assert "certified was the fused backend, exact=invariant, in float32 on" in result.stderr
    content = json.loads((folder / "certificate.json").read_text())
    assert (content["backend"], content["exact"]) == ("fused", "invariant")
    runs = checks["audit"]["details"]["runs"]
    assert runs.keys() == set(ways) and runs["fused, ragged"]["branched"]
    assert checks["bitwise"]["detail"].startswith("level invariant, float32: ")
    assert checks["base-weights"]["details"]["compared"] == checks["base-weights"]["details"]["tensors"] == 12


def test_an_engine_is_certified_by_its_folder(folder):
    with pytest.raises(UsageError, match="certified by its artifact"):
        certify._artifact(engine_of(folder))


def test_steps_on_the_device_are_watched_and_left_alone(folder):
    """Every way whose steps are planned on the device; what they run is read back, and nothing of it stays watched."""
    engine = engine_of(folder)
    before = vars(engine.backend).copy(), vars(engine).copy()
    names = {"two_forward", "fused", "fused, chain", "fused, last", "auto", "ragged", "fused, ragged"}
    found = audited(engine, names)
    assert found.keys() == names
    for name, one in found.items():
        assert not one.problems, (name, one.problems)
        assert one.auditor.checked and one.auditor.verified
    assert found["fused, ragged"].auditor.branched
    assert before[0].keys() == vars(engine.backend).keys() and before[1].keys() == vars(engine).keys()
    assert engine.backend.head is before[0]["head"]
    assert all("step" not in vars(loop) for loop in engine.backend.cache.loops.values())


def test_recorded_rows_are_those_of_the_plan(folder):
    """A step on the device and the same decoding planned on the host: equal rows, drafts and logits."""
    engine, hf = engine_of(folder), Engine.load(folder, "cpu", "float32", backend="hf")
    options = {"strategy": "fused", "tree": 3, "max_new_tokens": 6, "ignore_eos": True, "seed": 1000, "batch_size": 1}
    made = []
    for one in (engine, hf):
        made.append([])
        with recording(one, made[-1].append):
            one.generate([[5, 9, 2]], temperature=0.8, **options)
    ours, theirs = made
    assert len(ours) == len(theirs)
    for got, want in zip(ours, theirs, strict=True):
        assert [list(s.tokens) for s in got.sequences] == [list(s.tokens) for s in want.sequences]
        assert got.positions == want.positions
        assert want.paths is None or got.paths == want.paths
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-4)
        assert got.proposals.keys() >= want.proposals.keys()
        for key, proposal in want.proposals.items():
            # The host drafts no deeper than can be used.
            deep = max(map(len, paths_of(proposal.parents))) - 1
            assert cut(got.proposals[key], deep) == (proposal.tokens, proposal.parents)


# Planted faults


def emits_the_draft(patch):
    """The first draft is emitted whatever its target was."""
    right = device_loop.accept

    def mutant(state, lanes, step, targets, *rest):
        targets = targets.clone()
        for lane, slot in enumerate(lanes.tolist()):
            if step.base_rows > 1 and int(state.num_drafts[slot]):
                targets[lane * step.base_rows] = state.drafts[slot, 0]
        return right(state, lanes, step, targets, *rest)

    patch.setattr(device_loop, "accept", mutant)


def reuses_the_noise(patch):
    right = device_loop.lay_rows

    def mutant(state, lanes, step, *rest):
        right(state, lanes, step, *rest)
        rest[-1].view(-1, step.base_rows)[:] = rest[-1].view(-1, step.base_rows)[:, :1].clone()

    patch.setattr(device_loop, "lay_rows", mutant)


def stands_one_further(patch):
    right = device_loop.lay_rows

    def mutant(state, lanes, step, *rest):
        right(state, lanes, step, *rest)
        rows = rest[3]
        if step.base_rows > 1:
            rows.positions[1 : step.base_rows] += rows.limits[1 : step.base_rows] > 0

    patch.setattr(device_loop, "lay_rows", mutant)


def verifies_other_drafts(patch):
    right = device_loop.lay_rows

    def mutant(state, *rest):
        state.drafts[:, 0] ^= 1
        right(state, *rest)

    patch.setattr(device_loop, "lay_rows", mutant)


def passes_over_an_end(patch):
    right = device_loop.DeviceLoop.reset

    def mutant(self, ignore_eos):
        right(self, ignore_eos)
        self.state.eos.fill_(-1)

    patch.setattr(device_loop.DeviceLoop, "reset", mutant)


def forgets_who_is_new(patch):
    """A slot that is used again keeps the drafts of its last request."""
    patch.setattr(device_loop.DeviceLoop, "forget_drafts", lambda self, slot=slice(None): None)
    right = device_loop.DeviceLoop.start

    def mutant(self, request):
        right(self, request)
        self.state.num_drafts[request.slot] = self.state.drafts.shape[1] if self.state.drafts.any() else 0

    patch.setattr(device_loop.DeviceLoop, "start", mutant)


FAULTS = {
    "two_forward": [(emits_the_draft, "(token)"), (stands_one_further, "(rows)")],
    "fused, chain": [(emits_the_draft, "(token)"), (reuses_the_noise, "(token)")],
    "fused, ragged": [(emits_the_draft, "(token)"), (stands_one_further, "(rows)"), (verifies_other_drafts, "(draft)")],
    "auto": [(emits_the_draft, "(token)"), (verifies_other_drafts, "(draft)")],
    "ragged": [(passes_over_an_end, "(rows)"), (forgets_who_is_new, "(length)")],
}
CASES = [pytest.param(n, *f, id=f"{n}: {f[0].__name__}") for n, faults in FAULTS.items() for f in faults]


@pytest.mark.skipif(DEVICE != "cpu", reason="faults are planted in Python, which a recorded step does not run")
@pytest.mark.parametrize(("name", "plant", "rule"), CASES)
def test_a_planted_fault_is_caught(folder, monkeypatch, name, plant, rule):
    engine = engine_of(folder)
    with monkeypatch.context() as patch:
        plant(patch)
        (found,) = audited(engine, {name}, 5, 8).values()
    assert any(problem.endswith(rule) for problem in found.problems), found.problems


@pytest.mark.skipif(DEVICE != "cpu", reason="faults are planted in Python, which a recorded step does not run")
def test_kv_of_a_tree_that_goes_nowhere_makes_the_command_fail(folder, monkeypatch):
    small(monkeypatch, 3, 16, only=("bitwise",))
    monkeypatch.setattr(bitwise, "BATCHES", (3,))
    monkeypatch.setattr(bitwise, "SAMPLINGS", (Sampling(0.8),))
    monkeypatch.setattr(certify, "token_prompts", lambda *_: [[5, 9, 2], [8, 1, 17, 30], [4]])
    monkeypatch.setattr(device_loop, "compact", lambda *_: None)
    result, checks = command(folder, *FUSED, "--exact", "off")
    assert result.exit_code == 3
    assert {d["strategy"] for d in checks["bitwise"]["details"]["differences"]} == {"fused"}


def test_gate_leak_in_a_product(folder):
    """A base row that meets an adapter tensor turns NaN; the tensors are put back bit for bit."""
    engine = engine_of(folder)
    subject = Subject(engine, None)
    prompts = [[5, 9, 2, 7], [8, 1, 17]]
    before = [t.clone() for t in exactness.adapter_tensors(engine)]
    assert exactness.gate(subject, prompts).ok
    assert all(torch.equal(a, b) for a, b in zip(before, exactness.adapter_tensors(engine), strict=True))
    norm = engine.backend.weights.norm
    engine.backend.weights.norm = engine.backend.heads.mask_vector.detach()  # what a wrong pointer would do
    verdict = exactness.gate(subject, prompts)
    engine.backend.weights.norm = norm
    assert not verdict.ok and verdict.details["changed"] == verdict.details["base_rows"]


def test_one_bit_of_a_stacked_weight(folder):
    engine = engine_of(folder)
    checkpoint = engine.base.place
    assert weights.compare_fused(engine.backend, checkpoint)["changed"] == 0
    engine.backend.weights.layers[0].qkv.weight.view(torch.int32)[17, 3] ^= 1
    found = weights.compare_fused(engine.backend, checkpoint)
    assert found["changed_names"] == ["model.layers.0.self_attn.k_proj.weight"]


def test_the_distribution_is_that_of_the_fused_steps(folder, monkeypatch):
    """Noise that repeats from one output index to the next is caught there too."""
    backend = engine_of(folder).backend
    monkeypatch.setattr(distribution, "CASES", distribution.CASES[:1])
    monkeypatch.setattr(distribution, "ALPHA", 0.01)  # of so few samples
    assert distribution.tiny_engine(backend).backend.name == "fused"
    assert distribution.distribution(96, backend).ok
    right = device_loop.lay_rows

    def mutant(*arguments):
        right(*arguments)
        arguments[-1].zero_()

    monkeypatch.setattr(device_loop, "lay_rows", mutant)
    assert not distribution.distribution(96, backend).ok


def test_auto_is_put_back(folder):
    engine = engine_of(folder)
    with audit.every_plan(engine):
        engine.generate([[1, 2, 3]], strategy="auto", max_new_tokens=3, temperature=0.8)
        assert engine.device_policy.costs
    assert not engine.device_policy.costs and not vars(engine.device_policy).keys() & {"choose", "trials"}
