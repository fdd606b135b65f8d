"""The checks of fields: what passes, and the fault in words where it does not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from features.checks import at_least, choice, flag, multiple, number, refuse, variance_range, whole
from features.errors import InputError, one_line


def with_x(value: Any) -> SimpleNamespace:
    return SimpleNamespace(x=value)


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "rule"),
    [
        ({}, (-1e9, 0, 2.5), ("1", None, True), "give a number"),
        ({}, (), (math.nan, math.inf, -math.inf), "give a finite number"),
        ({"least": 0}, (0, 0.5), (-1, -1e-9), "give a number of at least 0"),
        ({"above": 0}, (1e-9,), (0, -1), "give a number above 0"),
        ({"least": 0, "most": 1}, (0, 0.5, 1), (-0.1, 1.1), "give a number from 0 to 1"),
        ({"least": 0, "below": 1}, (0, 0.9), (1, -0.1), "give a number of at least 0, below 1"),
        ({"above": 0, "most": 1}, (0.1, 1), (0, 1.1), "give a number above 0, up to 1"),
        ({"above": 0, "below": 1}, (0.1, 0.9), (0, 1), "give a number above 0, below 1"),
    ],
)
def test_numbers_and_their_bounds(bounds: dict[str, float], good: tuple, bad: tuple, rule: str) -> None:
    assert [number(with_x(value), "x", **bounds) for value in good] == [""] * len(good)
    for value in bad:
        assert number(with_x(value), "x", **bounds) == f"x is {value!r}; {rule}"


def test_whole_numbers_flags_multiples_and_choices() -> None:
    assert [whole(with_x(value), "x", least=1, most=3) for value in (1, 3)] == ["", ""]
    for value in (0, 4, 2.0, True, "2", None):
        assert whole(with_x(value), "x", least=1, most=3) == f"x is {value!r}; give a whole number from 1 to 3"
    assert whole(with_x(-1), "x", least=0) == "x is -1; give a whole number of at least 0"
    assert whole(with_x(10**6), "x", most=1000) == "x is 1000000; give a whole number up to 1000"
    assert at_least(with_x(1.5), "x", 1) == ""
    assert at_least(with_x(0), "x", 1) == "x is 0; give a number of at least 1"
    assert [flag(with_x(value), "x") for value in (True, False)] == ["", ""]
    assert flag(with_x(1), "x") == "x is 1; give true or false"
    assert [multiple(with_x(value), "x", 4) for value in (4, 8)] == ["", ""]
    assert [multiple(with_x(value), "x", 4) for value in (0, -4, 6)] == [
        f"x is {value}; give a multiple of 4" for value in (0, -4, 6)
    ]
    assert choice(with_x("a"), "x", ("a", "b")) == ""
    assert choice(with_x("c"), "x", ("a", "b")) == "x is 'c'; choose from a, b"


@pytest.mark.parametrize(
    ("start", "end", "good"), [(1e-4, 0.02, True), (0.1, 0.1, True), (0.2, 0.1, False), (0, 1, False)]
)
def test_the_variances_of_a_diffusion_rise_between_0_and_1(start: float, end: float, good: bool) -> None:
    assert (variance_range(SimpleNamespace(variance_start=start, variance_end=end)) == "") is good


def test_all_faults_are_raised_at_once_behind_their_place() -> None:
    refuse("", "", place="encoder.")
    with pytest.raises(InputError, match=r"^encoder\.x is 1; give 2; encoder\.y is 3; give 4$"):
        refuse("x is 1; give 2", "", "y is 3; give 4", place="encoder.")


def test_a_message_on_one_line() -> None:
    assert one_line(ValueError("two\n  lines\t here ")) == "two lines here"
    assert one_line("a long\ntext", 6) == "a long"
