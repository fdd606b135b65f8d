"""Verdicts of whole studies that are drawn, not trained: how often they are false, and what they depend on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from study.labels import labels_of
from study.papers.reader import Claim, Form, Optimum, Order
from study.report.claims import judge as judging
from study.report.claims import need as needing
from study.report.claims.contrasts import Contrast
from study.report.claims.judge import FAILS, HOLDS, UNDECIDED, Judged, judge
from study.report.claims.measured import Measured
from study.report.statistics import Effect, Sample, effect, power, seeds_needed
from study.tracking.results import Results

MUSIC = labels_of("music")
TASK = "books->movies"
USERS, SEEDS = 40, 3
DRAWS_BU = np.random.default_rng(7).multinomial(USERS, np.full(USERS, 1 / USERS), size=200) / USERS
Judge = Callable[[tuple[Claim, ...], Mapping[str, Sample]], dict[str, Judged]]


def claim(name: str, form: Form, at_least: Any = "all", part: str = "ablate") -> Claim:
    kept: dict[str, Any] = {"order": form.levels} if isinstance(form, Order) else {"optimum": form}
    return Claim(name=name, place="1", sentence="s", part=part, metrics=("rmse",), at_least=at_least, **kept)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Judges claims on one cell; samples are called `full` (an ablation) or `steps=2` (a point of a sweep)."""

    def of(made: tuple[Claim, ...], samples: Mapping[str, Sample]) -> dict[str, Judged]:
        monkeypatch.setattr(Measured, "_read", lambda self, arm: {"rmse": samples[arm.run["name"]]})
        rows: list[dict[str, Any]] = [
            {"run_id": name, "status": "FINISHED", "part": "sweep:steps" if "=" in name else "ablate",
             "cell": f"{TASK}@0.5", "task": TASK, "ratio": 0.5, "row": "music", "model": "music", "name": name}
            for name in samples
        ]  # fmt: skip
        assert MUSIC.paper is not None
        results = Results(
            labels=replace(MUSIC, paper=replace(MUSIC.paper, claims=made)), tracking_uri="", experiment="e",
            trials=pd.DataFrame(rows), domains=(), cells=(), pseudo=(), simulated=True, tags={}, duplicates=(),
            foreign=0, lost=(),
        )  # fmt: skip
        return {each.claim.name: each for each in judge(results)}

    return of


def errors(rng: np.random.Generator, worse: float = 0.0) -> np.ndarray:
    """[U, S] of a configuration: users of one level, for whom it does more or less well, and seeds that move all users."""
    level_U1 = np.random.default_rng(5).normal(3, 1, (USERS, 1))
    luck = rng.normal(0, 0.6, (USERS, 1)) + rng.normal(0, 0.1, (1, SEEDS)) + rng.normal(0, 0.1, (USERS, SEEDS))
    return np.asarray(level_U1 + worse + luck)


def sample(values_US: np.ndarray) -> Sample:
    drawn = DRAWS_BU @ values_US.mean(axis=1)
    return Sample(dict(enumerate(values_US.mean(axis=0))), drawn, tuple(map(str, range(USERS))))


def test_of_studies_without_an_effect_at_most_five_in_a_hundred_have_a_false_verdict(
    judged: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All configurations are equal but `far`: "all", "most" and "some" are each one equal pair away from a verdict."""
    made = (
        claim("one", Order((("full",), ("b",)))),
        claim("all", Order((("full",), ("c", "far")))),
        claim("most", Order((("c",), ("full", "b", "far"))), "most"),
        claim("some", Order((("b",), ("full", "c"))), "some"),
        claim("peak", Optimum(5, 20), part="sweep:steps"),
    )
    monkeypatch.setattr(judging, "need", lambda *_: "")  # it decides nothing
    rng, studies = np.random.default_rng(0), 400
    names = ("full", "b", "c", *(f"steps={value}" for value in (2, 5, 10, 20, 50)))
    spoilt = 0
    for _ in range(studies):
        samples = {name: sample(errors(rng)) for name in names}
        found = judged(made, {**samples, "far": sample(errors(rng, worse=2.0))})
        spoilt += any(each.verdict != UNDECIDED for each in found.values())
    assert 0.01 <= spoilt / studies <= 0.05  # 0.05 is stated; what users and seeds share is counted twice


def test_what_the_search_chose_on_the_same_users_is_favoured() -> None:
    """The bias that the page's notes and `study check` speak of: 12 equal candidates, the best of seed 0 is `full`."""
    rng, seen = np.random.default_rng(1), {"best": 0, "base": 0}
    for _ in range(300):
        candidates, ablated = [errors(rng) for _ in range(12)], sample(errors(rng))
        start = {"best": min(candidates, key=lambda values: values[:, 0].mean()), "base": candidates[0]}
        for name, full in start.items():
            seen[name] += effect(sample(full), ablated, higher=False).tail() < 0.025
    assert seen["base"] <= 0.025 * 300
    assert seen["best"] >= 0.1 * 300


def apart(**by: float) -> dict[str, Sample]:
    """Configurations that are worse by so much; `a` and `e` differ from the others by the same noise."""
    rng = np.random.default_rng(2)
    base, other = errors(rng), errors(rng)
    return {
        name.replace("_", "="): sample(base + worse + (0.0 if name in "ae" else 0.02) * (other - base))
        for name, worse in by.items()
    }


@pytest.mark.parametrize(
    ("at_least", "order", "verdict", "depends_on"),
    [
        ("all", (("a",), ("b", "c", "d")), HOLDS, ("a", "b")),
        ("most", (("a",), ("a", "b", "c", "d")), HOLDS, ("a", "b")),  # three of four; `a` is not better than itself
        ("some", (("a",), ("b", "c", "d")), HOLDS, ("a", "d")),
        ("all", (("e",), ("b", "c", "d")), FAILS, ("e", "b")),
        ("most", (("e",), ("e", "b", "c", "d")), FAILS, ("e", "c")),  # not three of four: two are false
        ("some", (("e",), ("b", "c", "d")), FAILS, ("e", "d")),
    ],
)
def test_the_effect_shown_is_the_one_that_the_verdict_depends_on(
    judged: Judge, at_least: str, order: tuple[tuple[str, ...], ...], verdict: str, depends_on: tuple[str, str]
) -> None:
    found = judged((claim("it", Order(order), at_least),), apart(a=0.0, b=0.1, c=0.2, d=0.3, e=0.4))["it"]
    at = found.decisive
    assert (found.verdict, (at.better, at.worse)) == (verdict, depends_on)
    assert at.effect is not None
    interval = at.effect.interval()
    assert interval.low > 0 if verdict == HOLDS else interval.high < 0


def test_what_is_needed_is_what_the_test_of_the_whole_claim_needs(judged: Judge) -> None:
    """Seeds are those at Holm's level by what a contrast's p value is multiplied with in its claim."""
    rng = np.random.default_rng(4)
    base = errors(rng)
    worse = {"a": 0.0, "b": 0.3, "c": 0.3, "d": 0.3, "steps=2": 0.3, "steps=5": 0.0, "steps=10": 0.0, "steps=20": 0.0}
    arms = {name: sample(base + by + rng.normal(0, 0.1, (1, SEEDS))) for name, by in {**worse, "steps=50": 0.3}.items()}
    made = {
        claim("one", Order((("a",), ("b",)))): 1,
        claim("most", Order((("a",), ("b", "c", "d"))), "most"): 2,  # of three the second smallest
        claim("some", Order((("a",), ("b", "c", "d"))), "some"): 3,
        claim("peak", Optimum(5, 20), part="sweep:steps"): 3,  # one of three values
        claim("wrong", Order((("b", "c", "d"), ("a",)))): 3,  # against "all three": one of three
    }
    found = judged(tuple(made), arms)
    for each, factor in made.items():
        at = found[each.name].decisive.effect
        assert at is not None
        seeds = seeds_needed(at, abs(at.value), 0.05 / len(made) / factor)
        against = ", against the claim" if each.name == "wrong" else ""
        text = f"needs about {seeds} seeds to see the measured difference ({abs(at.value):.4f}{against}); "
        assert f"{found[each.name].why}; ".startswith(text)


def test_a_claim_that_waits_for_other_runs_needs_those_and_nothing_else(judged: Judge) -> None:
    made = (claim("two", Order((("a",), ("b", "z")))), claim("three", Order((("a",), ("b", "c", "z")))))
    found = judged(made, apart(a=0.0, b=0.1, c=0.2))
    assert found["two"].why == "no finished run of z in ablate"
    assert found["three"].why == "2 of 2 comparisons go its way; no finished run of z in ablate"
    assert {each.verdict for each in found.values()} == {UNDECIDED}


def need(
    value: float, *, printed: float | None = None, seed_variance: float = 4e-6, user_variance: float = 4e-6
) -> str:
    """Of three seeds and 100 users, at the level of one claim of one comparison."""
    found = Effect(
        value=value, seeds=3, seed_variance=seed_variance, seed_freedom=2, users=100, user_variance=user_variance
    )
    contrast = Contrast(cell="c", metric="rmse", better="a", worse="b", effect=found, printed=printed)
    return needing.need(contrast, found, (0.05, 0.05))


def test_the_words_on_what_is_needed_say_what_was_tested() -> None:
    assert need(0.0).startswith("no difference at all was measured")
    assert need(-0.000024).startswith(
        "no number of seeds shows the measured difference (0.000024, against the claim) on"
    )
    assert need(-0.003, printed=0.05).endswith("(0.0500) would have been seen (power 100%); what there is, is smaller")
    assert re.search(r"\(0\.0120\) .* \(power 9\d%\); it is still within the interval$", need(0.0065, printed=0.0120))
    assert need(0.0812, printed=0.0139) == "", "what was seen needs nothing"
    assert need(-0.0812) == ""
    match = re.search(r"needs about ([\d,]+) users and ([\d,]+) seeds$", need(-0.002, user_variance=4e-5))
    assert match is not None
    users, seeds = (int(number.replace(",", "")) for number in match.groups())
    found = Effect(value=-0.002, seeds=3, seed_variance=4e-6, seed_freedom=2, users=100, user_variance=4e-5)
    assert power(found.at(seeds, users), 0.002, 0.05) >= 0.8
    assert power(found.at(3, 10**7), 0.002, 0.05) < 0.2, "so it cannot be said without the seeds"
    assert need(0.01, seed_variance=1e-8, user_variance=4e-5).endswith(" users")
