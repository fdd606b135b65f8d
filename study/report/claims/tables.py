"""The claims as tables: those that were tested, those that were not, and every comparison behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from study.report.claims.contrasts import Component, Contrast
from study.report.claims.judge import CONTRADICTED, NOT_TESTED, Judged, behind_best, counts
from study.report.statistics import Effect, Interval
from study.report.table import NONE, Table, arrow, caption, interval_text
from study.tracking.results import MissingError, Results

UNTESTED = (NOT_TESTED, CONTRADICTED)
NOTES = (
    "Effect: of the comparison that the verdict depends on, the mean of the cells that the sentence speaks of, above 0"
    " where it goes the claim's way, with its 95% interval. One-sided t tests on users and training seeds,"
    " crossed and paired, against 0 and against the margin; p is corrected by Holm over all tested claims of the page; the"
    " interval is not.",
    "Margin: the smallest difference that would still make the sentence true, stated before anything ran. It is half of the"
    " printed difference, as a share of the full row; where only a figure speaks, half of the paper's mean improvement"
    " over the best other system in that metric. Small telescopes (Simonsohn 2015): what the paper's own test users would"
    " have seen with a power of a third.",
    "Full row: the better side of the comparison as measured here, and as printed. A verdict is about the preset that it"
    " names: `paper` is the configuration as printed, `ours` the one that ships.",
    "What a sweep or ablation starts from, where that is the search's best, was chosen on validation users: compared on"
    " those, the full model and the value that the search chose are favoured.",
)


def claims_table(results: Results, judged: Sequence[Judged]) -> Table:
    """Return each tested claim with its verdict; the CSV holds those that were not tested too."""
    if not judged:
        raise MissingError(f"claims: no paper of {results.labels.subject.name} has any about these domains")
    digits = results.labels.task_type.digits + 1
    paper = results.labels.paper
    assert paper is not None, "its claims were judged"
    tested = [one for one in judged if one.verdict not in UNTESTED]
    columns = ["Verdict", "Claim", "Effect [95%]", "Margin", "Full row", "Users, seeds", "Basis"]
    cells = pd.DataFrame([_line(one, digits) for one in tested], columns=columns)
    frame = pd.DataFrame([_judged_record(one) for one in judged])
    title = caption(f"Claims of {paper.title}: {counts(judged)}", results)
    return Table("claims", title, frame, cells, NOTES if tested else ())


def untested_table(results: Results, judged: Sequence[Judged]) -> Table:
    """Return the claims that were not tested, and why. Raises MissingError where there are none."""
    left = [one for one in judged if one.verdict in UNTESTED]
    if not left:
        raise MissingError("untested claims: there are none")
    lines = []
    for one in left:
        agree = "" if one.in_print is None else f"{one.in_print[0]} of {one.in_print[1]} printed numbers agree"
        lines.append(
            {
                "Verdict": f"{one.verdict}\n{one.preset}",
                "Claim": _sentence(one),
                "In print": agree or NONE,
                "Why": one.why,
            }
        )
    number = {verdict: sum(one.verdict == verdict for one in left) for verdict in UNTESTED}
    title = f"Claims without a test: {', '.join(f'{count} {verdict}' for verdict, count in number.items() if count)}"
    frame = pd.DataFrame([_judged_record(one) for one in left])
    return Table("claims_untested", caption(title, results), frame, pd.DataFrame(lines), folded=True)


def contrasts_table(results: Results, judged: Sequence[Judged]) -> Table:
    """Return every comparison behind the claims, cell by cell."""
    records = [
        {"claim": one.claim.name, "preset": one.preset, **_record(contrast)}
        for one in judged
        for contrast in one.contrasts
    ]
    if not records:
        raise MissingError("comparisons of claims: there are none")
    frame, digits = pd.DataFrame(records), results.labels.task_type.digits + 1
    ends = zip(frame["effect"], frame["low"], frame["high"], strict=True)
    effects = [interval_text(Interval(*three, 0), signed=True, digits=digits) for three in ends]
    cells = frame[["claim", "preset", "cell", "metric", "better", "worse"]].assign(
        cell=frame["cell"].map(arrow),
        effect=[NONE if text in ("+nan", "nan") else text for text in effects],
        published=[NONE if math.isnan(value) else f"{value:+.4f}" for value in frame["published"]],
        seeds=frame["seeds"], users=frame["users"].astype(str) + " " + frame["split"], lacking=frame["lacking"],
    )  # fmt: skip
    cells = cells.rename(columns=lambda name: {"lacking": "Not measured"}.get(str(name), str(name).capitalize()))
    title = caption("Comparisons behind the claims", results)
    return Table("claims_comparisons", title, frame, cells, folded=True)


def effect_text(effect: Effect, digits: int) -> str:
    """Return `+0.0139 [+0.0021, +0.0257]`."""
    return interval_text(effect.interval(), signed=True, digits=digits)


def split_of(component: Component) -> str:
    """Return the users that a component was compared on: `test`, `validation` or both."""
    return " and ".join(dict.fromkeys(contrast.split for contrast in component.measured))


def _line(one: Judged, digits: int) -> dict[str, str]:
    at, margin = one.component, one.margin
    effect = at.effect
    assert effect is not None, "a tested claim has one"
    value, _, ends = effect_text(effect, digits).partition(" ")
    shown = NONE
    if margin is not None:
        telescopes = "" if margin.telescopes is None else f"\nsmall telescopes {margin.telescopes:.{digits}f}"
        shown = f"{margin.value:.{digits}f}\n{margin.share:.1%}, {margin.rule}{telescopes}"
    levels = [contrast.level for contrast in at.measured if contrast.level is not None]
    printed = [contrast.printed_level for contrast in at.measured if contrast.printed_level is not None]
    full = f"{sum(levels) / len(levels):.{digits}f}"
    full += f"\nprinted {sum(printed) / len(printed):.{digits}f}" if printed else ""
    return {
        "Verdict": f"**{one.verdict}**\n{one.preset}, p {one.p:.2g}",
        "Claim": _sentence(one),
        "Effect [95%]": f"{value}\n{ends}\n{at.better} over {at.worse}, {at.metric}",
        "Margin": shown,
        "Full row": full,
        "Users, seeds": f"{effect.users:,} {split_of(at)}\n{effect.seeds} seed{'s' if effect.seeds > 1 else ''}",
        "Basis": _basis(one, digits),
    }


def _basis(one: Judged, digits: int) -> str:
    """Return in words what the verdict rests on; of an optimum how far behind the best it may be."""
    behind = behind_best(one.component)
    best = []
    if behind is not None and math.isfinite(behind):
        best = [f"{one.component.better} is at most {behind:.{digits}f} behind the best value (95%)"]
    cells = len(one.component.measured)
    return "; ".join([*filter(None, [one.why]), *best]) or f"one comparison in {cells} cell{'s' if cells > 1 else ''}"


def _sentence(one: Judged) -> str:
    words = one.claim.name.replace("wo-", "w/o ").replace("-", " ")
    return f"{words}\n{one.claim.sentence}\n{one.claim.place}"


def _judged_record(one: Judged) -> dict[str, Any]:
    """Return all numbers of a claim, for the CSV."""
    at, margin, claim = one.component, one.margin, one.claim
    record: dict[str, Any] = {
        "claim": claim.name, "row": one.row, "preset": one.preset, "verdict": one.verdict, "p": one.p,
        "place": claim.place, "part": claim.part, "sentence": claim.sentence, "original": claim.original,
        "metric": at.metric, "better": at.better, "worse": at.worse, "cells": len(at.measured), "split": split_of(at),
    }  # fmt: skip
    record |= _effect_record(at.effect)
    record |= {
        "margin": margin.value if margin else math.nan, "margin_share": margin.share if margin else math.nan,
        "margin_rule": margin.rule if margin else "",
        "small_telescopes": margin.telescopes if margin and margin.telescopes is not None else math.nan,
        "p_margin": at.effect.tail(-1, margin.value) if margin and at.effect else math.nan,
    }  # fmt: skip
    behind = behind_best(at)
    record |= {"behind_best": math.nan if behind is None else behind}
    return record | {"agreeing": one.agreeing, "measured": one.measured, "why": one.why}


def _record(contrast: Contrast) -> dict[str, Any]:
    record: dict[str, Any] = {
        "cell": contrast.cell, "metric": contrast.metric, "better": contrast.better, "worse": contrast.worse,
        "split": contrast.split,
    }  # fmt: skip
    record |= _effect_record(contrast.effect)
    record["published"] = math.nan if contrast.printed is None else contrast.printed
    return record | {"lacking": "; ".join(contrast.lacking)}


def _effect_record(effect: Effect | None) -> dict[str, Any]:
    if effect is None:
        names = ("effect", "low", "high", "p_better", "p_worse")
        return {**dict.fromkeys(names, math.nan), "seeds": 0, "users": 0, "paired": False}
    interval = effect.interval()
    return {
        "effect": interval.value, "low": interval.low, "high": interval.high, "p_better": effect.tail(),
        "p_worse": effect.tail(-1), "seeds": effect.seeds, "users": effect.users, "paired": effect.paired,
    }  # fmt: skip
