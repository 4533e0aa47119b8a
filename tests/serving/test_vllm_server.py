"""A real `vllm serve`, with drafts and without, over HTTP: the same tokens, and samples of the same distribution.

Marked `vllm`: needs vLLM and minutes; `make vllm` runs this in an environment of its own.
"""

import sys
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from vllm_server import SMALL, Asker, accepted, drafting, plain, serving

from retrofit.named_bases import embedded_folder
from retrofit.serving.starting import words

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")]
TEMPERATURE = 0.8
WORDS = 16
SAMPLES = 2000
COPIES = 50
LONG = 192
"""Tokens of requests whose drafts are counted."""
SIGNIFICANT = 1e-4


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The embedded base, trained for long enough that some drafts are accepted."""
    from retrofit.recipes.convert import convert

    out = tmp_path_factory.mktemp("served") / "artifact"
    convert(out=out, overrides={"train.steps": 30}, quiet=True)
    return out


@pytest.fixture(scope="module")
def prompts():
    """Eight prompts of text, of 12 to 40 tokens."""
    return [text()[100 * i : 100 * i + 12 + 4 * i] for i in range(8)]


def text():
    """Token ids, 2,000 of them."""
    from transformers import AutoTokenizer

    folder = embedded_folder()
    return AutoTokenizer.from_pretrained(folder)((folder / "heldout.txt").read_text())["input_ids"] * 3


def asked(url, prompts):
    """Set of requests -> what is answered."""
    ask, ids = Asker(url), text()
    long = [ids[200 * i : 200 * i + 170 + 3 * i] for i in range(8)]
    blocks = [ids[500 : 500 + 32 * n] for n in (1, 2, 4)]
    found = {"alone": [ask.one(prompt, tokens=LONG) for prompt in prompts]}
    found["accepted"] = accepted(url)
    found["warm"] = ask.together(prompts * 3)
    found["over several chunks, some put off"] = ask.together(long)
    found["one token of a cached prompt"] = [ask.one(prompt) for prompt in blocks for _ in range(3)]
    found["one token"] = ask.together(prompts, tokens=1)
    found["to the end of the context"] = [ask.one(ids[:480])]
    found["stopped"] = ask.together(prompts, stop=["\n", "e"])
    return found


@pytest.fixture(scope="module")
def answers(artifact, prompts, tmp_path_factory):
    """(without drafts, with them)."""
    logs = tmp_path_factory.mktemp("logs")
    with serving(plain(embedded_folder()), logs / "plain") as url:
        without = asked(url, prompts)
    with serving(drafting(artifact), logs / "drafting") as url:
        return without, {**asked(url, prompts), "sampled": sampled(url, prompts[0])}


@pytest.mark.parametrize(
    "what",
    [
        *("alone", "warm", "over several chunks, some put off", "one token of a cached prompt", "one token"),
        *("to the end of the context", "stopped"),
    ],
)
def test_the_same_tokens_as_without_drafts(answers, what):
    without, drafted = answers
    assert len(without[what]) > 0
    assert drafted[what] == without[what]


def test_drafts_are_accepted_as_in_our_two_forwards(answers, artifact, prompts):
    from retrofit import Engine

    with Engine.load(artifact, dtype="float32") as engine:
        options = {"max_new_tokens": LONG, "original_settings": False}
        results = engine.generate(prompts, "self_spec", strategy="two_forward", **options)
    ours = [n for result in results for n in result.stats.accepted]
    cycles, root, *slots = answers[1]["accepted"]
    assert root >= 0.99 * cycles
    # vLLM counts what it accepts after a request's end too, and our last step of a request may be a plain one.
    ends = len(prompts)
    want = [sum(n > slot for n in ours) for slot in range(len(slots))]
    assert cycles == pytest.approx(len(ours), rel=0.05, abs=ends)
    assert slots == pytest.approx(want, rel=0.05, abs=ends / 2)
    assert slots[0] >= 40


def likeliest(prompt):
    """The words that the samples are of: the likeliest after the prompt."""
    return model()(torch.tensor([prompt])).logits[0, -1].topk(WORDS).indices.tolist()


def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)


def sampled(url, prompt):
    """Second and third token of each sample: the first comes of the prompt alone, without drafts."""
    body = {"allowed_token_ids": likeliest(prompt)}
    options = {"tokens": 3, "temperature": TEMPERATURE, "n": COPIES, "extra_body": {**body, "ignore_eos": True}}
    ask = Asker(url)
    return Counter(tuple(ids[1:]) for _ in range(SAMPLES // COPIES) for ids in ask.one(prompt, **options))


@torch.inference_mode()
def target(prompt):
    """(second, third) -> probability, the first summed over."""
    ids, net = likeliest(prompt), model()

    def after(rows):
        logits = net(torch.tensor(rows)).logits[:, -1, ids]
        return torch.softmax(logits / TEMPERATURE, -1).double()

    first = after([prompt])[0]
    second = after([[*prompt, a] for a in ids])
    third = after([[*prompt, a, b] for a in ids for b in ids]).view(WORDS, WORDS, WORDS)
    joint = torch.einsum("a,ab,abc->bc", first, second, third)
    joint /= joint.sum()
    return {(a, b): float(joint[i, j]) for i, a in enumerate(ids) for j, b in enumerate(ids)}


def chance(counts, prompt):
    """The p-value of Pearson's test; cells are put together, rarest first, until ten are expected in each."""
    from scipy.stats import chisquare

    expected = sorted(((p * SAMPLES, counts[pair]) for pair, p in target(prompt).items()))
    assert sum(counts.values()) == SAMPLES == sum(n for _, n in expected)
    cells = [[0.0, 0]]
    for want, found in expected:
        cells[-1][0] += want
        cells[-1][1] += found
        if cells[-1][0] >= 10:
            cells.append([0.0, 0])
    (want, found) = cells.pop()
    cells[-1][0] += want
    cells[-1][1] += found
    assert len(cells) >= 10
    return chisquare([found for _, found in cells], [want for want, _ in cells]).pvalue


def test_samples_are_of_the_targets_distribution(answers, prompts):
    assert chance(answers[1]["sampled"], prompts[0]) > SIGNIFICANT


def test_drafts_that_are_misreported_to_the_sampler_are_noticed(artifact, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    command = words(str(artifact), "vllm", SMALL, base=None, offline=True)
    assert "retrofit.serving.vllm.worker.Worker" in command
    wrong = [word.replace("retrofit.serving.vllm.worker.Worker", "wrong_worker.Misreporting") for word in command]
    with serving(wrong, tmp_path / "log") as url:
        assert chance(sampled(url, prompts[0]), prompts[0]) < SIGNIFICANT
