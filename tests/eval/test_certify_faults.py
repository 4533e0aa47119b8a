"""A fault planted in every strategy is caught: `retrofit certify` ends with 3, and says what it found where.

The artifact is one that the real `convert` wrote, with measured ranks, so `fused` runs trees.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from certifying import command, converted, flat_base, ranks_of, small
from transformers import GenerationConfig

from retrofit.adapters import rows as row_plans
from retrofit.eval import audit, certify
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes
from retrofit.runtime.host import steps as host_steps
from retrofit.runtime.request import Request
from retrofit.runtime.rules.lookup import Lookup
from retrofit.runtime.rules.processors import Guard
from retrofit.runtime.rules.tree import accepted_path
from retrofit.runtime.scheduler import Scheduler

PROMPTS = [[i, *range(i, i + (i % 5 if i % 3 == 0 else 0))] for i in range(24)]
"""Short ones, so that a repetition penalty tells what a path has added."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, converted_artifact):
    assert ranks_of(converted_artifact) is not None
    return shutil.copytree(converted_artifact, tmp_path_factory.mktemp("made") / "artifact")


def accepts_one_too_many(patch):
    right = modes.accepted_length
    patch.setattr(
        modes, "accepted_length", lambda draft, target, lengths: (right(draft, target, lengths) + 1).minimum(lengths)
    )


def uses_the_seeds_noise_in_all_rows(patch):
    right = modes._targets
    patch.setattr(
        modes, "_targets", lambda run, logits, owners, steps, *rest: right(run, logits, owners, [0] * len(steps), *rest)
    )


def forgets_to_roll_back(patch):
    """Rejected rows count as committed: what follows stands at wrong positions and reads stale K/V."""
    step = modes.speculative_step

    def mutant(run, requests, plans):
        before = [r.committed for r in requests]
        step(run, requests, plans)
        for request, was, plan in zip(requests, before, plans, strict=True):
            if request.committed > was:
                request.committed = was + 1 + plan.verify

    patch.setattr(host_steps, "speculative_step", mutant)


def accepts_any_child(patch):
    def mutant(tokens, parents, targets):
        path = accepted_path(tokens, parents, targets)
        child = next((j for j in range(path[-1] + 1, len(tokens)) if parents[j] == path[-1]), None)
        return path if child is None else [*path, child]

    patch.setattr(modes, "accepted_path", mutant)


def puts_branches_one_after_another(patch):
    patch.setattr(row_plans, "base_positions", lambda s: list(range(s.start, s.start + len(s.tokens))))


def lets_branches_see_each_other(patch):
    patch.setattr(row_plans, "_ancestors", lambda s: np.tril(np.ones((len(s.tokens), len(s.tokens)), dtype=bool)))


def grows_another_tree_when_it_pays(patch):
    """A tree that depends on what has been decoded: acceptance is then measured on chosen cases."""
    right = modes._draft

    def mutant(run, hangs, tree):
        even = hangs[0].request.tokens[-1] % 2 == 0
        right(run, hangs, tree if even else tree.first(3))

    patch.setattr(modes, "_draft", mutant)


def drops_drafts_that_fail(patch):
    """The text stays right, but what is accepted is a lie: a draft is verified only if its token is even."""
    right = host_steps.planned

    def mutant(cycle, request, *rest):
        plan = right(cycle, request, *rest)
        fails = any(token % 2 for token in request.drafts[: plan.verify])
        return replace(plan, verify=0, hang=plan.hang[:1]) if fails else plan

    patch.setattr(host_steps, "planned", mutant)


def verifies_other_drafts(patch):
    """The draft head's tokens are replaced after the fact, as a peek at the target would."""
    right = modes.speculative_rows

    def mutant(request, plan, *rest):
        if plan.verify and (request.tree is None or plan.rows is not None):
            request.drafts = [request.drafts[0] ^ 1, *request.drafts[1:]]
        return right(request, plan, *rest)

    patch.setattr(modes, "speculative_rows", mutant)


def looks_up_elsewhere(patch):
    """The earliest occurrence in place of the latest."""

    def mutant(lookup):
        tokens = lookup.tokens
        for n in range(min(3, len(tokens) - 1), 0, -1):
            for i in range(len(tokens) - n):
                if tokens[i : i + n] == tokens[-n:]:
                    return list(tokens[i + n : i + n + lookup.count])
        return []

    patch.setattr(Lookup, "proposal", mutant)


def penalises_the_committed_prefix_only(patch):
    patch.setattr(modes, "path_seen", lambda seen, drafts: seen.expand(len(drafts) + 1, -1))


def penalises_no_branch(patch):
    def mutant(requests, sequences):
        if requests[0].seen is None:
            return None
        return torch.cat([r.seen.repeat(len(s.tokens), 1) for r, s in zip(requests, sequences, strict=True)])

    patch.setattr(modes, "_path_seen", mutant)


def looks_for_an_end_at_the_end_only(patch):
    """An EOS among accepted drafts is passed over."""
    right = Request.emit

    def mutant(self, tokens, *, prefill=False):
        ends, kept = self.eos, list(tokens)
        self.eos = frozenset()
        if len(kept) > 1:
            right(self, kept[:-1], prefill=prefill)
        self.eos = ends
        return 0 if self.done else len(kept) - 1 + right(self, kept[-1:], prefill=prefill)

    patch.setattr(Request, "emit", mutant)


def gives_a_slot_twice(patch):
    """Whoever is admitted later gets the slot of a request that still runs."""
    right = Scheduler.admit

    def mutant(self):
        busy = [r.slot for r in self.running]
        admitted = right(self)
        if busy and admitted:
            admitted[0].slot = busy[0]
        return admitted

    patch.setattr(Scheduler, "admit", mutant)


def keeps_the_last_owners_length(patch):
    """A slot that is used again begins where its last sequence ended, over that one's K/V."""
    used = {}
    right = modes.prefill_step

    def mutant(run, requests):
        right(run, requests)
        for r in requests:
            if r.slot in used and used[r.slot] is not r:
                r.committed += 1
            used[r.slot] = r

    from retrofit.runtime import engine

    patch.setattr(engine, "prefill_step", mutant)


def ignores_a_limit(patch):
    patch.setattr(Request, "remaining", property(lambda self: self.max_new_tokens - self.output_index + 1))


FAULTS = {
    "two_forward": [
        ("two_forward", accepts_one_too_many, "(token)"),
        ("two_forward", drops_drafts_that_fail, "(length)"),
    ],
    "fused chain": [
        ("fused, chain", uses_the_seeds_noise_in_all_rows, "(token)"),
        ("fused, last", accepts_one_too_many, "(token)"),
        ("fused, chain", verifies_other_drafts, "(draft)"),
    ],
    "fused tree": [
        ("fused, ragged", accepts_any_child, "(token)"),
        ("fused, ragged", uses_the_seeds_noise_in_all_rows, "(token)"),
        ("fused, ragged", puts_branches_one_after_another, "(rows)"),
        ("fused, ragged", lets_branches_see_each_other, "(rows)"),
        ("fused, ragged", grows_another_tree_when_it_pays, "(length)"),
        ("fused, ragged", drops_drafts_that_fail, "(length)"),
    ],
    "auto": [("auto", forgets_to_roll_back, "(rows)"), ("auto", verifies_other_drafts, "(draft)")],
    "prompt_lookup": [
        ("prompt_lookup", accepts_one_too_many, "(token)"),
        ("prompt_lookup", looks_up_elsewhere, "(draft)"),
    ],
    "hybrid": [
        ("hybrid", verifies_other_drafts, "(draft)"),
        ("hybrid, ragged", accepts_any_child, "(token)"),
    ],
    "repetition penalty": [
        ("two_forward, penalty", penalises_the_committed_prefix_only, "(token)"),
        ("fused, prepare 2, penalty", penalises_no_branch, "(token)"),
    ],
    "ragged batch": [
        ("ragged", looks_for_an_end_at_the_end_only, "(token)"),
        ("fused, ragged", looks_for_an_end_at_the_end_only, "(token)"),
        ("ragged", gives_a_slot_twice, "(token)"),
        ("ragged", keeps_the_last_owners_length, "(rows)"),
        ("ragged", ignores_a_limit, "(token)"),
    ],
}
CASES = [pytest.param(*fault, id=f"{name}: {fault[1].__name__}") for name, faults in FAULTS.items() for fault in faults]


@pytest.fixture
def one_way(folder, monkeypatch):
    """Let the command audit one way of decoding, and nothing else."""
    right = audit.ways

    def only(name):
        prompts, tokens = (PROMPTS, 24) if "ragged" in name else (PROMPTS[:12], 16)  # enough to show what was planted
        small(monkeypatch, len(prompts), tokens, only=("audit",))
        monkeypatch.setattr(certify, "token_prompts", lambda *_: [list(p) for p in prompts])
        monkeypatch.setattr(audit, "ways", lambda engine: [way for way in right(engine) if way.name == name])

    return only


def test_without_a_fault_every_way_passes(folder, monkeypatch):
    small(monkeypatch, len(PROMPTS), 24, only=("audit",))
    monkeypatch.setattr(certify, "token_prompts", lambda *_: [list(p) for p in PROMPTS])
    result, checks = command(folder)
    assert result.exit_code == 0, checks["audit"]["details"]["first_problems"]
    telling = {name: run["telling"] for name, run in checks["audit"]["details"]["runs"].items() if run["telling"]}
    assert telling.keys() == {"two_forward, penalty", "auto, penalty", "fused, prepare 2, penalty"}
    assert {name for _, faults in FAULTS.items() for name, _, _ in faults} <= set(checks["audit"]["details"]["runs"])
    accepted = {name: run["accepted"] for name, run in checks["audit"]["details"]["runs"].items()}
    assert all(count > 0 for name, count in accepted.items() if name not in ("fused", "fused, last")), accepted


@pytest.mark.parametrize(("name", "plant", "rule"), CASES)
def test_a_planted_fault_is_caught(folder, one_way, monkeypatch, name, plant, rule):
    one_way(name)
    plant(monkeypatch)
    result, checks = command(folder)
    assert result.exit_code == 3, result.output
    assert "not certified: audit failed" in result.stderr
    problems = checks["audit"]["details"]["first_problems"]
    assert any(problem.startswith(f"{name}: ") and problem.endswith(rule) for problem in problems), problems


@pytest.mark.parametrize("fault", ["last", "none"])
def test_a_tree_whose_kv_goes_elsewhere_is_caught(folder, monkeypatch, fault):
    """The rows are right and so are their targets; what is wrong is what the next forward reads."""
    small(monkeypatch, 4, 12, only=("bitwise", "sampled-fp32"))
    right = modes._store

    def mutant(run, requests, sequences, paths):
        wrong = [[*path[:-1], 0] if fault == "last" else path[:1] for path in paths]
        if fault == "last":
            right(run, requests, sequences, wrong)
        else:
            run.cache.staged = {}

    monkeypatch.setattr(modes, "_store", mutant)
    result, checks = command(folder)
    assert result.exit_code == 3
    for name in ("bitwise", "sampled-fp32"):
        assert checks[name]["status"] == "failed"
        assert {d["strategy"] for d in checks[name]["details"]["differences"]} <= {"fused", "hybrid", "auto"}


def test_an_engine_that_never_drafts_is_told(folder, monkeypatch):
    """A block that came true must propose something: silence is not proof."""
    small(monkeypatch, 3, 8, only=("audit",))
    monkeypatch.setattr(modes, "_draft", lambda *_: None)
    result, checks = command(folder)
    assert result.exit_code == 3
    assert any("0 drafts proposed" in problem for problem in checks["audit"]["details"]["first_problems"])


def test_the_faults_are_the_engines(folder):
    """None of them changes `ar`."""
    engine = Engine.load(folder)
    options = {"max_new_tokens": 6, "ignore_eos": True}
    want = [r.tokens for r in engine.generate(PROMPTS, "ar", **options)]
    for plant in (accepts_one_too_many, accepts_any_child, puts_branches_one_after_another, verifies_other_drafts):
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            assert [r.tokens for r in engine.generate(PROMPTS, "ar", **options)] == want


def test_the_bases_own_settings_hold_in_bitwise(tmp_path, texts, monkeypatch):
    """A rule of the base's generation_config that forgets the drafts on a row's path parts the texts from `ar`'s."""
    base = flat_base(tmp_path / "base")
    GenerationConfig(no_repeat_ngram_size=1).save_pretrained(base)
    made = converted(tmp_path / "artifact", base, texts)
    small(monkeypatch, 3, 16, only=("bitwise",))
    monkeypatch.setattr(certify, "token_prompts", lambda *_: [[i, i + 1] for i in range(3)])
    assert command(made)[0].exit_code == 0
    right = Guard.banned
    monkeypatch.setattr(Guard, "banned", lambda self, path: right(self, []))
    result, checks = command(made)
    assert result.exit_code == 3
    assert checks["bitwise"]["status"] == "failed"
