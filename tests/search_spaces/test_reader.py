"""Space files: what they mean, and that every fault is named in one line, all at once."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import optuna
import pytest
from hypothesis import given, settings

from search_spaces import Space, SpaceError, load_space

FIELDS = ("steps", "schedule", "variance_end", "lr", "activation", "dropout", "beta", "epochs", "layers")
SHIPPED = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))


def space_of(folder: Path, text: str, variant: str = "v") -> Space:
    path = folder / "space.yaml"
    path.write_text(text)
    return load_space(f"{path}/{variant}", FIELDS)


def faults_of(folder: Path, text: str) -> list[str]:
    with pytest.raises(SpaceError, match=r"space\.yaml: ") as caught:
        space_of(folder, text)
    lines = str(caught.value).splitlines()
    assert list(caught.value.faults) == lines
    return [line.removeprefix(f"{folder / 'space.yaml'}: ") for line in lines]


def test_paper_is_music_s_grid() -> None:
    space = load_space("music/paper", FIELDS)
    assert space.size() == 5 * 5 * 5 * 3 * 6 * 3
    assert space.describe()["steps"] == "2, 5, 10, 20 and 50"
    assert space.describe()["epochs"] == "50 to 100, step 10"
    drawn = space.suggest(optuna.create_study().ask())
    assert set(drawn) == {"steps", "beta", "dropout", "lr", "epochs", "activation"}


def test_continuous_draws_variance_end_only_with_the_scaled_schedule() -> None:
    space = load_space("music/continuous", FIELDS)
    assert space.size() is None
    assert space.describe()["variance_end"] == "0.01 to 0.05 (only if schedule is linear_scaled)"
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = set()
    for _ in range(20):
        trial = study.ask()
        drawn = space.suggest(trial)
        assert ("variance_end" in drawn) == (drawn["schedule"] == "linear_scaled")
        assert set(trial.distributions) == set(drawn), "a parameter that does not exist is not in Optuna either"
        seen.add(drawn["schedule"])
    assert seen == {"linear", "linear_scaled"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_space_loads(path: Path) -> None:
    import yaml

    document = yaml.safe_load(path.read_text())
    fields = {field for variant in document.values() for field in variant}
    for variant in document:
        assert load_space(f"{path.stem}/{variant}", fields).parameters


def test_size_counts_conditional_branches_once(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        """
v:
  schedule: {CategoricalDistribution: {choices: [linear, linear_scaled, cosine]}}
  steps: {IntDistribution: {low: 1, high: 4}}
  variance_end: {when: {schedule: [linear_scaled, cosine]}, CategoricalDistribution: {choices: [0.01, 0.02]}}
  layers: {when: {steps: 2, schedule: cosine}, IntDistribution: {low: 1, high: 3}}
  dropout: {FloatDistribution: {low: 0.1, high: 0.5, step: 0.1}}
""",
    )
    # linear: 4 steps; linear_scaled: 4 * 2; cosine: 2 * (3 + 3 layers at steps=2); each with 5 dropouts
    assert space.size() == 5 * (4 + 4 * 2 + 2 * (3 + 3))


def test_a_trial_drawn_before_is_read_back() -> None:
    space = load_space("music/continuous", FIELDS)
    study = optuna.create_study()
    first = space.suggest(study.ask())
    again = space.suggest(optuna.Trial(study, study.trials[0]._trial_id))
    assert again == first


def test_definition_tells_spaces_apart(tmp_path: Path) -> None:
    one = space_of(tmp_path, "v: {lr: {FloatDistribution: {low: 0.1, high: 1}}}").definition()
    same = space_of(tmp_path, "v:\n  lr:\n    FloatDistribution: {high: 1.0, low: 0.1}").definition()
    other = space_of(tmp_path, "v: {lr: {FloatDistribution: {low: 0.1, high: 1, log: true}}}").definition()
    assert one == same != other


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("lr: {FloatDistribution: {low: 1e-5, high: 1.0}}", "v.lr.low is the text '1e-5', not a number; write 1.0e-5"),
        ("lr: {CategoricalDistribution: {choices: [1e-5]}}", "v.lr.choices is the text '1e-5', not a number; "),
        ("steps: {IntDistribution: {low: '2', high: 5}}", "v.steps.low is the text '2', not a number; write 2 "),
        ("steps: {IntDistribution: {low: 2.5, high: 5}}", "v.steps.low must be a whole number, is 2.5"),
        ("lr: {FloatDistribution: {low: true, high: 5}}", "v.lr.low must be a finite number, is True"),
        ("lr: {FloatDistribution: {low: .nan, high: 5}}", "v.lr.low must be a finite number, is nan"),
        ("lr: {FloatDistribution: {low: 0.1, high: .inf}}", "v.lr.high must be a finite number, is inf"),
        ("lr: {FloatDistribution: {low: 0.1, high: 1, log: 1}}", "v.lr.log must be true or false, is 1"),
        (
            "lr: {FloatDistribution: {low: 2, high: 1}}",
            "v.lr is not a valid FloatDistribution: `low <= high` must hold, but got (low=2, high=1).",
        ),
        ("activation: {CategoricalDistribution: {choices: tanh}}", "v.activation.choices must be a list, is str "),
        ("activation: {CategoricalDistribution: {choices: [tanh, tanh]}}", "v.activation.choices holds 'tanh' twice"),
        ("learning: {FloatDistribution: {low: 0, high: 1}}", "v.learning is not a config field; the fields are a"),
        ("lr: 0.1", "v.lr must be {<Distribution>: {...}}, has float '0.1'"),
        ("lr: {Uniform: {low: 0, high: 1}}", "v.lr needs exactly one of CategoricalDistribution, FloatDistributi"),
        ("lr: {when: {}}", "v.lr needs exactly one of CategoricalDistribution, FloatDistribution and IntDis"),
        ("lr: {FloatDistribution: [0, 1]}", "v.lr FloatDistribution needs its arguments as a mapping, has list "),
        ("lr: {when: x, FloatDistribution: {low: 0, high: 1}}", "v.lr.when must be {<parameter>: <value or list of v"),
        ("lr: {when: {steps: 2}, FloatDistribution: {low: 0, high: 1}}", "v.lr.when.steps is not a parameter of this"),
    ],
)  # fmt: skip
def test_each_fault_has_its_line(tmp_path: Path, body: str, fault: str) -> None:
    (line,) = faults_of(tmp_path, f"v:\n  {body}\n")
    assert line.startswith(fault)


def test_misspelt_words_and_uneven_steps_are_faults(tmp_path: Path) -> None:
    misspelt, uneven, empty = faults_of(
        tmp_path,
        """
v:
  lr: {FloatDistribution: {low: 0.1, hihg: 1}}
  dropout: {FloatDistribution: {low: 0, high: 1, step: 0.3}}
  activation: {CategoricalDistribution: {choices: []}}
""",
    )
    assert "unexpected keyword argument 'hihg'" in misspelt
    assert "not divisible by `step`" in uneven
    assert "must contain one or more elements" in empty


def test_conditions_name_what_they_cannot_read(tmp_path: Path) -> None:
    later, never, flag, continuous = faults_of(
        tmp_path,
        """
v:
  variance_end: {when: {schedule: linear}, FloatDistribution: {low: 0.1, high: 0.2}}
  schedule: {CategoricalDistribution: {choices: [linear, cosine]}}
  steps: {IntDistribution: {low: 2, high: 8, step: 2}, when: {schedule: linaer}}
  layers: {CategoricalDistribution: {choices: [true, false]}}
  beta: {when: {layers: 1}, FloatDistribution: {low: 0.1, high: 0.2}}
  lr: {when: {beta: 0.1}, FloatDistribution: {low: 0.1, high: 0.2}}
""",
    )
    assert later == "v.variance_end.when.schedule is defined later; move 'schedule' above 'variance_end'"
    assert never == "v.steps.when.schedule never is 'linaer'; its range is linear and cosine"
    assert flag == "v.beta.when.layers never is 1; its range is True and False"
    assert continuous.startswith("v.lr.when.beta is continuous, so it never equals a value")


def test_circles_are_named(tmp_path: Path) -> None:
    faults = faults_of(
        tmp_path,
        """
v:
  lr: {when: {lr: 1}, IntDistribution: {low: 1, high: 2}}
  steps: {when: {epochs: 1}, IntDistribution: {low: 1, high: 2}}
  epochs: {when: {steps: 1}, IntDistribution: {low: 1, high: 2}}
""",
    )
    assert faults == [
        "v.lr.when.lr is circular: 'lr' itself depends on 'lr'; drop one of the conditions",
        "v.steps.when.epochs is circular: 'epochs' itself depends on 'steps'; drop one of the conditions",
        "v.epochs.when.steps is circular: 'steps' itself depends on 'epochs'; drop one of the conditions",
    ]


def test_faults_of_all_variants_come_together(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, "v: {lr: 1, steps: 2}\nother: {lr: 1}\nempty:\n")
    assert [fault.split(" ")[0] for fault in faults] == ["v.lr", "v.steps", "other.lr", "empty"]


def test_a_key_given_twice_is_a_fault(tmp_path: Path) -> None:
    text = "v:\n  lr: {FloatDistribution: {low: 0, high: 1}}\n  lr: {FloatDistribution: {low: 0, high: 2}}\n"
    (fault,) = faults_of(tmp_path, text)
    assert fault.startswith("is not valid YAML: key 'lr' is given twice")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("music", "not a space; write <file>/<variant>, such as music/paper"),
        ("music/papper", "search_spaces/music.yaml: has no variant 'papper'; it has paper and continuous"),
        ("musik/paper", "there is no space file 'musik'; shipped are .*lgcd, .*music, "),
        ("../music/paper", "not a space"),
        ("/nowhere/space.yaml/v", "/nowhere/space.yaml: cannot be read"),
    ],
)
def test_names_that_lead_nowhere(name: str, fault: str) -> None:
    with pytest.raises(SpaceError, match=fault):
        load_space(name, FIELDS)


yaml_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.sampled_from(["v", "lr", "steps", "when", "FloatDistribution", "low", "high", "1e-5"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["v", "lr", "steps", "when", "FloatDistribution", "IntDistribution", "low",
                                         "high", "step", "choices", "CategoricalDistribution"]), inner, max_size=3),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(document=st.one_of(yaml_values, st.fixed_dictionaries({"v": yaml_values})))
def test_no_document_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, document: object) -> None:
    import yaml

    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_text(yaml.safe_dump(document))
    assert loads_or_says_why(path)


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="v:{}[]-\n lr&*!<0e1'\"|>%@`\x00")))
def test_no_text_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert loads_or_says_why(path)


def test_a_deep_document_is_a_fault(tmp_path: Path) -> None:
    assert "is not valid YAML" in faults_of(tmp_path, "[" * 5000)[0]


def loads_or_says_why(path: Path) -> bool:
    """Either values can be drawn from the space, or every line of the error names the file."""
    try:
        space = load_space(f"{path}/v", FIELDS)
    except SpaceError as error:
        lines = str(error).splitlines()
        return bool(lines) and all(line.startswith(f"{path}: ") for line in lines)
    return bool(space.parameters) and set(space.suggest(optuna.create_study().ask())) <= set(FIELDS)
