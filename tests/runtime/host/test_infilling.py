"""Filling a gap: judged by the base itself, filled by who saw the suffix; what cannot be is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import poison, random_prompts, randomise
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UsageError
from retrofit.runtime.engine import Engine
from retrofit.runtime.host.infilling import JUDGED, Filled, rows_of

PREFIX, SUFFIX, OTHER = random_prompts((9, 11, 11), seed=4)


def engine(name: str = "llama") -> Engine:
    one = randomise(Engine.from_model(build(name), layout=DraftLayout(4)))
    one.config["infill"] = {"rows": 16}
    return one


def likelihood(prefix: list[int], text: list[int], name: str = "llama") -> float:
    """log p of a text behind a prefix, by transformers."""
    ids = torch.tensor([[*prefix, *text]])
    with torch.inference_mode():
        logs = build(name)(input_ids=ids).logits[0, len(prefix) - 1 : -1].log_softmax(-1)
    return float(logs.gather(-1, torch.tensor(text)[:, None]).sum())


def drafted(found: Filled) -> list[list[int]]:
    return [one.tokens for one in found.candidates if one.origin == "filled"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_candidates_are_judged_by_the_original_with_the_suffix_behind_them(name: str) -> None:
    found = engine(name).infill(PREFIX, SUFFIX, longest=4)
    assert {len(one.tokens) for one in found.candidates} == {1, 2, 3, 4}
    for one in found.candidates:
        assert one.log_probability == pytest.approx(likelihood(PREFIX, [*one.tokens, *SUFFIX[:JUDGED]], name), abs=1e-3)
    values = [one.log_probability for one in found.candidates]
    assert values == sorted(values, reverse=True) and found.tokens == found.candidates[0].tokens


def test_what_ar_goes_on_with_is_among_them() -> None:
    one = engine()
    (written,) = one.generate([PREFIX], "ar", max_new_tokens=4, original_settings=False)
    found = one.infill(PREFIX, SUFFIX, lengths=[2, 4])
    by_ar = [c.tokens for c in found.candidates if c.origin == "ar"]
    assert sorted(by_ar, key=len) == [written.tokens[:2], written.tokens]
    assert found.forwards["ar"] == 4 and found.forwards["judge"] == len(found.candidates)


def test_the_suffix_is_seen_through_the_block_alone() -> None:
    """Another suffix fills otherwise; an adapter of nothing but NaN leaves every judgement as it was."""
    with_one, with_other = (drafted(engine().infill(PREFIX, s, lengths=[3, 5, 8])) for s in (SUFFIX, OTHER))
    assert with_one != with_other
    given = [7, 7, 7]
    kept = {
        tuple(c.tokens): c.log_probability for c in engine().infill(PREFIX, SUFFIX, longest=3, given=given).candidates
    }
    bad = poison(engine()).infill(PREFIX, SUFFIX, longest=3, given=given)
    for one in bad.candidates:
        if one.origin != "filled":
            assert one.log_probability == kept[tuple(one.tokens)]


def test_lengths_that_are_filled_together_are_filled_as_alone() -> None:
    together = engine().infill(PREFIX, SUFFIX, lengths=[2, 3, 5, 8])
    alone = [drafted(engine().infill(PREFIX, SUFFIX, lengths=[n])) for n in (2, 3, 5, 8)]
    assert sorted(drafted(together), key=len) == [text for texts in alone for text in texts]


def test_what_stands_there_stays_unless_another_is_likelier() -> None:
    first = engine().infill(PREFIX, SUFFIX, longest=3)
    again = engine().infill(PREFIX, SUFFIX, longest=3, given=first.tokens)
    assert again.tokens == first.tokens
    worse = engine().infill(PREFIX, SUFFIX, longest=3, given=first.candidates[-1].tokens)
    assert worse.tokens == first.tokens


def test_a_prefix_of_one_token_and_one_longer_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(engine().infill(PREFIX[:1], SUFFIX, lengths=[2]).tokens) == 2
    whole = engine().infill(PREFIX, SUFFIX, lengths=[2])
    one = engine()
    monkeypatch.setattr(one.backend, "prefill_rows", 3)
    pieces = one.infill(PREFIX, SUFFIX, lengths=[2])
    assert pieces.tokens == whole.tokens and pieces.forwards["prefill"] == 3 and whole.forwards["prefill"] == 1


def test_the_cache_is_given_back_and_the_engine_goes_on() -> None:
    one = engine()
    want = one.generate([PREFIX], "ar", max_new_tokens=6)[0].tokens
    one.infill(PREFIX, SUFFIX, longest=2)
    assert one.generate([PREFIX], "ar", max_new_tokens=6)[0].tokens == want
    one.close()
    with pytest.raises(UsageError):
        one.infill(PREFIX, SUFFIX)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"longest": 9}, "the length of a gap is 9; it must be a whole number from 1 to 8"),
        ({"lengths": [0]}, "the length of a gap is 0"),
        ({"lengths": []}, "lengths is empty"),
        ({"suffix": []}, "suffix is empty"),
        ({"prefix": []}, "prefix is empty"),
        ({"prefix": PREFIX * 20}, "the model reads"),
    ],
)
def test_what_is_no_gap_is_refused(given: dict[str, Any], said: str) -> None:
    arguments = {"prefix": PREFIX, "suffix": SUFFIX, **given}
    with pytest.raises(UsageError, match=said):
        engine().infill(arguments.pop("prefix"), arguments.pop("suffix"), **arguments)


def test_engines_that_cannot_are_refused_by_name() -> None:
    untaught = Engine.from_model(build("llama"), layout=DraftLayout(4))
    with pytest.raises(UsageError, match="has not learned to fill a gap"):
        untaught.infill(PREFIX, SUFFIX)
    for backend, said in (
        (SimpleNamespace(name="fused"), "on the hf backend alone; this is fused"),
        (SimpleNamespace(name="hf", recurrent=frozenset({"mixer"})), "layers with a state"),
    ):
        one: Any = SimpleNamespace(backend=backend, config={"infill": {"rows": 16}})
        with pytest.raises(UsageError, match=said):
            rows_of(one)
