"""Published numbers: digit by digit as the reading notes print them, and named by plans."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from features.errors import InputError
from study.published import FOLDER, Rows, load_published, published_names
from trainables.door import model_names
from trainables.kinds import KINDS

NOTES = Path(__file__).parents[3] / "shared" / "papers" / "lgcd-reading-notes.txt"
METRICS = ("hr5", "hr10", "ndcg5", "ndcg10")
VARIANTS = {
    "w/o Diffusion": "wo_diffusion", "w/o Overlap Diffusion": "wo_overlap_diffusion",
    "w/o Pseudo Diffusion": "wo_pseudo_diffusion", "w/o Alignment Loss": "wo_alignment",
    "w/o Guesser Network": "wo_guesser", "w/o MoE Fusion": "wo_moe", "w/o Overlap Cyclic": "wo_cyclic",
    "LGCD (full)": "full",
}  # fmt: skip


def printed(header: str) -> dict[str, list[str]]:
    """Rows of the table of the notes whose header starts so, and what follows it."""
    lines = NOTES.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(header))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *values = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = values
    return rows


def kept(rows: Rows, targets: tuple[str, str], metrics: tuple[str, ...]) -> dict[str, list[float]]:
    return {name: [row[target][metric] for target in targets for metric in metrics] for name, row in rows.items()}


@pytest.mark.skipif(not NOTES.is_file(), reason="the reading notes are not there")
@pytest.mark.parametrize(
    ("name", "targets", "header", "first"),
    [
        ("lgcd/food-kitchen", ("food", "kitchen"), "| Method | HR@5 (Food)", 4),
        ("lgcd/movie-book", ("movie", "book"), "| Method | HR@5 | H@10 | NDCG@5 | N@10 | HR@5 (Book)", 0),
    ],
)
def test_every_number_is_the_printed_one(name: str, targets: tuple[str, str], header: str, first: int) -> None:
    found = load_published(name)
    table_1 = printed(header)
    del table_1["Improv."]
    assert len(table_1) == 16
    assert kept(found.comparison, targets, METRICS) == {row: list(map(float, v)) for row, v in table_1.items()}
    table_3 = printed("| Variant | Movie HR@5 ")
    assert kept(found.ablations, targets, ("hr5", "ndcg5")) == {
        VARIANTS[row]: list(map(float, values[first : first + 4])) for row, values in table_3.items()
    }


def test_the_row_that_a_study_is_held_against() -> None:
    """The numbers of the issue, whatever the notes say."""
    rows = load_published("lgcd/food-kitchen").comparison["LGCD"]
    assert rows["food"] == {"hr5": 0.2800, "hr10": 0.4000, "ndcg5": 0.1805, "ndcg10": 0.2190}
    assert rows["kitchen"] == {"hr5": 0.3093, "hr10": 0.3893, "ndcg5": 0.2214, "ndcg10": 0.2397}


def test_names_are_those_of_the_models_and_their_metrics() -> None:
    assert published_names() == ["lgcd/food-kitchen", "lgcd/movie-book"]
    for path in FOLDER.glob("*.yaml"):
        document = yaml.safe_load(path.read_text())
        assert re.match(rf"# in a plan: `published: {path.stem}/", path.read_text())
        assert path.stem in model_names()
        known = {metric.name for kind in KINDS.values() for metric in kind.metrics if document["group"] in kind.groups}
        for dataset in document["datasets"].values():
            assert set(dataset["comparison"]["metrics"]) <= known
            assert set(dataset["ablations"]["metrics"]) <= known


def test_what_is_not_published_is_a_line() -> None:
    with pytest.raises(InputError, match=r"^unknown 'lgcd/x'; choose from lgcd/food-kitchen, lgcd/movie-book$"):
        load_published("lgcd/x")
    with pytest.raises(InputError, match="has no numbers of the target domain 'song'; it has food, kitchen: name"):
        load_published("lgcd/food-kitchen").check(["food", "song"])
