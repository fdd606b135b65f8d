"""What the papers print, against their texts: every number of every table, every sentence where it is said to stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from features.errors import InputError
from study.papers.reader import (
    FOLDER,
    Difference,
    Grid,
    Optimum,
    Order,
    Unimodal,
    load_paper,
    load_published,
    parse_paper,
    published_names,
)  # fmt: skip
from trainables.interface import load_model, model_names
from trainables.task_types import TASK_TYPES

TEXTS = Path(__file__).parents[3] / "shared" / "papers"
MODELS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
VARIANTS = {
    "w/o Diffusion": "wo_diffusion", "w/o Overlap Diffusion": "wo_overlap_diffusion",
    "w/o Pseudo Diffusion": "wo_pseudo_diffusion", "w/o Alignment Loss": "wo_alignment",
    "w/o Guesser Network": "wo_guesser", "w/o MoE Fusion": "wo_moe", "w/o Overlap Cyclic": "wo_cyclic",
    "LGCD (full)": "full",
}  # fmt: skip
MUSIC_ROWS = ["CMF", "EMCDR", "SSCDR", "LACDR", "PTUPCDR", "DiffCDR", "CATN", "OmniMatch", "MuSiC"]
SMALL = """
title: A paper
text: a.txt
note: none
datasets:
  one:
    domains: {place: Table 1, columns: [users], rows: {counts: {a->b: [3]}}}
    comparison: {place: Table 2, columns: [rmse], rows: {A: {a->b@0.2: [0.5]}, B: {a->b@0.2: [0.6]}}}
    ablations: {place: Table 3, columns: [rmse], rows: {full: {a->b@0.2: [0.5]}}}
claims:
  - {name: c, place: "4", sentence: A wins, part: score, metrics: [rmse], order: [[A], [B]]}
"""


def text_of(model: str) -> str:
    paper = load_paper(model)
    assert paper is not None
    path = TEXTS / paper.text
    if not path.is_file():
        pytest.skip(f"{path.name} is not in ../shared/papers")
    return path.read_text(encoding="utf-8")


def lines_after(text: str, start: str, nth: int = 0) -> Iterator[list[str]]:
    """Cells of the lines that follow the nth line that starts so."""
    lines = text.splitlines()
    (at, *_) = [k for k, line in enumerate(lines) if line.startswith(start)][nth:]
    for line in lines[at + 1 :]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def lgcd_rows(header: str) -> dict[str, list[str]]:
    rows = {}
    for name, *values in lines_after(text_of("lgcd"), header):
        if not values:
            return rows
        if name != "---":
            rows[name] = values
    return rows


@pytest.mark.parametrize(
    ("dataset", "cells", "header", "first"),
    [
        ("food-kitchen", ("kitchen->food@1", "food->kitchen@1"), "| Method | HR@5 (Food)", 4),
        ("movie-book", ("book->movie@1", "movie->book@1"), "| Method | HR@5 | H@10 | NDCG@5 | N@10 | HR@5 (Book)", 0),
    ],
)
def test_every_number_of_lgcds_tables_is_the_printed_one(
    dataset: str, cells: tuple[str, str], header: str, first: int
) -> None:
    found = load_published(f"lgcd/{dataset}")
    table_1 = lgcd_rows(header)
    percent = [float(value.strip("+%")) for value in table_1.pop("Improv.")]
    assert len(table_1) == len(found.comparison.rows) == 16
    for name, values in table_1.items():
        assert [v for cell in cells for v in found.comparison.rows[name][cell]] == [float(value) for value in values]
    assert [v for cell in cells for v in found.comparison.improvement[cell]] == percent
    table_3 = lgcd_rows("| Variant | Movie HR@5 ")
    assert {VARIANTS[name] for name in table_3} == set(found.ablations.rows)
    for name, values in table_3.items():
        of = found.ablations.rows[VARIANTS[name]]
        assert [v for cell in cells for v in of[cell]] == [float(value) for value in values[first : first + 4]]
    counts = [value.replace(",", "") for row in lgcd_rows("| Statistic ").values() for value in row if value]
    numbers = {float(value) for value in counts if re.fullmatch(r"[\d.]+", value)}
    assert {value for values in found.domains.rows["counts"].values() for value in values} <= numbers


def music_table(start: str, nth: int, rows: list[str], ratios: int) -> dict[tuple[str, str, str], list[str]]:
    """(task number, ratio, metric) -> printed cells; a task or ratio is printed once, above its other lines."""
    found, task, ratio = {}, "", "50%"
    for cells in lines_after(text_of("music"), start, nth):
        if cells[0].startswith("Task "):
            task, *cells = cells
        if re.fullmatch(r"\d+%", cells[0]):
            ratio, *cells = cells
        if cells[0] not in ("MAE", "RMSE", "NDCG"):
            return found
        found[task[-1], ratio, cells[0]] = [cell for cell in cells[1:] if cell]
    return found


@pytest.mark.parametrize(
    ("grid", "start", "nth", "rows", "size"),
    [
        ("comparison", "Tasks | Metric | CMF", 0, MUSIC_ROWS, 27),
        ("ablations", "Tasks | Metric | w/o MLLM", 0, ["wo_mllm", "wo_diffusion", "wo_side", "full"], 18),
        ("cold_items", "Tasks | Metric | CMF", 1, MUSIC_ROWS, 6),
    ],
)
def test_every_number_of_musics_tables_is_the_printed_one(
    grid: str, start: str, nth: int, rows: list[str], size: int
) -> None:
    found: Grid = getattr(load_published("music/amazon"), grid)
    tasks = {"1": "movies->music", "2": "books->movies", "3": "books->music"}
    table = music_table(start, nth, rows, size)
    assert len(table) == size
    assert sum(len(values) for cells in found.rows.values() for values in cells.values()) == size * len(rows)
    prefix = "cold_item_" if grid == "cold_items" else ""
    for (task, ratio, metric), printed in table.items():
        cell, name = (
            f"{tasks[task]}@{float(ratio[:-1]) / 100:g}",
            prefix + {"NDCG": "ndcg20"}.get(metric, metric.lower()),
        )
        assert [found.value(row, cell, name) for row in rows] == [float(value) for value in printed[: len(rows)]]
        if len(printed) > len(rows):
            assert found.improvement[cell][found.columns.index(name)] == float(printed[-1].rstrip("%"))


def test_table_1_of_music_is_the_printed_one() -> None:
    grid = load_published("music/amazon").domains
    lines = [cells for cells in lines_after(text_of("music"), "Tasks | Domain | User") if cells[0].startswith("Task")]
    for cells, counts in zip(lines[:3], grid.rows["counts"].values(), strict=True):
        assert [float(cell.replace(",", "")) for cell in cells[3:] if cell] == list(counts)


@pytest.mark.parametrize("model", MODELS)
def test_every_sentence_stands_where_it_is_said_to(model: str) -> None:
    paper = load_paper(model)
    assert paper is not None
    text = text_of(model)
    headings = [(m.start(), m[0]) for m in re.finditer(r"^(?:\d+(?:\.\d+)*\. .*|Abstract\.|.*¶)$", text, re.MULTILINE)]
    flat = re.sub(r"\s", " ", text)
    for claim in paper.claims:
        printed = claim.original or claim.sentence
        places = [m.start() for m in re.finditer(re.escape(printed), flat)]
        assert places, f"{claim.name}: not in the text: {printed}"
        above = [[name for start, name in headings if start <= place] for place in places]
        section = claim.place.partition(",")[0]
        if model == "music":  # under a heading with this number
            assert any(names[-1].startswith(section) for names in above), (claim.name, [names[-1] for names in above])
        else:  # under the last heading that names a table or figure
            named = [[name for name in names if "(" in name] for names in above]
            assert any(f"({section})" in names[-1] for names in named if names), claim.name
        for number in claim.form.printed or () if isinstance(claim.form, Difference) else ():
            assert f"{number:.4f}" in claim.sentence
            assert f"{number:.4f}" in printed


@pytest.mark.parametrize("model", MODELS)
def test_claims_speak_of_what_a_study_of_the_model_can_have(model: str) -> None:
    paper, module = load_paper(model), load_model(model)
    assert paper is not None
    assert model in model_names()
    kind = TASK_TYPES[module.TASK_TYPE]
    known = {metric.name for metric in kind.metrics} | (
        {"cold_item_mae", "cold_item_rmse"} if kind.cold_items else set()
    )
    grids = [tables.comparison for tables in paper.datasets.values()]
    rows = {row for grid in grids for row in grid.rows}
    assert module.NAME in rows
    assert paper.group in kind.groups
    assert len(paper.claims) >= 20
    for claim in paper.claims:
        assert set(claim.metrics) <= known
        assert claim.part in ("score", "ablate") or claim.part.partition(":")[2] in module.FIGURES, claim.part
        names = {name for level in claim.form.levels for name in level} if isinstance(claim.form, Order) else set()
        names |= {claim.form.better, claim.form.worse} if isinstance(claim.form, Difference) else set()
        if claim.part == "ablate":
            assert names <= {"full", *module.ABLATIONS} | rows
        elif claim.part in ("score", "sweep:overlap_ratio") and not claim.across_ratios:
            assert names <= rows
    forms = {type(claim.form) for claim in paper.claims}
    assert forms == {Order, Optimum, Unimodal, Difference}
    for tables in paper.datasets.values():
        assert set(tables.ablations.rows) == {"full", *module.ABLATIONS}


def test_lgcds_claims_are_in_english_beside_the_original() -> None:
    paper = load_paper("lgcd")
    assert paper is not None
    assert len(paper.claims) == 26
    for claim in paper.claims:
        assert claim.sentence.isascii()
        assert claim.sentence.endswith(".")
        assert claim.original, claim.name


def test_what_a_study_is_held_against() -> None:
    """The numbers of the issue, whatever the notes say."""
    found = load_published("lgcd/food-kitchen")
    food = [found.comparison.value("LGCD", "kitchen->food@1", name) for name in ("hr5", "hr10", "ndcg5", "ndcg10")]
    assert food == [0.2800, 0.4000, 0.1805, 0.2190]
    assert found.comparison.value("LGCD", "kitchen->food@0.5", "hr5") is None
    assert found.comparison.value("ours", "kitchen->food@1", "hr5") is None


def test_names() -> None:
    assert published_names() == ["lgcd/food-kitchen", "lgcd/movie-book", "music/amazon"]
    for model in MODELS:
        assert re.match(rf"# in a plan: `published: {model}/", (FOLDER / f"{model}.yaml").read_text(encoding="utf-8"))
    with pytest.raises(InputError, match=r"^unknown 'lgcd/x'; choose from lgcd/food-kitchen, lgcd/movie-book, music/"):
        load_published("lgcd/x")
    with pytest.raises(InputError, match=r"has no numbers of a->b; it has kitchen->food, food->kitchen: name the dom"):
        load_published("lgcd/food-kitchen").check(["a->b"])
    load_published("music/amazon").check(["movies->books", "books->movies"])


def test_a_paper_that_knows_no_row_of_the_plan_is_refused() -> None:
    published = load_published("lgcd/food-kitchen")
    published.check_names(["SASRec", "BERT4Rec"])
    with pytest.raises(
        InputError, match=r"^lgcd/food-kitchen prints no row of MuSiC, BERT4Rec; it prints GRU4Rec, Diff"
    ):
        published.check_names(["MuSiC", "BERT4Rec", "MuSiC"])


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("text: a.txt\n", "", "x.yaml: text is missing; set it"),
        ("note: none", "nots: none", "x.yaml: unknown key 'nots'; did you mean 'note'"),
        (
            "[0.6]",
            "[0.6, 1]",
            r"x.yaml: datasets.one.comparison: B, a->b@0.2 is \[0.6, 1\]; give 1 numbers, one for each",
        ),
        ("[0.6]", "[.nan]", r"comparison.rows.B.a->b@0.2\[0\] is nan; give a finite number"),
        ("B: {a->b@0.2", "B: {a->b@0.5", "comparison: rows do not all have the same cells; copy every printed number"),
        ("ablations:", "ablation:", "x.yaml: datasets.one.ablations is missing; set it"),
        ("order: [[A], [B]]", "order: [A, B]", r"x.yaml: claims\[0\].order\[0\] is 'A'; give a list"),
        ("order: [[A], [B]]", "order: [[1], [B]]", r"claims\[0\].order\[0\]\[0\] is 1; give a value of type str"),
        ("order: [[A], [B]]", "order: [[A]]", r"claims\[0\]: order is \[\['A'\]\]; give two or more lists of names"),
        (", order: [[A], [B]]", "", r"claims\[0\]: c has no form; give one of order, optimum, unimodal, difference"),
        ("order: [[A], [B]]", "order: [[A], [B]], unimodal: true", "c has order and unimodal; give one of order"),
        ("order: [[A], [B]]", "optimum: {low: 2, high: 1}", r"optimum: low is 2, high 1; give low <= high"),
        ("part: score", "part: score, at_least: few", "at_least is 'few'; choose from all, most, some"),
        ("part: score", "part: score, dataset: two", "claims: c speaks of the data set 'two'; known: one"),
        ("metrics: [rmse], order", "metrics: [1], order", r"claims\[0\].metrics\[0\] is 1; give a value of type str"),
        ("metrics: [rmse], order", "metrics: [], order", r"claims\[0\]: metrics is empty; give at least one"),
    ],
)
def test_a_fault_is_a_line(old: str, new: str, fault: str) -> None:
    assert parse_paper(SMALL, "x.yaml").claims[0].form == Order((("A",), ("B",)))
    assert SMALL.count(old) >= 1
    with pytest.raises(InputError, match=fault):
        parse_paper(SMALL.replace(old, new), "x.yaml")


def test_a_name_is_given_once() -> None:
    with pytest.raises(InputError, match=r"x\.yaml: claims: c is given twice; names are unique"):
        parse_paper(SMALL + SMALL.splitlines()[-1] + "\n", "x.yaml")


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        parse_paper(SMALL.replace("text: a", "texd: a").replace("part: score", "part: 3"), "x.yaml")
    assert str(caught.value).splitlines() == [
        "x.yaml: unknown key 'texd'; did you mean 'text'?",
        "x.yaml: claims[0].part is 3; give a value of type str, in quotes",
        "x.yaml: text is missing; set it",
    ]
