"""The fields of LGCD's preset `paper`: known answers, and slow references in float64 for what changes an equation."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from features.errors import InputError
from trainables.diffusion import variances
from trainables.interface import load_model, make_config
from trainables.models.lgcd import presets, retrieval, training
from trainables.models.lgcd.conditions import RowRules, real_rows
from trainables.models.lgcd.config import WIDTH, Config
from trainables.models.lgcd.encoders import DomainEncoders, Encoders, PretrainSpec, represent
from trainables.models.lgcd.losses import FullSoftmax, SampledSoftmax, generated_in_training, log_sum_exp, losses
from trainables.models.lgcd.pretraining import encoders_folders, pretrained
from trainables.sequences.views import within
from trainables.task_types import task_type_of
from trainables.tasks.sequential import OVERLAPPING, SOURCE_ONLY, TARGET_ONLY, HeldOut, Sequences, SequenceTask
from trainables.trial import SeedTraining, Trial

from .test_lgcd import network, some_rows
from .training import train_seed

QUICK: dict[str, Any] = {"epochs": 2, "encoder_epochs": 2, "batch": 16, "steps": 8}
PAPER = Config(**{**presets.PRESETS["paper"], **QUICK})


def seeded_rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.fixture(scope="module")
def encoders(task: SequenceTask) -> DomainEncoders:
    return pretrained(task, PAPER.pretraining, 0)


# --- encoders (eqs. 1-3) ------------------------------------------------------------------------------------------


def test_encoders_per_domain_share_no_parameter_and_know_one_domain(
    task: SequenceTask, encoders: DomainEncoders
) -> None:
    source, target = (encoders.of_domain(domain) for domain in (task.source, task.target))
    assert not {p.data_ptr() for p in source.parameters()} & {p.data_ptr() for p in target.parameters()}
    for pair, (low, high) in ((source, task.source), (target, task.target)):
        assert (len(pair.id.weight), len(pair.text), pair.first) == (high - low, high - low, low)
        assert torch.equal(pair.text, task.titles()[low:high])
    names = [name for name, value in source.named_parameters() if value.shape == target.get_parameter(name).shape]
    alike = [name for name in names if torch.equal(source.get_parameter(name), target.get_parameter(name))]
    assert alike == []


def test_a_domains_encoders_depend_on_its_own_sequences_alone(task: SequenceTask, tmp_path: Path) -> None:
    """Other items of the target domain in training: another target pair, the same source pair to the last bit."""
    low, high = task.target
    inside = (task.train.item >= low) & (task.train.item < high)
    moved = torch.where(inside, low + (task.train.item - low + 1) % (high - low), task.train.item)
    spec, pairs = PAPER.pretraining, []
    for number, item in enumerate((task.train.item, moved)):
        folder = tmp_path / f"tasks{number}" / "task" / "search"
        other = replace(task, folder=folder, train=Sequences(item, task.train.starts), train_key=str(number))
        pairs.append(pretrained(other, spec, 0))
    (source, target), (same, different) = ([p.of_domain(d) for d in (task.source, task.target)] for p in pairs)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(target.id.weight, different.id.weight)


def test_each_domain_has_a_folder_that_both_directions_share(task: SequenceTask) -> None:
    here = encoders_folders(task, PAPER.pretraining, 0)
    assert len(set(here)) == 2
    assert here == encoders_folders(task.turned(), PAPER.pretraining, 0)
    assert training.shared(PAPER, task, [0, 1]) == [*here, *encoders_folders(task, PAPER.pretraining, 1)]


def test_random_ids_start_without_titles_and_a_shared_fusion_is_one_map() -> None:
    def made(text: Tensor, **spec: Any) -> Encoders:
        torch.manual_seed(0)
        return Encoders(PretrainSpec(width=8, **spec), text)

    one, other = torch.randn(30, 5), torch.randn(30, 5)
    assert torch.equal(made(one, id_start="random").id.weight, made(other, id_start="random").id.weight)
    assert not torch.equal(made(one).id.weight, made(other).id.weight)
    shared = made(one, item_fusion="shared")
    assert shared.item_fusion is shared.fusion
    both = torch.randn(2, 4, 8)
    assert torch.equal(shared.fuse(*both), shared.fuse_items(*both))
    assert made(one).item_fusion is not made(one).fusion


@pytest.mark.parametrize("preset", ["ours", "paper"])
def test_the_id_arm_of_figure_4_starts_from_random_ids(preset: str) -> None:
    config = replace(PAPER if preset == "paper" else Config(), guidance="id")
    assert config.pretraining.id_start == "random"
    assert Config(guidance="text").pretraining.id_start == "titles"


# --- rows (eqs. 5-8) ----------------------------------------------------------------------------------------------


def test_one_row_a_user_and_direction(task: SequenceTask, encoders: DomainEncoders) -> None:
    """At the last item of the target domain, where an item of the source domain precedes it."""
    rules = RowRules(condition_from="source", rows="last")
    for one in (task, task.turned()):
        (low, high), expected = one.target, []
        for user in (one.group == OVERLAPPING).nonzero().flatten().tolist():
            items = one.train.item[one.train.starts[user] : one.train.starts[user + 1]].tolist()
            last = max(place for place, item in enumerate(items) if low <= item < high)
            before = [item for item in items[:last] if not low <= item < high]
            if before:
                expected.append((items[last], before, [item for item in items[:last] if low <= item < high]))
        rows = real_rows(one, encoders, rules)
        assert rows.item.tolist() == [item for item, _, _ in expected]
        assert 0 < len(rows) <= int((one.group == OVERLAPPING).sum())
        for place, (_, before, earlier) in enumerate(expected):
            history = Sequences(torch.tensor(before), torch.tensor([0, len(before)]))
            by_id, by_text = represent(encoders.of_domain(one.source), history, last=True)
            torch.testing.assert_close(rows.id[place], by_id[0])
            torch.testing.assert_close(rows.text[place], by_text[0])
            assert bool(rows.has_feature[place]) == bool(earlier)
            if earlier:
                known = Sequences(torch.tensor(earlier), torch.tensor([0, len(earlier)]))
                (feature,) = represent(encoders.of_domain(one.target), known, last=True, parts=["text"])
                torch.testing.assert_close(rows.feature[place], feature[0])


@pytest.mark.parametrize("preset", ["paper", "ours"])
def test_a_condition_from_the_source_ignores_target_items_bit_for_bit(
    task: SequenceTask, scored: HeldOut, preset: str
) -> None:
    """`as-given` rows score as `inter` rows do, and as rows with other target-domain items; without it they do not."""
    config = PAPER if preset == "paper" else Config(**QUICK, negatives=10, condition_from="source")
    trained = train_seed("lgcd", config, task, 0)[-1]
    low, high = task.target
    inside = (scored.history.item >= low) & (scored.history.item < high)
    assert inside.any()
    moved = torch.where(inside, low + (scored.history.item - low + 5) % (high - low), scored.history.item)
    one = trained.predict(scored, task, 0)
    other = trained.predict(replace(scored, history=Sequences(moved, scored.history.starts)), task, 0)
    hidden = trained.predict(replace(scored, history=within(scored.history, task.source)), task, 0)
    assert torch.equal(one, other)
    assert torch.equal(one, hidden)
    merged = train_seed("lgcd", Config(**QUICK, negatives=10), task, 0)[-1]
    assert not torch.equal(
        merged.predict(scored, task, 0),
        merged.predict(replace(scored, history=Sequences(moved, scored.history.starts)), task, 0),
    )


def test_retrieval_per_user_is_equations_5_and_6(task: SequenceTask, encoders: DomainEncoders) -> None:
    """User by user and item by item, in float64."""
    assert task.generated_texts is not None
    found, count = retrieval.by_user(task, encoders, 2), 0
    for user in range(len(task.group)):
        texts = [number for number in task.generated[user, :2].tolist() if number >= 0]
        if not texts:
            assert found.item[user].tolist() == [-1, -1]
            continue
        assert int(task.group[user]) in (SOURCE_ONLY, TARGET_ONLY)
        low, high = task.target if int(task.group[user]) == SOURCE_ONLY else task.source
        pair = encoders.of_domain((low, high))
        vectors = pair.text_map(task.generated_texts[torch.tensor(texts)])
        wanted = pair.text_encoder(vectors[None])[0, -1].double()  # (5)
        items = pair.text_map(task.titles()[low:high]).double()
        cosine = (items @ wanted) / (items.norm(dim=1) * wanted.norm())  # (6)
        best = cosine.argsort(descending=True)[:2]
        assert found.item[user].tolist() == (best + low).tolist()
        torch.testing.assert_close(found.similarity[user].double(), cosine[best], atol=1e-5, rtol=1e-5)
        count += 1
    assert count > 3


def test_missing_texts_are_passed_over(task: SequenceTask, encoders: DomainEncoders) -> None:
    shifted = torch.cat([torch.full_like(task.generated[:, :1], -1), task.generated], dim=1)
    one, other = (
        retrieval.by_user(replace(task, generated=given), encoders, given.shape[1])
        for given in (task.generated, shifted)
    )
    assert torch.equal(one.item, other.item[:, : one.item.shape[1]])


def test_without_rows_of_real_users_they_are_in_no_loss(task: SequenceTask, encoders: DomainEncoders) -> None:
    trainer = training._Trainer(replace(PAPER, overlap_rows=False), task, 0, encoders)
    full = training._Trainer(PAPER, task, 0, encoders)
    assert trainer.batches == full.batches  # an epoch stays as long
    for way in trainer.ways:
        rows = way.batch()
        assert len(rows) > 0
        assert not rows.real.any()
    assert all(way.batch().real.any() for way in full.ways)


def test_both_directions_train_in_turn_and_share_all_but_guesser_and_fusion(
    task: SequenceTask, encoders: DomainEncoders
) -> None:
    trainer = training._Trainer(PAPER, task, 0, encoders)
    swapped = task.turned()
    assert (swapped.source, swapped.target) == (task.target, task.source)
    assert swapped.turned().group.equal(task.group)
    assert [way.recommend.domain for way in trainer.ways] == [task.target, task.source]
    network = trainer.network
    taken: list[int] = []
    trainer._step = lambda number: taken.append(number) or 0.0  # type: ignore[method-assign,func-returns-value]
    trainer.epoch()
    assert taken == [0, 1] * trainer.batches
    rows = trainer.ways[1].batch()
    final, loss = losses(network, rows, seeded_rng(), 1)
    (loss + final.sum()).backward()  # type: ignore[no-untyped-call]
    learns = {name for name, value in network.named_parameters() if value.grad is not None and value.grad.any()}
    assert not {name for name in learns if name.startswith(("conditioners.0", "guessers.0"))}
    assert {"conditioners.1.id_map.weight", "guessers.1.0.weight", "denoiser.map.0.weight"} <= learns
    assert "fusion.experts.weight" in learns
    for number, source in enumerate((task.source, task.target)):  # f_fusion starts as its own domain's pretrained one
        fusion = encoders.of_domain(source).fusion
        assert torch.equal(network.conditioners[number].id_map.weight, fusion.weight[:, :WIDTH])


# --- network and losses -------------------------------------------------------------------------------------------


def test_one_token_is_h_cond_and_leaves_nothing_to_the_query() -> None:
    """Eq. 13 over one key: a softmax of one is 1, so neither x_t nor t reaches what is read; only eq. 14 adds x_t."""
    model, rows = network(replace(Config(**QUICK), condition_tokens=1)).double(), some_rows()
    condition = model.condition(rows.id.double(), rows.text.double(), rows.real)
    assert condition.tokens.shape == (9, 1, WIDTH)
    assert torch.equal(condition.tokens[:, 0], condition.whole)
    x, t = torch.randn(9, WIDTH, dtype=torch.float64), torch.arange(9) % 8 + 1
    attention = model.denoiser.attention
    assert attention is not None
    value = attention.key_value(condition.whole)[:, WIDTH:]
    x1 = attention.out(value) + x  # (13), (14)
    torch.testing.assert_close(model.denoiser(x, t, condition), x1 + model.denoiser.map(x1), atol=1e-12, rtol=1e-12)
    assert torch.equal(model.denoiser(x, t, condition), model.denoiser(x, t.flip(0), condition))


@pytest.mark.parametrize("align_on", ["single", "overlapping", "both"])
@pytest.mark.parametrize("norm", ["mean", "sum"])
def test_norms_and_aligned_rows_are_those_of_the_equations(norm: str, align_on: str) -> None:
    """Row by row in float64: eqs. 17, 21 and 22 as sums of squares, or these divided by D."""
    config = Config(**QUICK, loss_norm=norm, align_on=align_on, train_reverse="one_step")
    model, given = network(config).double(), some_rows()
    rows = replace(given, id=given.id.double(), text=given.text.double(), feature=given.feature.double())
    generator = seeded_rng()
    t = torch.randint(1, config.steps + 1, (9,), generator=generator)
    noise = torch.randn(9, WIDTH, generator=generator)
    with torch.no_grad():
        _, loss = losses(model, rows, seeded_rng())
        condition = model.condition(rows.id, rows.text, rows.real)
        guess = model.guess(condition)
        start = torch.where(rows.has_feature[:, None], rows.feature, guess)
        predicted = model.denoiser(model.diffusion.noised(start, t, noise), t, condition)
    share = WIDTH if norm == "mean" else 1
    parts: dict[str, list[float]] = {"diffusion": [], "guess": [], "align": []}
    for row in range(9):
        real, has = bool(rows.real[row]), bool(rows.has_feature[row])
        if has:
            parts["diffusion"].append(float(((predicted - rows.feature)[row] ** 2).sum()) / share)
        if has and real:
            parts["guess"].append(float(((guess - rows.feature)[row] ** 2).sum()) / share)
        if align_on == "both" or real == (align_on == "overlapping"):
            parts["align"].append(float(((predicted - condition.whole)[row] ** 2).sum()) / share)
    expected = sum(sum(values) / len(values) for values in parts.values())
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_sums_are_64_times_the_means() -> None:
    found = {}
    for norm in ("mean", "sum"):
        model = network(Config(**QUICK, loss_norm=norm))
        found[norm] = float(losses(model, some_rows(), seeded_rng())[1].detach())
    assert found["sum"] == pytest.approx(64 * found["mean"], rel=1e-5)


def test_eq_9_word_for_word() -> None:
    """beta_t linear from sqrt(1e-4) = 0.01 to sqrt(0.1) = 0.316."""
    beta = variances(100, 1e-4, 0.1, "linear_root")
    expected = [0.01 + (math.sqrt(0.1) - 0.01) * k / 99 for k in range(100)]
    torch.testing.assert_close(beta, torch.tensor(expected, dtype=torch.float64))
    assert float((1 - beta)[:50].prod()) == pytest.approx(0.011, abs=0.001)  # what is left of x_0 at lambda 0.5
    torch.testing.assert_close(variances(100, 1e-4, 0.1, "linear_sqrt"), beta.square())
    for schedule in ("linear", "linear_root", "linear_sqrt"):
        model = network(Config(**{**QUICK, "steps": 100}, schedule=schedule))
        signal = (1 - variances(100, 1e-4, 0.1, schedule)).cumprod(0).sqrt()
        torch.testing.assert_close(model.diffusion.signal, signal.float())


def test_a_gaussian_start_is_noise_alone() -> None:
    """Without guesser: N(0, I), where the default is 0 noised to T, whose deviation is below 0.8 at T = 8."""
    for start, scale in (("gaussian", 1.0), ("noised_zero", float(network(Config(**QUICK)).diffusion.noise[-1]))):
        model = network(Config(**QUICK, guesser=False, guesser_start=start))
        drawn = model.start(torch.zeros(200, WIDTH), torch.Generator().manual_seed(1))
        noise = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(drawn, scale * noise)
        assert model.first == QUICK["steps"]
    with_guess = network(Config(**QUICK, guesser_start="gaussian"))  # read without guesser only
    guess = torch.full((200, WIDTH), 9.0)
    assert float(with_guess.start(guess, torch.Generator().manual_seed(1)).mean()) > 5


def test_mlp_experts_are_two_maps_each() -> None:
    model = network(Config(**QUICK, expert="mlp", expert_start="random", experts=3)).double()
    condition, generated = torch.randn(4, WIDTH, dtype=torch.float64), torch.randn(4, WIDTH, dtype=torch.float64)
    experts = model.fusion.experts
    for row in range(4):
        alpha = torch.softmax(model.fusion.gate(condition[row]), dim=0)
        both = torch.cat([condition[row], generated[row]])
        answers = [
            experts.outer[e] @ functional.gelu(experts.inner[e] @ both + experts.inner_bias[e]) + experts.outer_bias[e]
            for e in range(3)
        ]
        expected = sum(alpha[e] * answers[e] for e in range(3))
        torch.testing.assert_close(model.fusion(condition, generated)[row], expected, atol=1e-12, rtol=1e-12)


def test_experts_that_start_at_random_do_not_start_as_the_condition() -> None:
    condition, generated = torch.randn(50, WIDTH), torch.randn(50, WIDTH)
    random = network(Config(**QUICK, expert_start="random")).fusion.requires_grad_(False)
    bound = 1 / math.sqrt(2 * WIDTH)  # that of nn.Linear(128, 64)
    weight = random.experts.weight
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    likeness = functional.cosine_similarity(random(condition, generated), condition)
    assert float(likeness.abs().mean()) < 0.3


def test_without_experts_h_rev_recommends_or_h_cond_where_nothing_is_generated() -> None:
    rows = some_rows()
    model = network(Config(**QUICK, expert="none"))
    condition = model.condition(rows.id, rows.text, torch.ones(9, dtype=torch.bool))
    generated = model.reverse(model.guess(condition), condition, torch.Generator().manual_seed(3))
    assert torch.equal(model.recommend(rows.id, rows.text, torch.Generator().manual_seed(3)), generated)
    without = network(Config(**QUICK, expert="none", diffusion=False))
    assert torch.equal(
        without.recommend(rows.id, rows.text, torch.Generator()),
        without.condition(rows.id, rows.text, rows.real | True).whole,
    )


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_the_full_softmax_is_that_of_all_items_in_value_and_gradient(chunk: int) -> None:
    torch.manual_seed(0)
    state = (3 * torch.randn(6, 5, dtype=torch.float64)).requires_grad_()
    items = 3 * torch.randn(40, 5, dtype=torch.float64)
    found = log_sum_exp(state, items, chunk)
    expected = torch.logsumexp(state @ items.T, dim=1)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    weight = torch.randn(6, dtype=torch.float64)
    gradients = [torch.autograd.grad((value * weight).sum(), state)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_no_negatives_means_all_items_and_many_draws_come_near_it() -> None:
    torch.manual_seed(0)
    items, state, label = torch.randn(50, WIDTH) / 8, torch.randn(20, WIDTH), torch.randint(100, 150, (20,))
    full = FullSoftmax(items=items, domain=(100, 150))(state, label)
    expected = functional.cross_entropy(state @ items.T, label - 100, reduction="sum")
    torch.testing.assert_close(full, expected, atol=1e-4, rtol=1e-5)
    rng = np.random.default_rng(0)
    sampled = SampledSoftmax(items=items, domain=(100, 150), count=40_000, rng=rng)(state, label)
    torch.testing.assert_close(sampled, expected, rtol=0.01, atol=0.1)


# --- the preset ---------------------------------------------------------------------------------------------------


def test_every_field_of_the_preset_departs_from_the_defaults() -> None:
    """A field that says what the default says is no field of a preset; what is literal by default is left out."""
    values = presets.PRESETS["paper"]
    assert [name for name, value in values.items() if getattr(Config(), name) == value] == ["align_on"]


def test_ablations_of_the_preset_are_the_papers() -> None:
    arms = presets.ABLATIONS
    assert arms["wo_overlap_diffusion"].config_of("paper") == {"overlap_rows": False}
    assert arms["wo_diffusion"].config_of("paper") == {"diffusion": False, "expert": "none"}
    for name in ("wo_overlap_diffusion", "wo_diffusion"):
        assert arms[name].config_of("ours") == {name.removeprefix("wo_"): False}


def quick_scores(task: SequenceTask, scored: HeldOut, config: Config) -> Tensor:
    return train_seed("lgcd", config, task, 0)[-1].predict(scored, task, 0).detach()


CHANGES: list[dict[str, Any]] = [
    {"id_start": "titles"},
    {"item_fusion": "own"},
    {"retrieval": "per_text"},
    {"rows": "every"},
    {"condition_tokens": 2},
    {"schedule": "linear_sqrt"},
    {"loss_norm": "mean"},
    {"expert_start": "identity"},
    {"expert": "mlp"},
    {"expert": "none"},
    {"align_on": "both"},
    {"directions": "one"},
    {"negatives": 10},
    {"negatives": 0},
    {"train_reverse": "guess"},
    {"guesser": False},
    {"guesser": False, "guesser_start": "noised_zero"},
    *(dict(variant.config_of("paper")) for variant in presets.ABLATIONS.values()),
]


@pytest.mark.parametrize("changed", [{}, *CHANGES], ids=str)
def test_every_field_of_the_preset_is_read_and_repeats(
    task: SequenceTask, scored: HeldOut, changed: dict[str, Any]
) -> None:
    config = replace(PAPER, **changed)
    one = quick_scores(task, scored, config)
    assert one.isfinite().all()
    if changed:
        assert not torch.equal(one, quick_scores(task, scored, PAPER))
    else:
        assert torch.equal(one, quick_scores(task, scored, config))


@pytest.mark.parametrize("changed", [{}, {"negatives": 0, "train_reverse": "guess"}], ids=str)
def test_a_training_of_the_preset_goes_on_to_the_last_bit(task: SequenceTask, changed: dict[str, Any]) -> None:
    """Both directions' batches, draws and weights are in the checkpoint."""
    config = replace(PAPER, epochs=4, **changed)

    def trial() -> Trial:
        return Trial(
            name="lgcd", model=load_model("lgcd"), config=config, task_dir="", task=task, task_type=task_type_of(task),
            test=None, device=torch.device("cpu"),
        )  # fmt: skip

    whole, states = SeedTraining(trial(), 3), []
    while whole.result is None:
        whole.advance()
        if whole.result is None:
            torch.save(whole.state(), file := io.BytesIO())
            states.append(file)
    assert len(states) == 3
    for file in states:
        file.seek(0)
        resumed = SeedTraining(trial(), 3, torch.load(file, weights_only=True))
        while resumed.result is None:
            resumed.advance()
        for name, value in whole.result.metrics.items():
            assert "seconds" in name or resumed.result.metrics[name] == value


def test_the_preset_is_served_as_it_was_scored(task: SequenceTask, scored: HeldOut) -> None:
    model = load_model("lgcd")
    config = replace(PAPER, diffusion=False)  # nothing is drawn
    packed, predict = last_epoch(task, config)
    assert model.unpack is not None
    torch.testing.assert_close(model.unpack(config, packed, 0)(scored.history), predict(scored, task, 0))
    packed, _ = last_epoch(task, PAPER)
    score = model.unpack(PAPER, packed, 0)
    whole = score(scored.history)
    assert torch.equal(score(within(scored.history, task.source)), whole)
    torch.testing.assert_close(score(scored.history.rows(torch.tensor([2]))), whole[2:3], atol=1e-5, rtol=1e-4)


def last_epoch(task: SequenceTask, config: Config) -> tuple[dict[str, Any], Any]:
    trainer = training._Trainer(config, task, 0, pretrained(task, config.pretraining, 0))
    trainer.epoch()
    trainer.network.eval()
    with torch.no_grad():
        return trainer.pack(), torch.no_grad()(trainer.predict)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"encoder_sequences": "per_domain"}, "per_domain reads one domain; give condition_from: source"),
        ({"expert": "mlp"}, "expert_start is identity, which an mlp cannot be; give expert_start: random"),
        ({"overlap_rows": False, "pseudo_items": 0}, "leaves nothing to train on; change one of them"),
        ({"condition_tokens": 3}, "condition_tokens is 3; give 1 or 2"),
        ({"align_on": "none"}, "align_on is 'none'; choose from single, overlapping, both"),
        ({"keep": "first"}, "keep is 'first'; choose from best, last"),
        ({"negatives": -1}, "negatives is -1; give a number of at least 0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        make_config("lgcd", wrong, "here")
    assert message in str(refused.value)


def test_nothing_to_train_on_is_said(task: SequenceTask) -> None:
    nobody = replace(task, similarity=torch.full_like(task.similarity, -1.0))
    config = Config(**QUICK, overlap_rows=False, min_similarity=0.99)
    with pytest.raises(InputError, match="no row to train on is left; take overlap_rows: true or more pseudo_items"):
        training._Trainer(config, nobody, 0, pretrained(nobody, config.pretraining, 0))


def test_rows_are_kept_within_their_bytes_and_the_last_ones_always(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, made = some_rows(), []

    def make(key: str) -> Any:
        return kept.get(key, lambda: made.append(key) or rows[torch.arange(9)])  # type: ignore[func-returns-value]

    kept = training._KeptRows()
    monkeypatch.setattr(training, "ROWS_BYTES", 2 * rows.bytes)
    assert rows.bytes == 9 * (3 * WIDTH * 4 + 8 + 1 + 1)
    for key in "aababca":  # "c" is the third: "a", asked for longer ago than "b", goes
        make(key)
    assert made == ["a", "b", "c", "a"]
    monkeypatch.setattr(training, "ROWS_BYTES", 0)
    assert make("d") is make("d")


# --- the reverse process in training (eqs. 18-21) -----------------------------------------------------------------


@pytest.mark.parametrize("changed", [{}, {"sampler_steps": 3}, {"predicts": "noise"}, {"start_ratio": 0.1}])
def test_what_training_sees_at_the_end_of_the_chain_is_what_inference_makes(changed: dict[str, Any]) -> None:
    config = replace(PAPER, **changed)
    net, rows = network(config), some_rows()
    calls: list[tuple[int, bool]] = []

    def counted(_: Any, inputs: tuple[Tensor, ...]) -> None:
        calls.append((len(inputs[0]), torch.is_grad_enabled()))

    net.denoiser.map.register_forward_pre_hook(counted)
    condition = net.condition(rows.id, rows.text, rows.real)
    seen = generated_in_training(net, net.guess(condition), condition, seeded_rng())
    steps = config.sampler_steps or net.first
    assert [enabled for _, enabled in calls] == [False] * (min(steps, net.first) - 1) + [True]
    with torch.no_grad():
        made = net.reverse(net.guess(condition), condition, seeded_rng())
    assert torch.equal(seen, made)
    seen.sum().backward()
    assert net.denoiser.map[0].weight.grad is not None
    assert all(p.grad is None for p in net.guessers.parameters()), "the guess learns from its own loss alone"
