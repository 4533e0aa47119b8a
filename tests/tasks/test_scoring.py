"""Scores of texts, worked by hand."""

from decimal import Decimal

import pytest

from retrofit.tasks.scoring import body_of, follows, kept, likeliest, numbers, parses, right_number


def test_numbers_of_a_text():
    assert numbers("It is 1,250.50, not -3 or 7.") == [Decimal("1250.50"), Decimal(-3), Decimal(7)]
    assert numbers("none") == []


@pytest.mark.parametrize(
    ("text", "answer", "take", "right"),
    [
        (" 12 apples, of 30", "12", "first", True),
        (" 12 apples, of 30", "12", "last", False),
        ("so 5 + 7 = 12.", "12", "last", True),
        ("12.0", "12", "first", True),
        ("1,200", "1200", "last", True),
        ("5 + 7 #### 12 is it", "12", "first", True),
        ("twelve", "12", "first", False),
        ("-12", "12", "first", False),
    ],
)
def test_the_number_that_counts(text, answer, take, right):
    assert right_number(text, answer, take) is right


def test_the_likeliest_option_and_the_first_of_equal_ones():
    assert likeliest([-3.0, -1.0, -2.0]) == 1
    assert likeliest([-1.0, -1.0]) == 0


@pytest.mark.parametrize(
    ("rule", "value", "good", "bad"),
    [
        ("equals", "a b", " a b\n", "a  b"),
        ("matches", r"\d+", "123", "123a"),
        ("json", {"a": [1]}, '{"a": [1]}', "{'a': [1]}"),
        ("json", 1, "1", "true"),
        ("json_keys", ["a", "b"], '{"b": 1, "a": 2}', '{"a": 1}'),
        ("lines", 2, "a\n\nb", "a"),
        ("each_line", "- .+", "- a\n- b", "- a\nb"),
        ("words", [2, 3], "a b c", "a"),
        ("contains", ["x", "y"], "xy", "x"),
        ("lacks", ["e"], "Hi", "Hello"),
        ("lacks", ["e"], "Hi", ""),
        ("upper", True, "AB 1", "Ab"),
        ("lower", True, "ab 1", "Ab"),
        ("ends", "!", "Hi! ", "Hi!?"),
    ],
)
def test_rules(rule, value, good, bad):
    assert kept(good, rule, value)
    assert not kept(bad, rule, value)


def test_a_deep_nest_of_brackets_is_only_wrong():
    assert not kept("[" * 100_000, "json", [])


def test_all_rules_must_be_kept():
    assert follows("HI", {"upper": True, "words": [1, 1]})
    assert not follows("HI YOU", {"upper": True, "words": [1, 1]})


def test_a_function_ends_at_the_first_line_that_is_not_indented():
    assert body_of("    x = 1\n\n    return x\n\nprint(f(3))\n") == "    x = 1\n\n    return x\n"
    assert body_of("    return 1") == "    return 1\n"


def test_a_docstring_alone_is_no_answer():
    assert parses('def f():\n    """x"""\n    return 1\n')
    assert parses("def f():\n    return 1\n")
    assert not parses('def f():\n    """x"""\n')
    assert not parses("def f():\n    return (\n")
    assert not parses("x = 1\n")
    assert not parses("def f():\n    return '\0'\n")
