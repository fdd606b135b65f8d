"""What a study calls its rows: names, what they read, and which row stands for a system of a paper."""

from __future__ import annotations

from dataclasses import replace

from study.labels import RowLabels, labels_of
from study.plan.load import load_plan
from study.study import plan_labels

from .store import MUSIC, rival, with_rivals


def test_rows_have_the_plans_titles_or_the_models_names_subject_first() -> None:
    labels = labels_of(
        "lgcd", "lgcd/food-kitchen", {"sasrec": ("sasrec", ""), "sasrec_small": ("sasrec", "SASRec, small")}
    )
    assert [(row.row, row.model, row.name, row.paper_name) for row in labels.rows.values()] == [
        ("lgcd", "lgcd", "LGCD", "LGCD"),
        ("sasrec", "sasrec", "SASRec", "SASRec"),
        ("sasrec_small", "sasrec", "SASRec, small", "SASRec"),
    ]
    assert labels.subject.row == "lgcd"
    assert labels.subject.reads == "ids, titles, pseudo-items"
    assert labels.rows["sasrec"].reads == "ids"
    assert MUSIC.subject.reads == "ratings, features"


def test_a_row_that_the_plan_does_not_name_is_a_simple_baseline() -> None:
    labels = labels_of("lgcd")
    assert labels.row("item_knn_title") == RowLabels(
        row="item_knn_title", model="baseline", name="item_knn_title", paper_name="", reads="ids, titles"
    )
    assert labels.row("lgcd") is labels.subject


def test_the_row_that_is_named_by_its_model_stands_for_the_system_else_the_first() -> None:
    plain = replace(rival("emcdr"), row="emcdr_plain")
    assert with_rivals(MUSIC, plain, rival("emcdr")).rows_by_paper_name() == {"MuSiC": "music", "EMCDR": "emcdr"}
    other = replace(plain, row="emcdr_other")
    assert with_rivals(MUSIC, other, plain).rows_by_paper_name()["EMCDR"] == "emcdr_other"


def test_a_row_that_is_no_published_system_stands_for_none() -> None:
    labels = plan_labels(load_plan("food-kitchen-table-1"))
    encoders = labels.rows["lgcd_encoder"]
    assert (encoders.name, encoders.paper_name) == ("LGCD's encoders alone", "")
    assert labels.rows["lgcd"].paper_name == "LGCD"
    assert "lgcd_encoder" not in labels.rows_by_paper_name().values()
    assert labels.table_order[-1] == "lgcd_encoder", "below the paper's rows"


def test_tables_have_the_papers_order_after_the_baselines() -> None:
    labels = labels_of("lgcd", "lgcd/food-kitchen")
    ours = with_rivals(labels, rival("cmf"), rival("unicdr"), rival("sasrec"))
    assert ours.table_order == ("popularity", "item_knn", "item_knn_title", "sasrec", "unicdr", "lgcd", "cmf")
    assert replace(ours, published=None).table_order[3:] == ("lgcd", "cmf", "unicdr", "sasrec")


def test_another_papers_numbers_are_not_of_the_subjects_ablations() -> None:
    labels = labels_of("sasrec", "lgcd/food-kitchen")
    assert labels.published is not None
    assert (labels.subject_published, labels.paper) == (None, None)
    assert labels_of("lgcd", "lgcd/food-kitchen").subject_published is not None


def test_a_sweep_of_the_ratio_is_named_by_the_task_type() -> None:
    assert (MUSIC.ratio_field, MUSIC.ratio) == ("cold_ratio", "Cold ratio")
    assert labels_of("lgcd").ratio_field == "overlap_ratio"
