"""The claims as tables: each with its verdict, and every comparison behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from study.report.claims.contrasts import Contrast
from study.report.claims.judge import Judged, counts
from study.report.statistics import Interval
from study.report.table import NONE, Table, arrow, caption, interval_text
from study.tracking.results import MissingError, Results

NOTES = (
    "The effect is of the comparison that the verdict depends on, above 0 where it goes the claim's way. Test: t over"
    " training seeds and users (bootstrap), paired by both where they are the same, Satterthwaite's degrees of"
    " freedom; p doubled for both sides and corrected by Holm for the number of claims that were measured. Not measured:"
    " systems or configurations that the claim names were not run, so that nothing could decide it.",
    "Sweeps and ablations are compared on validation users, scores on test users. Where a trial has one seed, the"
    " variance over seeds is that of its rows' trials in the cell that have several. Published: the printed difference of"
    " the comparison, and how many of the paper's own numbers agree with the claim.",
    "What sweeps and ablations start from, where that is the search's best, was chosen on these validation users, so the"
    " full model and the value that the search chose are favoured: a part of what they are ahead by is luck. Parts that"
    " start from the plan's base are free of that, and so are scores.",
)


def claims_table(results: Results, judged: Sequence[Judged]) -> Table:
    """Return each claim with its verdict, and the comparison that the verdict depends on."""
    if not judged:
        raise MissingError(f"claims: no paper of {results.labels.subject.name} has any about these domains")
    digits = results.labels.task_type.digits + 1
    records, shown = [], []
    for one in judged:
        claim, at = one.claim, one.decisive
        record: dict[str, Any] = {
            "claim": claim.name,
            "verdict": one.verdict,
            "p": one.p,
            "place": claim.place,
            "part": claim.part,
        }
        record |= {"sentence": claim.sentence, "original": claim.original, **_record(at)}
        records.append(record | {"agreeing": one.agreeing, "measured": one.measured, "why": one.why})
        words = claim.name.replace("wo-", "w/o ").replace("-", " ")
        line: dict[str, str] = {"Verdict": f"**{one.verdict}**", "Claim": f"{words}\n{claim.sentence}\n{claim.place}"}
        line["Effect [95%]"] = line["Seeds, users"] = NONE
        if at.effect is not None:
            value, _, ends = interval_text(at.effect.interval(), signed=True, digits=digits).partition(" ")
            what = f"{at.better} over {at.worse}\n{arrow(at.cell)}, {at.metric}"
            line["Effect [95%]"] = f"{value}\n{ends}\n{what}".replace("\n\n", "\n")
            line["Seeds, users"] = f"{at.effect.seeds}\n{at.effect.users:,} users"
        line["p"] = NONE if math.isnan(one.p) else f"{one.p:.2g}"
        agree = "" if one.in_print is None else f"\n{one.in_print[0]} of {one.in_print[1]} agree"
        line["Published"] = (NONE if at.printed is None else f"{at.printed:+.4f}") + agree
        line["What was compared, what it needs"] = one.why or "one comparison"
        shown.append(line)
    paper = results.labels.paper
    assert paper is not None, "its claims were judged"
    title = caption(f"Claims of {paper.title}: {counts(judged)}", results)
    return Table("claims", title, pd.DataFrame(records), pd.DataFrame(shown), NOTES)


def contrasts_table(results: Results, judged: Sequence[Judged]) -> Table:
    """Return every comparison behind the claims."""
    records = [{"claim": one.claim.name, **_record(contrast)} for one in judged for contrast in one.contrasts]
    if not records:
        raise MissingError("comparisons of claims: there are none")
    frame, digits = pd.DataFrame(records), results.labels.task_type.digits + 1
    ends = zip(frame["effect"], frame["low"], frame["high"], strict=True)
    effects = [interval_text(Interval(*three, 0), signed=True, digits=digits) for three in ends]
    shown = frame[["claim", "cell", "metric", "better", "worse"]].assign(
        cell=frame["cell"].map(arrow),
        effect=[NONE if text == "+nan" or text == "nan" else text for text in effects],
        published=[NONE if math.isnan(value) else f"{value:+.4f}" for value in frame["published"]],
        seeds=frame["seeds"], users=frame["users"], lacking=frame["lacking"],
    )  # fmt: skip
    shown = shown.rename(columns=lambda name: {"lacking": "Not measured"}.get(str(name), str(name).capitalize()))
    title = caption("Comparisons behind the claims", results)
    return Table("claims_comparisons", title, frame, shown, folded=True)


def _record(contrast: Contrast) -> dict[str, Any]:
    effect = contrast.effect
    interval = effect.interval() if effect is not None else Interval(math.nan, math.nan, math.nan, 0)
    record: dict[str, Any] = {
        "cell": contrast.cell,
        "metric": contrast.metric,
        "better": contrast.better,
        "worse": contrast.worse,
    }
    record |= {"effect": interval.value, "low": interval.low, "high": interval.high}
    record["published"] = math.nan if contrast.printed is None else contrast.printed
    if effect is None:
        record |= {"seeds": 0, "users": 0, "p_better": math.nan, "p_worse": math.nan, "paired": False}
    else:
        record |= {"seeds": effect.seeds, "users": effect.users, "p_better": effect.tail(), "p_worse": effect.tail(-1)}
        record["paired"] = effect.paired
    return record | {"lacking": "; ".join(contrast.lacking)}
