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
from study.papers.reader import Claim, Form, Optimum, Order, Unimodal
from study.report.claims import judge as judging
from study.report.claims.judge import (
    HOLDS,
    NOT_TESTED,
    NOTHING,
    REVERSED,
    SMALLER,
    Judged,
    Tails,
    judge,
    verdict_of,
)  # fmt: skip
from study.report.claims.measured import Measured
from study.report.claims.need import need
from study.report.statistics import Effect, Sample, effect, holm, pool, power
from study.tracking.results import Results

MUSIC = labels_of("music")
TASK = "books->movies"
USERS, SEEDS, LEVEL = 40, 3, 3.0
MARGIN = 0.1  # of the level: about twice the standard error of a difference
HOLD, FAIL = {HOLDS, SMALLER}, {NOTHING, REVERSED}
Judge = Callable[[tuple[Claim, ...], Mapping[str, Sample]], dict[str, Judged]]


def claim(name: str, form: Form, at_least: Any = "all", part: str = "ablate") -> Claim:
    kept: dict[str, Any] = {"order": form.levels} if isinstance(form, Order) else {"optimum": form}
    kept = {"unimodal": True} if isinstance(form, Unimodal) else kept
    return Claim(
        name=name, place="1", sentence="s", part=part, metrics=("rmse",), margin=MARGIN, at_least=at_least, **kept
    )


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
    level_U1 = np.random.default_rng(5).normal(LEVEL, 1, (USERS, 1))
    luck = rng.normal(0, 0.6, (USERS, 1)) + rng.normal(0, 0.1, (1, SEEDS)) + rng.normal(0, 0.1, (USERS, SEEDS))
    return np.asarray(level_U1 + worse + luck)


def sample(values_US: np.ndarray) -> Sample:
    return Sample(values_US, tuple(range(SEEDS)), tuple(map(str, range(USERS))))


STEPS = tuple(f"steps={value}" for value in (2, 5, 10, 20, 50))
PAGE = (
    claim("one", Order((("full",), ("b",)))),
    claim("all", Order((("full",), ("c", "far")))),
    claim("most", Order((("full",), ("b", "c"))), "most"),
    claim("some", Order((("full",), ("b", "c"))), "some"),
    claim("peak", Optimum(5, 20), part="sweep:steps"),
    claim("falls and rises", Unimodal(), part="sweep:steps"),
)


def drawn_pages(judged: Judge, size: float, pages: int) -> list[list[str]]:
    """The verdicts of pages whose claims all have this true effect; "all" hangs on one pair, as `far` is far behind."""
    rng, behind = np.random.default_rng(0), {"b", "c", "steps=2", "steps=50"}
    verdicts = []
    for _ in range(pages):
        samples = {n: sample(errors(rng, size if n in behind else 0.0)) for n in ("full", "b", "c", *STEPS)}
        found = judged(PAGE, {**samples, "far": sample(errors(rng, worse=2.0))})
        verdicts.append([each.verdict for each in found.values()])
    return verdicts


def test_of_pages_without_an_effect_at_most_five_in_a_hundred_have_a_claim_that_holds(
    judged: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "need", lambda *_: "")  # it decides nothing
    pages = drawn_pages(judged, 0.0, 250)
    assert 0.01 <= np.mean([bool(HOLD & set(page)) for page in pages]) <= 0.05
    assert np.mean([REVERSED in page for page in pages]) <= 0.05
    assert np.mean([sum(verdict == NOTHING for verdict in page) for page in pages]) > 1, "a zero can be refuted"


def test_of_pages_with_effects_of_the_margin_at_most_five_in_a_hundred_have_a_claim_that_does_not_hold(
    judged: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "need", lambda *_: "")
    pages = drawn_pages(judged, 1.02 * MARGIN * LEVEL, 250)  # the margin is a share of a level that is measured too
    assert 0.005 <= np.mean([bool(FAIL & set(page)) for page in pages]) <= 0.05


SWEEP, ABLATION, HITS = (0.0055, 0.004), (0.0085, 0.006), (1.9 * 0.0085, 1.9 * 0.006)  # of users, 300; over seeds
FOOD, KITCHEN = 300, 637
CLAIMS_4_3 = (  # of fidelity.md: users of each cell, errors, margin, printed effect, components
    ((FOOD,), HITS, 0.095, 0.190, 1),  # w/o overlap diffusion
    ((FOOD, KITCHEN), ABLATION, 0.0233, 0.0466, 1),  # w/o alignment
    ((FOOD, KITCHEN), ABLATION, 0.0167, 0.0333, 1),  # w/o diffusion
    *(((FOOD, KITCHEN), SWEEP, 0.0115, 0.0229, count) for count in (1, 2, 1, 2)),  # n_K and T: optimum, both ends
    ((KITCHEN,), SWEEP, 0.0120, 0.0240, 1),  # lambda
    ((FOOD,), SWEEP, 0.0110, 0.0219, 1),
    ((KITCHEN,), ABLATION, 0.0154, 0.0307, 1),  # w/o cyclic
    ((FOOD, KITCHEN), ABLATION, 0.0107, 0.0213, 1),  # w/o pseudo diffusion
    *(((FOOD, KITCHEN), ABLATION, 0.0115, 0.0229, 1) for _ in range(4)),  # guidance, x_0 against noise
    ((FOOD, KITCHEN), ABLATION, 0.0115, -0.1200, 1),  # w/o MoE falls most: false as printed
)


def drawn_verdicts(rng: np.random.Generator, truth: float) -> list[str]:
    """The verdicts of one page of LGCD's 16 claims on test users, three seeds, at this share of the printed effects."""
    tails = []
    for cells, (by_user, by_seed), margin, printed, count in CLAIMS_4_3:
        parts = []
        for _ in range(count):
            effects = []
            for users in cells:
                error, seeds = by_user * np.sqrt(300 / users), rng.normal(0, by_seed, SEEDS)
                effects.append(
                    Effect(
                        value=truth * printed + rng.normal(0, error) + seeds.mean(), seeds=SEEDS, seed_freedom=2.0,
                        seed_variance=seeds.var(ddof=1) / SEEDS, users=users, user_variance=error**2,
                    )
                )  # fmt: skip
            parts.append(pool([(1 / len(cells), each) for each in effects], [str(users) for users in cells]))
        smaller = min(1.0, count * min(each.tail(-1, margin) for each in parts))
        below = min(1.0, count * min(each.tail(-1) for each in parts))
        tails.append((max(each.tail() for each in parts), smaller, smaller, below))
    corrected = zip(*(holm(kind) for kind in zip(*tails, strict=True)), strict=True)
    return [verdict_of(Tails(*each)) for each in corrected]


@pytest.mark.parametrize(
    ("truth", "holds", "fails", "room"), [(1.0, 14.8, 1.0, 0.15), (0.5, 8.1, 1.1, 1.3), (0.0, 0.0, 10.3, 2.0)]
)
def test_the_power_of_a_page_is_that_of_the_design(truth: float, holds: float, fails: float, room: float) -> None:
    """Claims decided of 16 by fidelity.md 4.3, proposed rule, test users, three seeds.

    At the printed effects it is met. At half of them and at none it falls short, by 1 and 1.6 claims: there the two kinds
    of error have a correction each. One correction of the smaller p value decides no more (8.8 at none), and has a false
    "holds" in 8% of pages without an effect.
    """
    rng = np.random.default_rng(1)
    pages = [drawn_verdicts(rng, truth) for _ in range(300)]
    assert np.mean([sum(verdict in HOLD for verdict in page) for page in pages]) == pytest.approx(holds, abs=room)
    assert np.mean([sum(verdict in FAIL for verdict in page) for page in pages]) == pytest.approx(fails, abs=room)
    if truth == 0:
        assert np.mean([any(verdict in HOLD for verdict in page) for page in pages]) <= 0.05


def test_what_the_search_chose_on_the_same_users_is_favoured() -> None:
    """The bias that the page's notes and `study check` speak of: 12 equal candidates, the best of seed 0 is `full`."""
    rng, seen = np.random.default_rng(1), {"best": 0, "base": 0}
    for _ in range(300):
        candidates, ablated = [errors(rng) for _ in range(12)], sample(errors(rng))
        start = {"best": min(candidates, key=lambda values: values[:, 0].mean()), "base": candidates[0]}
        for name, full in start.items():
            seen[name] += effect(sample(full), ablated, higher=False).tail() < 0.025
    assert seen["base"] <= 0.04 * 300
    assert seen["best"] >= 0.1 * 300


def apart(**by: float) -> dict[str, Sample]:
    """Configurations that are worse by so much, all but for little noise."""
    rng = np.random.default_rng(2)
    base = errors(rng)
    return {
        name.replace("_", "="): sample(base + worse + rng.normal(0, 0.02, (USERS, 1)) + rng.normal(0, 0.01, (1, SEEDS)))
        for name, worse in by.items()
    }


@pytest.mark.parametrize(
    ("at_least", "order", "verdict", "depends_on"),
    [
        ("all", (("a",), ("b", "c", "d")), SMALLER, ("a", "b")),  # b is 0.1 behind, the margin 0.3
        ("all", (("a",), ("d",)), HOLDS, ("a", "d")),
        ("most", (("a",), ("b", "far")), HOLDS, ("a", "the mean of b, far")),
        ("some", (("d",), ("b", "far")), HOLDS, ("d", "far")),
        ("all", (("d",), ("b", "far")), REVERSED, ("d", "b")),
        ("all", (("a",), ("same", "far")), NOTHING, ("a", "same")),
        ("some", (("d",), ("b", "c")), REVERSED, ("d", "b")),
        ("all", (("a",), ("far", "z")), NOT_TESTED, ("a", "far")),  # z was not run
        ("all", (("d",), ("b", "z")), REVERSED, ("d", "b")),  # which does not matter here
        ("all", (("a",), ("b", "z")), NOT_TESTED, ("a", "b")),  # smaller, but above 0: refutes nothing
    ],
)
def test_a_verdict_shows_the_component_that_it_depends_on(
    judged: Judge, at_least: str, order: tuple[tuple[str, ...], ...], verdict: str, depends_on: tuple[str, str]
) -> None:
    arms = apart(a=0.0, same=0.0, b=0.1, c=0.2, d=0.5, far=2.0)
    found = judged((claim("it", Order(order), at_least),), arms)["it"]
    at = found.component
    assert (found.verdict, (at.better, at.worse)) == (verdict, depends_on)
    assert found.margin is not None
    assert found.margin.value == pytest.approx(MARGIN * arms[at.better].value)


def test_an_optimum_is_one_contrast_and_a_fall_and_rise_are_two(judged: Judge) -> None:
    arms = apart(steps_2=0.5, steps_5=0.1, steps_10=0.0, steps_20=0.1, steps_50=0.9)
    made = (claim("peak", Optimum(10, 10), part="sweep:steps"), claim("both", Unimodal(), part="sweep:steps"))
    found = judged(made, arms)
    (peak,) = found["peak"].components
    assert (peak.better, peak.worse) == ("10", "the other values")
    assert peak.effect is not None
    others = np.mean([arms[f"steps={value}"].value for value in (2, 5, 20, 50)])
    assert peak.effect.value == pytest.approx(others - arms["steps=10"].value)
    assert [rival.worse for rival in peak.rivals] == ["2", "5", "20", "50"]
    behind = judging.behind_best(peak)
    assert behind == 0.0, "nothing else may be the best"
    wrong = judged((claim("peak", Optimum(5, 5), part="sweep:steps"),), arms)["peak"]
    assert wrong.verdict == HOLDS, "it is ahead of the mean of the others, although"
    assert judging.behind_best(wrong.component) == pytest.approx(0.1, abs=0.05), "it is this far behind 10 at most"
    low, high = found["both"].components
    assert [(low.better, low.worse), (high.better, high.worse)] == [
        ("10", "2"), ("10", "50"),
    ]  # fmt: skip
    assert high.effect is not None
    assert high.effect.value == pytest.approx(arms["steps=50"].value - arms["steps=10"].value)
    (low, _) = judged(made[1:], arms)["both"].components
    assert low.better == "the mean of 5, 10, 20", "where no claim names an optimum"
    assert found["both"].verdict == HOLDS


def needed(value: float, margin: float | None = 0.02, seed_variance: float = 4e-6, user_variance: float = 4e-6) -> str:
    """Of three seeds and 100 users, at the level of one claim of one component."""
    found = Effect(
        value=value, seeds=3, seed_variance=seed_variance, seed_freedom=2, users=100, user_variance=user_variance
    )
    return need(found, margin, 0.05)


def test_the_words_on_what_is_needed_say_what_would_be_shown() -> None:
    assert re.fullmatch(r"about \d+ seeds would show it above 0", needed(0.011, seed_variance=4e-5))
    assert re.fullmatch(r"about \d+ seeds would show it below the margin", needed(0.009, seed_variance=4e-5))
    assert needed(-0.001, margin=None).startswith("the paper states no size")
    alone = needed(0.0011, 0.002, 4e-7, 4e-5)
    match = re.fullmatch(r"about ([\d,]+) users(?: and ([\d,]+) seeds)? would show it above 0", alone)
    assert match is not None
    users, seeds = (int((number or "3").replace(",", "")) for number in match.groups())
    found = Effect(value=0.0011, seeds=3, seed_variance=4e-7, seed_freedom=2, users=100, user_variance=4e-5)
    assert power(found.at(seeds, users), 0.0011, 0.05) >= 0.8
