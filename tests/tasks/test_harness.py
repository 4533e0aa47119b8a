"""lm-evaluation-harness over an engine: `ar` answers as the harness's own `hf` model does, on the same items.

The harness is an extra; without it all but the test of its absence is left out.
"""

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import retrofit
from retrofit.errors import ResourceError, UsageError
from retrofit.runtime.engine import Engine
from retrofit.tasks import harness
from retrofit.tasks.tokens import windows

TINY = Path(retrofit.__file__).parent / "recipes" / "tiny"
LIMIT = 4
SAME = 1e-5
"""Relative, of sums in fp32: the engine's forward has one row more than the harness's."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("lm_eval")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32"), AutoTokenizer.from_pretrained(TINY)
    with pytest.MonkeyPatch.context() as patch, Engine.from_model(model, tokenizer, exact="off") as engine:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        own = harness.engine_model(engine, "ar")
        yield {
            "original": harness.original_model(model, tokenizer, own.max_length),
            "ar": own,
            "self_spec": harness.engine_model(engine, "self_spec", strategy="prompt_lookup"),
        }


@pytest.fixture(scope="module")
def found(models):
    return harness.run(models, list(harness.OURS), limit=LIMIT)


def asked(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type="", doc={}, arguments=own, idx=0) for own in arguments]


def test_ar_scores_every_item_as_the_hf_model_does(found):
    assert len(found["items"]) == 3 * LIMIT
    for row in found["items"]:
        own, theirs = row["results"]["ar"], row["results"]["original"]
        if row["category"] == "retrofit_text":
            assert own.pop("scores") == pytest.approx(theirs.pop("scores"), rel=SAME)
        assert own == theirs, "which option, which text and which score are exactly the same"
    arithmetic = found["categories"]["retrofit_arithmetic"]["exact_match,first-number"]["models"]
    assert arithmetic["ar"]["same_text"] == arithmetic["self_spec"]["same_text"] == arithmetic["ar"]["n"] == LIMIT
    cloze = found["categories"]["retrofit_cloze"]["acc,none"]
    assert cloze["models"]["ar"]["delta"] == 0.0 and not cloze["lower_is_better"]
    assert cloze["models"]["ar"]["value"] > 0.25
    assert found["categories"]["retrofit_text"]["bits_per_byte,none"]["lower_is_better"]


def test_likelihoods_of_a_mode_that_writes_are_left_out_with_the_reason(found):
    assert [(one["what"], one["why"]) for one in found["skipped"]] == [
        (f"{task} in self_spec", "self_spec writes text; the likelihoods are those of ar")
        for task in ("retrofit_cloze", "retrofit_text")
    ]


def test_log_likelihoods_are_those_of_the_hf_model(models):
    """An empty context, space at its end, a token that spans both parts, and a continuation that is greedy."""
    pairs = [("", "import os"), ("def f(a): ", "return a"), ("def __init__(", "self"), ("import os\nimport", " sys")]
    own, theirs = (models[name].loglikelihood(asked(*pairs)) for name in ("ar", "original"))
    assert [greedy for _, greedy in own] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in own} == {True, False}
    assert [total for total, _ in own] == pytest.approx([total for total, _ in theirs], rel=SAME)


def test_texts_longer_than_the_context_are_cut_as_the_hf_model_cuts_them(models):
    text = (TINY / "heldout.txt").read_text()[:1500]
    short = [harness.engine_model(models["ar"].engine, "ar", max_length=50)]
    short.append(harness.original_model(models["original"].model, models["original"].tokenizer, 50))
    own, theirs = (model.loglikelihood(asked((text, " the end"))) for model in short)
    assert own[0][0] == pytest.approx(theirs[0][0], rel=SAME)
    own, theirs = (model.loglikelihood_rolling(asked((text,), ("import os",))) for model in short)
    assert own == pytest.approx(theirs, rel=SAME)


@pytest.mark.parametrize("count", [1, 5, 9, 10, 11, 18, 19, 40])
def test_windows_are_those_of_the_harness(count):
    utils = pytest.importorskip("lm_eval.utils")
    theirs = utils.get_rolling_token_windows(list(range(count)), prefix_token=99, max_seq_len=9, context_len=1)
    assert list(windows(list(range(count)), 99, 10)) == [utils.make_disjoint_window(pair) for pair in theirs]


def test_generation_ends_where_the_hf_model_ends(models):
    pytest.importorskip("lm_eval")
    requests = asked(
        ("def read(path):", {"until": ["\n\n", "return"], "max_gen_toks": 40}),
        ("import", {"until": ["\n"], "max_gen_toks": 12}),
        ("class Reader:\n", {"until": [], "max_gen_toks": 10, "do_sample": False, "temperature": 0.7}),
    )
    own, fast, theirs = (models[name].generate_until(requests) for name in ("ar", "self_spec", "original"))
    assert own == fast == theirs
    assert all("return" not in text for text in own[:1])


def test_samples_of_a_request_that_is_repeated_differ_and_are_the_same_in_every_run(models):
    requests = asked(*[("import", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 3)
    texts = models["ar"].generate_until(requests)
    assert len(set(texts)) > 1 and texts == models["ar"].generate_until(requests)


def test_what_an_engine_has_not_is_refused(models):
    with pytest.raises(UsageError, match="`num_beams`"):
        models["ar"].generate_until(asked(("a", {"num_beams": 4})))
    with pytest.raises(UsageError, match="asks for 5000 tokens"):
        models["ar"].generate_until(asked(("a", {"max_gen_toks": 5000})))
    with pytest.raises(UsageError, match="max_length is 9999"):
        harness.engine_model(models["ar"].engine, max_length=9999)
    with pytest.raises(UsageError, match="the likelihoods are those of ar"):
        models["self_spec"].loglikelihood(asked(("a", "b")))
    with pytest.raises(UsageError, match="`original`"):
        harness.run({"ar": models["ar"]}, ["retrofit_cloze"])


def test_a_chat_goes_through_the_template(models):
    models["ar"].tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert models["ar"].apply_chat_template([{"role": "user", "content": "Hi"}]) == "<user>Hi"


def test_a_task_whose_data_is_not_at_hand_and_one_that_runs_code_are_left_out(models, tmp_path):
    config = "task: {}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {}}}}}\ntest_split: test\n{}"
    for name, extra in (("gone", ""), ("unsafe", "unsafe_code: true\n")):
        data = tmp_path / "none.jsonl" if name == "gone" else harness.FOLDER / "cloze.jsonl"
        text = config.format(name, data, extra)
        (tmp_path / f"{name}.yaml").write_text(f"{text}output_type: multiple_choice\ndoc_to_text: prompt\n"
            "doc_to_choice: options\ndoc_to_target: answer\n")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        import lm_eval.tasks

        whole = lm_eval.tasks.TaskManager
        patch.setattr(lm_eval.tasks, "TaskManager", lambda **own: whole(**own | {"include_defaults": False}))
        found = harness.run(models, ["gone", "unsafe"], include=str(tmp_path))
        with pytest.raises(UsageError, match="no task `unsaf`; did you mean"):
            harness.run(models, ["unsaf"], include=str(tmp_path))
    assert found["items"] == [] and found["categories"] == {}
    assert [one["what"] for one in found["skipped"]] == ["gone", "unsafe"]
    assert found["skipped"][0]["why"].startswith("does not load: FileNotFoundError")
    assert "not allowed" in found["skipped"][1]["why"]


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ResourceError, match="lm-eval, which does not load") as error:
        harness.run({"original": None}, ["retrofit_cloze"])
    assert error.value.hint == "pip install 'retrofit-lm[eval]'"
