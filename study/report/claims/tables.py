"""The claims as tables: each with its verdict, and every comparison behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from study.report.claims.judge import Contrast, Judged, counts
from study.report.comparison import printed
from study.report.statistics import Interval
from study.report.tables import Table, interval_text
from study.tracking.results import MissingError, Results

NOTES = (
    "The effect is of the comparison that the verdict hangs on, above 0 where it goes the claim's way. Test: t over"
    " training seeds and users (bootstrap), paired by both where they are the same, Satterthwaite's degrees of"
    " freedom; p doubled for both sides and corrected by Holm for the number of claims measured.",
    "Sweeps and ablations are compared on validation users, scores on test users. Where a trial has one seed, the"
    " variance over seeds is that of the cell's trials with several. In print: how many of the paper's own numbers go the"
    " claim's way.",
    "What sweeps and ablations start from, where that is the search's best, was chosen on these validation users, so the"
    " full model and the value that the search chose are favoured: a part of what they are ahead by is luck. Parts that"
    " start from the plan's base are free of that, and so are scores.",
)


def claims_table(results: Results, judged: Sequence[Judged]) -> Table:
    """Each claim with its verdict, and the comparison that the verdict hangs on."""
    if not judged:
        raise MissingError(f"claims: no paper of {results.labels.model} has any about these domains")
    digits = results.labels.task_type.digits + 1
    records, shown = [], []
    for each in judged:
        claim, at = each.claim, each.decisive
        record: dict[str, Any] = {
            "claim": claim.name,
            "verdict": each.verdict,
            "p": each.p,
            "place": claim.place,
            "part": claim.part,
        }
        record |= {"sentence": claim.sentence, **_record(at)}
        records.append(record | {"agreeing": each.agreeing, "measured": each.measured, "why": each.why})
        words = claim.name.replace("wo-", "w/o ").replace("-", " ")
        line: dict[str, str] = {"Verdict": f"**{each.verdict}**", "Claim": words, "Effect [95%]": "–"}
        line["What was compared, what it needs"] = each.why or "one comparison"
        line["Seeds"] = line["Users"] = "–"
        if at.found is not None:
            interval = interval_text(at.found.interval(), signed=True, digits=digits)
            line["Effect [95%]"] = f"{at.better} over {at.worse}, {_arrow(at.cell)}, {at.metric}: {interval}"
            line |= {"Seeds": str(at.found.seeds), "Users": f"{at.found.users:,}"}
        line["p"] = "–" if math.isnan(each.p) else f"{each.p:.2g}"
        line["Published"] = "–" if at.printed is None else f"{at.printed:+.4f}"
        line["In print"] = "–" if each.in_print is None else f"{each.in_print[0]} of {each.in_print[1]}"
        shown.append(line | {"Place": claim.place, "In words": claim.sentence})
    paper = results.labels.paper
    assert paper is not None, "its claims were judged"
    simulated = " — simulated data" if results.simulated else ""
    caption = f"Claims of {paper.title}: {counts(judged)}{simulated}"
    return Table("claims", caption, pd.DataFrame(records), pd.DataFrame(shown), NOTES)


def contrasts_table(results: Results, judged: Sequence[Judged]) -> Table:
    """Every comparison behind the claims."""
    records = [{"claim": each.claim.name, **_record(contrast)} for each in judged for contrast in each.contrasts]
    if not records:
        raise MissingError("comparisons of claims: there are none")
    frame, digits = pd.DataFrame(records), results.labels.task_type.digits + 1
    ends = zip(frame["effect"], frame["low"], frame["high"], strict=True)
    effects = [interval_text(Interval(*each, 0), signed=True, digits=digits) for each in ends]
    shown = frame[["claim", "cell", "metric", "better", "worse"]].assign(
        cell=frame["cell"].map(_arrow),
        effect=["–" if text == "+nan" or text == "nan" else text for text in effects],
        published=["–" if math.isnan(value) else f"{value:+.4f}" for value in frame["published"]],
        seeds=frame["seeds"], users=frame["users"], lacking=frame["lacking"],
    )  # fmt: skip
    shown = shown.rename(columns=lambda name: {"lacking": "Not measured"}.get(str(name), str(name).capitalize()))
    simulated = " — simulated data" if results.simulated else ""
    return Table("claims_comparisons", f"Comparisons behind the claims{simulated}", frame, shown, folded=True)


def _record(contrast: Contrast) -> dict[str, Any]:
    found = contrast.found
    interval = found.interval() if found is not None else printed(math.nan)
    record: dict[str, Any] = {
        "cell": contrast.cell,
        "metric": contrast.metric,
        "better": contrast.better,
        "worse": contrast.worse,
    }
    record |= {"effect": interval.value, "low": interval.low, "high": interval.high}
    record["published"] = math.nan if contrast.printed is None else contrast.printed
    if found is None:
        record |= {"seeds": 0, "users": 0, "p_better": math.nan, "p_worse": math.nan, "paired": False}
    else:
        record |= {"seeds": found.seeds, "users": found.users, "p_better": found.tail(), "p_worse": found.tail(-1)}
        record["paired"] = found.paired
    return record | {"lacking": "; ".join(contrast.lacking)}


def _arrow(cell: str) -> str:
    return cell.replace("->", " → ")
