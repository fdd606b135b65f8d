"""The report as one HTML page: no script, no network, light and dark, wide tables and figures scroll by themselves."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

from study.report.claims.judge import HOLDS, NOTHING, REVERSED, SMALLER, UNDECIDED
from study.report.comparison_table import COMPARISON
from study.report.drawing import DPI
from study.report.figures import Figure, Sensitivity
from study.report.findings import Finding
from study.report.table import Table
from study.tracking.results import Results

_POINTS = 150  # rows of a figure's points that the page shows; the CSV holds all
_CSS = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #4b5563; --page: #fff; --line: #d1d5db; --code: #f3f4f6;
  --warn: #fef3c7; --warn-ink: #78350f; --link: #1d4ed8; --good: #065f46; --bad: #9f1239; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #b6bdc8; --page: #111418; --line: #3b424d;
  --code: #1f252d; --warn: #422006; --warn-ink: #fde68a; --link: #93c5fd; --good: #6ee7b7; --bad: #fda4af; }
  figure img { filter: invert(0.93) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 78rem; margin: 0 auto;
  padding: 1rem clamp(.75rem, 3vw, 1.5rem) 4rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line);
  padding-bottom: .25rem; } h3 { margin: 2.2rem 0 .4rem; font-size: 1.05rem; }
a { color: var(--link); } nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }
nav a { display: inline-block; padding: .25rem 0; }
.skip { position: absolute; left: -999rem; } .skip:focus { position: static; }
.banner { background: var(--warn); color: var(--warn-ink); border-left: 4px solid #b45309; padding: .6rem 1rem; }
dl { display: grid; grid-template-columns: minmax(8rem, 15rem) 1fr; gap: .3rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
figure { margin: 1rem 0 2rem; } figure img { display: block; min-width: 36rem; max-width: 100%; height: auto; }
figcaption, .note { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; border-radius: 4px; } .scroll:focus-visible { outline: 3px solid var(--link); }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.4; margin: .4rem 0 .5rem; }
th, td { padding: .3rem .5rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; } td.text { white-space: normal; max-width: 13rem; }
td.long { white-space: normal; min-width: 12rem; }
tr.block th { padding-top: .9rem; } .below { display: block; color: var(--soft); font-size: .85em; }
code { background: var(--code); padding: .1rem .3rem; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .25rem 0; }
.holds { color: var(--good); } .does-not-hold { color: var(--bad); }
"""
_MARKS = {HOLDS: "✓", SMALLER: "✓", NOTHING: "✗", REVERSED: "✗", UNDECIDED: "?"}  # for who does not see colours
_NUMBER = re.compile(r"[-+−–±]?(\d|$)")


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a page shows."""

    figures: Sequence[Figure]
    tables: Sequence[Table]
    findings: Sequence[Finding]
    missing: Sequence[str]
    few: Sequence[str]
    """What would need more search trials."""
    cost: Table | None


def page(results: Results, content: Content, folder: Path) -> str:
    """Return the whole document; images are read from `folder`."""
    title = f"Study {escape(results.experiment)}"
    main = [table for name in (COMPARISON, "claims") for table in content.tables if table.name == name]
    last = [table for table in content.tables if table.name in ("claims_comparisons", "claims_untested")]
    others = [table for table in content.tables if table not in (*main, *last)]
    sections = {
        "Found": _found(content.findings),
        "Figures": "".join(_figure(results, figure, folder) for figure in content.figures),
        "Tables": "".join(map(_table, (*main, *others))),
        "Missing": _list(content.missing),
        "Too few trials": _list(content.few),
        "State": _facts(results) + _state(results) + (_table(content.cost) if content.cost else ""),
        "Behind the claims": "".join(map(_table, last)),
    }
    shown = {name: body for name, body in sections.items() if body}
    links = "".join(f'<li><a href="#{_anchor(name)}">{name}</a></li>' for name in shown)
    body = "".join(f'<section id="{_anchor(n)}">\n<h2>{n}</h2>\n{text}</section>\n' for n, text in shown.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#content">Skip to the content</a>\n<header>\n<h1>{title}</h1>\n'
        f"{_banners(results, content)}</header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="content">\n{body}</main>\n</body>\n</html>\n'
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _found(found: Sequence[Finding]) -> str:
    """Return what was found: a sentence each, after what it is about."""
    lines = [f"<dt>{escape(each.subject)}</dt><dd>{escape(each.sentence)}</dd>" for each in found]
    return f"<dl>{''.join(lines)}</dl>\n" if lines else ""


def _banners(results: Results, content: Content) -> str:
    lines = []
    if results.simulated:
        lines.append("Simulated data: nothing on this page says anything about real users.")
    if results.labels.note:
        lines.append(results.labels.note)
    open_ = len(results.without_result())
    partial = [f"{open_} trials without a result"] if open_ else []
    partial += [f"{len(content.missing)} figures, tables or parts missing"] if content.missing else []
    if partial:
        lines.append(f"Partial study: {', '.join(partial)}.")
    return "".join(f'<p class="banner">{escape(line)}</p>\n' for line in lines)


def _facts(results: Results) -> str:
    facts = {"Remade by": results.command("report")}
    facts |= {name.replace("_", " ").capitalize(): ", ".join(values) for name, values in results.tags.items() if values}
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>\n"


def _state(results: Results) -> str:
    """Return the trials per part and status; those that failed or are unfinished by name."""
    trials = results.trials
    if trials.empty:
        return "<p>No trial has been logged.</p>\n"
    counts = trials.groupby(["part", "status"]).size().unstack(fill_value=0)
    frame = counts.reset_index().rename(columns=lambda name: str(name).capitalize())
    body = _grid("Trials per part and status", frame)
    lines = []
    for _, trial in results.without_result().sort_values(["part", "cell", "row", "name"]).iterrows():
        reason = f": {trial['error']}" if trial["error"] else ""
        lines.append(f"{trial['part']} {trial['cell']} {trial['row']} {trial['name']} is {trial['status']}{reason}")
    lines += [f"{name} finished more than once; its newest run counts" for name in results.duplicates]
    if results.foreign:
        lines.append(f"{results.foreign} runs of this experiment were not logged by a study and are left out")
    return body + _list(lines)


def _list(lines: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n" if lines else ""


def _table(table: Table) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in table.notes)
    files = f'<p class="note">Numbers: <code>tables/{table.name}.csv</code></p>\n'
    body = _grid(table.caption, table.cells, block=table.block) + notes + files
    return f"<details>\n<summary>{escape(table.caption)}</summary>\n{body}</details>\n" if table.folded else body


def _grid(caption: str, frame: pd.DataFrame, level: str = "h3", block: str = "") -> str:
    """Return a heading and a table that scrolls by itself, by keyboard too; `block`: a column written across the table."""
    cells = frame.drop(columns=block) if block else frame
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in cells.columns)
    blocks = frame[block].tolist() if block else [None] * len(frame)
    lines = []
    for k, row in enumerate(cells.itertuples(index=False)):
        if block and (k == 0 or blocks[k] != blocks[k - 1]):
            text = f'<th scope="rowgroup" colspan="{len(cells.columns)}">{escape(str(blocks[k]))}</th>'
            lines.append(f'<tr class="block">{text}</tr>\n')
        lines.append("<tr>" + "".join(_cell(str(cell)) for cell in row) + "</tr>\n")
    named = escape(caption, quote=True)
    return (
        f"<{level}>{escape(caption)}</{level}>\n"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{named}"><table aria-label="{named}">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def _cell(text: str) -> str:
    """Return a cell: text between ** is bold, a verdict has its mark, lines after the first are smaller."""
    first, *rest = text.split("\n")
    bold = re.fullmatch(r"\*\*(.*)\*\*", first)
    if bold and bold[1] in _MARKS:
        kind = {"✓": "holds", "✗": "does-not-hold", "?": "undecided"}[_MARKS[bold[1]]]
        shown = f'<strong class="{kind}">{_MARKS[bold[1]]} {escape(bold[1])}</strong>'
    else:
        shown = f"<strong>{escape(bold[1])}</strong>" if bold else escape(first)
    shown += "".join(f'<span class="below">{escape(line)}</span>' for line in rest)
    if max(map(len, text.split("\n"))) > 40:
        return f'<td class="long">{shown}</td>'
    return f"<td>{shown}</td>" if _NUMBER.match(first) else f'<td class="text">{shown}</td>'


def _figure(results: Results, figure: Figure, folder: Path) -> str:
    head = figure.head
    picture = (folder / f"{head.name}.png").read_bytes()
    width, height = (
        round(96 / DPI * size) for size in struct.unpack(">II", picture[16:24])
    )  # the same text size in all
    data = base64.b64encode(picture).decode("ascii")
    notes = "".join(f"<br>{escape(note)}" for note in head.notes)
    points = figure.points()
    shown = _grid(f"Points of {head.name}", points.map(_short), "h4") if len(points) <= _POINTS else ""
    folded = f"<details>\n<summary>Points ({len(points)})</summary>\n{shown}</details>\n" if shown else ""
    return (
        f'<h3 id="{head.name}">{escape(head.title)}</h3>\n<figure>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(head.title, quote=True)}">'
        f'<img alt="{escape(head.alt, quote=True)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>Remade by <code>{escape(_command(results, figure))}</code>; files "
        f"<code>figures/{head.name}.png</code>, <code>.svg</code>, points <code>.csv</code>.{notes}</figcaption>\n"
        f"</figure>\n{folded}"
    )


def _command(results: Results, figure: Figure) -> str:
    """Return the command that runs the part that the figure shows, and draws it."""
    part = "sweep" if isinstance(figure, Sensitivity) else "search"
    return f"{results.command(part)} && {results.command('report', '--only', figure.head.name)}"


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
