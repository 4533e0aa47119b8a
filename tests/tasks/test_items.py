"""The items of the embedded suite: each answer is the right one, each rule tells good from bad."""

import ast
from collections import Counter

import pytest

from retrofit.errors import UsageError
from retrofit.tasks import scoring
from retrofit.tasks.items import CATEGORIES, SIZES, embedded, fewest, read, spread
from retrofit.tasks.suite import METRICS, score

ALL = [item for name in CATEGORIES for item in read(name)]


def of(kind):
    return [item for item in ALL if item.kind == kind]


def test_ids_are_unique_and_levels_rise_from_1_to_3():
    assert [id for id, count in Counter(item.id for item in ALL).items() if count > 1] == []
    assert {item.kind for item in ALL} == set(METRICS)
    for name in set(CATEGORIES) - {"cloze", "text"}:
        assert {item.level for item in read(name)} == {1, 2, 3}
        assert [item.level for item in read(name)] == sorted(item.level for item in read(name))


@pytest.mark.parametrize("item", of("number"), ids=lambda item: item.id)
def test_the_answer_is_what_its_arithmetic_says(item):
    work = item.fields["work"]
    assert all(isinstance(node, ast.Expression | ast.operator | ast.unaryop | ast.BinOp | ast.UnaryOp | ast.Constant)
               for node in ast.walk(ast.parse(work, mode="eval")))  # fmt: skip
    assert item.fields["answer"] == str(eval(work))
    shown = [line.split(" = ") for line in item.fields["prompt"].splitlines() if " = " in line]
    assert all(eval(left) == int(right) for left, right in shown)
    assert score(item, f" {item.fields['answer']}\n", False)["scores"] == {"accuracy": 1.0}
    assert score(item, f" {int(item.fields['answer']) + 1}", False)["scores"] == {"accuracy": 0.0}


@pytest.mark.parametrize("item", of("format"), ids=lambda item: item.id)
def test_rules_tell_a_good_answer_from_a_bad_one(item):
    assert scoring.follows(item.fields["good"], item.fields["rules"])
    assert not scoring.follows(item.fields["bad"], item.fields["rules"])
    assert not any(stop in item.fields["good"] for stop in item.stop)


def test_solutions_of_code_pass_their_tests_and_empty_ones_do_not():
    for item in of("code"):
        for body, passes in ((item.fields["solution"], True), ("\n    pass\n", False)):
            program = scoring.program_of(item.fields["prompt"], body)
            assert scoring.parses(program)
            names: dict[str, object] = {}
            exec(compile(program, item.id, "exec"), names)
            try:
                exec(compile(item.fields["tests"], item.id, "exec"), names)
            except (AssertionError, TypeError):
                assert not passes, item.id
            else:
                assert passes, item.id


def test_options_differ_and_the_right_ones_stand_at_every_place():
    for item in of("choice"):
        assert len(set(item.fields["options"])) == 4 and 0 <= item.fields["answer"] < 4
    places = Counter(item.fields["answer"] for item in of("choice"))
    assert min(places.values()) >= 8, "an answer that is always the first would score too well"


def test_a_run_takes_items_evenly_over_the_file():
    assert spread(list("abcdefgh"), 4) == list("aceg")
    assert spread(list("abc"), 5) == spread(list("abc"), None) == list("abc")
    quick = embedded("quick")
    assert Counter(item.category for item in quick) == dict.fromkeys(CATEGORIES, SIZES["quick"])
    assert {item.level for item in quick if item.category == "arithmetic"} == {1, 2, 3}
    assert embedded("full") == ALL
    assert len(embedded("full", ["code"], limit=3)) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": "quik"}, "did you mean"),
        ({"categories": ["arithmetics"]}, "no category `arithmetics`"),
        ({"limit": 0}, "at least 1"),
    ],
)
def test_what_is_not_there_is_named(arguments, words):
    with pytest.raises(UsageError, match=words):
        embedded(**arguments)


def test_the_lowest_limit_holds():
    assert fewest(None, 3, 2) == 2
    assert fewest(None) is None
