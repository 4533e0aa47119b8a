"""UNO folders, replayed by a small model of the engine they are for: its tokens and accepted drafts are ours.

The replay is `replay.py`.
"""

import pytest
from commands import done, refused, run
from replay import Replay
from saved import save_artifact

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.artifact import folder as artifacts
from retrofit.artifact.engines import WANTED
from retrofit.errors import UsageError
from retrofit.exporting.export import export
from retrofit.exporting.uno import files
from retrofit.recipes.schema import by_key, load_recipe
from retrofit.runtime.engine import Engine
from retrofit.runtime.plan import noise_token

LAYOUT = DraftLayout(3, input="noise", attention="causal")
ALONE = {"rank": 4, "alpha": 32.0, "targets": list(ROLES), "markov_rank": 0, "confidence": False}
PROMPTS = [[5, 9, 2, 33, 7, 1, 60, 12], [4, 5], *([n] * 5 for n in range(6))]
NEW = 60
VOCABULARY = 64


@pytest.fixture
def fit(base, tmp_path):
    return save_artifact(tmp_path / "fit", base, LAYOUT, ALONE)


def test_the_engine_it_is_for_says_what_we_say(fit, base, tmp_path):
    folder = export(fit, "uno", tmp_path / "uno").folder
    width = int((folder / "README.md").read_text().split("--speculative-num-draft-tokens ")[1].split()[0])
    assert width == LAYOUT.block + 1
    replay, wrong = Replay(base, folder), Replay(base, folder)
    wrong.scale = -replay.scale
    with Engine.load(fit, base=str(base), dtype="float32") as engine:
        ours = engine.generate(PROMPTS, strategy="two_forward", max_new_tokens=NEW)
    kept, told_apart = 0, False
    for n, (prompt, result) in enumerate(zip(PROMPTS, ours, strict=True)):
        tokens, accepted = replay.uno(prompt, NEW, width, lambda place: noise_token(n, place, VOCABULARY))  # noqa: B023
        assert tokens == result.tokens
        assert accepted[:-2] == result.stats.accepted[: len(accepted) - 2]  # the last drafts are cut to the budget
        kept += sum(accepted[:-2])
        other, others = wrong.uno(prompt, NEW, width, lambda place: noise_token(n, place, VOCABULARY))  # noqa: B023
        assert other == tokens  # a wrong scale costs drafts, never a token
        told_apart |= accepted != others
    assert kept > 5 and told_apart


def test_what_does_not_qualify_is_told_at_once(made, base, tmp_path):
    refusal = refused(run("export", made, "--format", "uno", "-o", tmp_path / "out"), 2)
    assert "draft.input is mask, not noise; draft.attention is bidirectional, not causal; adapter.mark" in refusal
    assert "draft.input=noise draft.attention=causal adapter.markov_rank=0 adapter.confidence=false" in refusal
    assert "draft.shift" not in refusal and not (tmp_path / "out").exists()
    one = save_artifact(tmp_path / "one", base, LAYOUT, ALONE | {"confidence": True})
    with pytest.raises(UsageError, match=r"uno: adapter\.confidence is true, not false$"):
        export(one, "uno", tmp_path / "out")


def test_a_strangers_words_are_no_commands(fit, tmp_path):
    artifact = artifacts.read(fit)
    artifact.config["base"]["revision"] = "$(touch x)"
    text = files(artifact, "a/b; touch x\n")["README.md"].decode()
    assert "--model-path PATH-OF-THE-BASE --revision '$(touch x)' " in text and "touch x\n" not in text


def test_the_recipe_qualifies():
    keys = by_key(load_recipe("uno"))
    assert {key: keys[key] for key in WANTED["sglang"]} == WANTED["sglang"]


def test_it_says_how_it_is_started(fit, base, tmp_path):
    text = files(artifacts.read(fit), "owner/model")["README.md"].decode()
    assert "--model-path owner/model --attention-backend fa3" in text and "base_model: owner/model\n" in text
    assert "alpha 32," in text and "not run" in text
    assert done("export", fit, "--format", "uno", "-o", tmp_path / "out").strip() == str(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
