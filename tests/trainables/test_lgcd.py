"""LGCD against references written from its equations, and every switch of Table 3 and Figure 4."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from features.errors import InputError
from trainables.devices import seeded
from trainables.diffusion import timestep_embedding
from trainables.interface import Epoch, Setup
from trainables.models.lgcd import presets, training
from trainables.models.lgcd.conditions import Rows
from trainables.models.lgcd.config import GUIDANCE, WIDTH, Config
from trainables.models.lgcd.losses import losses
from trainables.models.lgcd.network import Condition, Network
from trainables.models.lgcd.pretraining import pretrained
from trainables.tasks.sequential import HeldOut, SequenceTask

from .training import train_seed

QUICK = Config(epochs=2, encoder_epochs=2, batch=16, negatives=10, steps=8)


def network(config: Config = QUICK) -> Network:
    torch.manual_seed(0)
    return Network(config, [nn.Linear(2 * WIDTH, WIDTH)]).eval()


def some_rows(real: int = 5, pseudo: int = 4) -> Rows:
    torch.manual_seed(1)
    is_real = torch.tensor([True] * real + [False] * pseudo)
    text = torch.randn(real + pseudo, WIDTH) * is_real[:, None]
    feature = torch.randn(real + pseudo, WIDTH)
    return Rows(
        id=torch.randn(real + pseudo, WIDTH), text=text, feature=feature, item=torch.arange(real + pseudo),
        real=is_real, has_feature=torch.arange(real + pseudo) % 3 != 0,
    )  # fmt: skip


# --- equations ----------------------------------------------------------------------------------------------------


def test_h_cond_is_the_pretrained_fusion_of_both_parts() -> None:
    """Eq. 8; a pseudo-overlapping row's is the ID part and the bias alone."""
    fusion, rows = nn.Linear(2 * WIDTH, WIDTH), some_rows()
    condition = Network(QUICK, [fusion]).eval().condition(rows.id, rows.text, rows.real)
    torch.testing.assert_close(condition.whole, fusion(torch.cat([rows.id, rows.text], dim=1)))
    torch.testing.assert_close(condition.tokens.sum(dim=1), condition.whole)
    assert condition.hidden.tolist() == [[False, not text] for text in rows.real.tolist()]


def test_denoiser_is_equations_12_to_16() -> None:
    """One row at a time, head by head, with plain sums."""
    model, rows = network(), some_rows()
    condition = model.condition(rows.id, rows.text, rows.real)
    x, t = torch.randn(9, WIDTH), torch.arange(9) % 8 + 1
    found = model.denoiser(x, t, condition)
    attention, size = model.denoiser.attention, WIDTH // QUICK.heads
    assert attention is not None
    for row in range(9):
        angles = [int(t[row]) / 10_000 ** (i / 32) for i in range(32)]
        timed = x[row] + torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])  # (12)
        tokens = condition.tokens[row][~condition.hidden[row]]
        query = attention.query(timed)
        key, value = attention.key_value(tokens).split(WIDTH, dim=1)
        heads = []
        for head in range(QUICK.heads):
            part = slice(head * size, (head + 1) * size)
            weight = torch.softmax(key[:, part] @ query[part] / math.sqrt(size), dim=0)
            heads.append(weight @ value[:, part])
        x1 = attention.out(torch.cat(heads)) + x[row]  # (13), (14)
        torch.testing.assert_close(found[row], x1 + model.denoiser.map(x1), atol=1e-5, rtol=1e-4)  # (15), (16)


@pytest.mark.parametrize("guidance", ["linear", "cfg"])
def test_other_guidance_tells_the_condition_in_the_place_of_attention(guidance: str) -> None:
    """x_t comes in once, at eq. 14's residual, as it does beside the attention."""
    model, rows = network(replace(QUICK, guidance=guidance)), some_rows()
    condition = model.condition(rows.id, rows.text, rows.real)
    x, t = torch.randn(9, WIDTH), torch.arange(9) % 8 + 1
    assert model.denoiser.linear is not None
    x1 = x + timestep_embedding(t, WIDTH) + model.denoiser.linear(condition.whole)
    torch.testing.assert_close(model.denoiser(x, t, condition), x1 + model.denoiser.map(x1))


def test_gate_and_experts_are_equations_23_and_24() -> None:
    model = network(replace(QUICK, experts=3))
    with torch.no_grad():
        model.fusion.experts.weight.normal_()
        model.fusion.experts.bias.normal_()
    condition, generated = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    found = model.fusion(condition, generated)
    for row in range(4):
        alpha = torch.softmax(model.fusion.gate.weight @ condition[row] + model.fusion.gate.bias, dim=0)
        both = torch.cat([condition[row], generated[row]])
        expected = sum(
            alpha[e] * (model.fusion.experts.weight[e] @ both + model.fusion.experts.bias[e]) for e in range(3)
        )
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


def test_sparse_gates_use_the_experts_with_the_largest_gates() -> None:
    torch.manual_seed(0)
    dense, sparse = network(replace(QUICK, experts=4)), network(replace(QUICK, experts=4, active_experts=1))
    condition, generated = torch.randn(6, WIDTH), torch.randn(6, WIDTH)
    chosen = dense.fusion.gate(condition).argmax(dim=1)
    both = torch.cat([condition, generated], dim=1)
    expected = torch.einsum("bdk,bk->bd", dense.fusion.experts.weight[chosen], both) + dense.fusion.experts.bias[chosen]
    torch.testing.assert_close(sparse.fusion(condition, generated), expected, atol=1e-5, rtol=1e-4)


def test_training_starts_at_what_the_encoders_recommend() -> None:
    model = network()
    condition = torch.randn(50, WIDTH)
    likeness = functional.cosine_similarity(model.fusion(condition, torch.randn(50, WIDTH)), condition)
    assert likeness.min() > 0.95


def test_losses_are_equations_17_21_and_22() -> None:
    """L_diff over rows with a feature, L_guess over real ones of them, L_align over pseudo-overlapping rows."""
    model, rows = network(), some_rows()
    _, loss = losses(model, rows, torch.Generator().manual_seed(5))
    generator, diffusion = torch.Generator().manual_seed(5), model.diffusion  # the same draws in the same order
    condition = model.condition(rows.id, rows.text, rows.real)
    guess = model.guess(condition)
    start = torch.where(rows.has_feature[:, None], rows.feature, guess)
    t = torch.randint(1, QUICK.steps + 1, (9,), generator=generator)
    x_t = diffusion.noised(start, t, torch.randn(9, WIDTH, generator=generator))
    squares = [((model.denoiser(x_t, t, condition) - rows.feature) ** 2).mean(dim=1)[rows.has_feature].mean()]  # (17)
    squares.append(((guess - rows.feature) ** 2).mean(dim=1)[rows.has_feature & rows.real].mean())  # (22)
    first = torch.full((9,), 4)  # lambda T = 0.5 * 8
    noised = diffusion.noised(guess, first, torch.randn(9, WIDTH, generator=generator))
    generated = model.denoiser(noised, first, condition)
    squares.append(((generated - condition.whole) ** 2).mean(dim=1)[~rows.real].mean())  # (21)
    torch.testing.assert_close(loss, sum(squares), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("switch", "real"), [("overlap_diffusion", True), ("pseudo_diffusion", False)])
def test_rows_that_diffusion_must_not_learn_from_leave_the_losses_alone(switch: str, real: bool) -> None:
    rows = some_rows()
    moved = replace(rows, feature=rows.feature + (rows.real == real)[:, None].float())
    for on in (True, False):
        model = network(replace(QUICK, alignment=False, **{switch: on}))  # type: ignore[arg-type]
        found = [float(losses(model, given, torch.Generator().manual_seed(0))[1].detach()) for given in (rows, moved)]
        assert (found[0] == pytest.approx(found[1])) != on


def test_noise_prediction_regresses_on_the_noise() -> None:
    model, rows = network(replace(QUICK, predicts="noise", alignment=False, overlap_diffusion=True)), some_rows()
    x_t, t = torch.randn(9, WIDTH), torch.full((9,), 3)
    condition = model.condition(rows.id, rows.text, rows.real)
    eps, diffusion = model.denoiser(x_t, t, condition), model.diffusion
    expected = (x_t - diffusion.noise[2] * eps) / diffusion.signal[2]
    torch.testing.assert_close(model.cleaner(condition)(x_t, t), expected)


def test_classifier_free_guidance_goes_past_the_conditioned_prediction() -> None:
    model, rows = network(replace(QUICK, guidance="cfg", guidance_weight=2.0)), some_rows()
    condition = model.condition(rows.id, rows.text, rows.real)
    x, t = torch.randn(9, WIDTH), torch.full((9,), 3)
    told = model.denoiser(x, t, condition)
    untold = model.denoiser(x, t, Condition(condition.tokens, condition.hidden, torch.zeros(9, WIDTH)))
    torch.testing.assert_close(model.cleaner(condition)(x, t), told + 2 * (told - untold))


@pytest.mark.parametrize(("guidance", "blind_to"), [("id", "text"), ("text", "id")])
def test_one_sided_guidance_is_blind_to_the_other_side(guidance: str, blind_to: str) -> None:
    model, rows = network(replace(QUICK, guidance=guidance)), some_rows()
    other = replace(rows, **{blind_to: getattr(rows, blind_to) + 1})
    conditions = [model.condition(given.id, given.text, given.real) for given in (rows, other)]
    torch.testing.assert_close(conditions[0].whole, conditions[1].whole)
    torch.testing.assert_close(conditions[0].tokens, conditions[1].tokens)


def test_the_reverse_process_starts_at_the_noised_guess() -> None:
    """Eqs. 18-20: with a denoiser that answers x_t itself the chain can be followed by hand."""
    model = network(replace(QUICK, start_ratio=0.25))  # starts at t = 2
    model.cleaner = lambda condition: lambda x, t: x  # type: ignore[method-assign]
    guess, condition = (
        torch.randn(3, WIDTH),
        Condition(torch.zeros(3, 1, WIDTH), torch.zeros(3, 1, dtype=torch.bool), torch.zeros(3, WIDTH)),
    )
    found = model.reverse(guess, condition, torch.Generator().manual_seed(2))
    generator, diffusion = torch.Generator().manual_seed(2), model.diffusion
    x = diffusion.signal[1] * guess + diffusion.noise[1] * torch.randn(3, WIDTH, generator=generator)
    x = (diffusion.mean_x0[1] + diffusion.mean_xt[1]) * x
    x = x + diffusion.deviation[1] * torch.randn(3, WIDTH, generator=generator)
    torch.testing.assert_close(found, x)


def test_without_guesser_the_reverse_process_starts_as_noisy_as_training_shows_it() -> None:
    """T is short here, so sqrt(1 - abar_T) is far from 1: standard normal noise would be new to the denoiser."""
    model = network(replace(QUICK, guesser=False))
    rows, seen = some_rows(), []
    model.cleaner = lambda condition: lambda x, t: seen.append((x, t)) or x  # type: ignore[method-assign,func-returns-value]
    losses(model, rows, torch.Generator().manual_seed(0))
    model.recommend(rows.id, rows.text, torch.Generator().manual_seed(0))
    (trained, t), (started, first) = seen[:2]
    assert set(t.tolist()) == set(first.tolist()) == {QUICK.steps}
    scale = float(model.diffusion.noise[-1])
    assert scale < 0.8
    for x in (trained, started):
        assert float(x.std()) == pytest.approx(scale, rel=0.1)  # of 576 draws


# --- training -----------------------------------------------------------------------------------------------------


def scores(task: SequenceTask, config: Config, held_out: HeldOut, seed: int = 0) -> torch.Tensor:
    result = train_seed("lgcd", config, task, seed)[-1]
    return result.predict(held_out, task, seed).detach()


@pytest.mark.parametrize(
    "changed",
    [
        {},
        *({"guidance": way} for way in GUIDANCE),
        {"predicts": "noise"},
        {"train_reverse": "one_step"},
        {"train_reverse": "chain"},
        {"sampler_steps": 2},
        {"active_experts": 2},
        {"pseudo_items": 0},
        {"encoder_sequences": "separate"},
        *(dict(variant.config) for variant in presets.ABLATIONS.values()),
    ],
)
def test_every_switch_trains_and_repeats(task: SequenceTask, scored: HeldOut, changed: dict[str, object]) -> None:
    config = replace(QUICK, **changed)  # type: ignore[arg-type]
    one, again = scores(task, config, scored), scores(task, config, scored)
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    assert one.isfinite().all()
    if changed:  # a switch that changed nothing would be a switch that is not read
        same = {"pseudo_items": 0} if task.pseudo.shape[1] == 0 else {"guidance": "cross_attention"}
        assert torch.equal(one, scores(task, QUICK, scored)) == (changed == same)


def test_another_seed_trains_another_model(task: SequenceTask, scored: HeldOut) -> None:
    assert not torch.equal(scores(task, QUICK, scored, 0), scores(task, QUICK, scored, 1))


def make_trainer(task: SequenceTask, config: Config) -> training._Trainer:
    return training._Trainer(config, task, 0, pretrained(task, config.pretraining, 0))


def test_trials_of_a_process_read_all_sequences_once(task: SequenceTask) -> None:
    encoders = pretrained(task, QUICK.pretraining, 0)
    assert pretrained(task, QUICK.pretraining, 0) is encoders

    def rows(config: Config, seed: int = 0) -> tuple[Rows, Rows]:
        suggest = partial(training.suggested_items, config, task, encoders)
        return training.training_rows(config, task, encoders, suggest, seed)

    real, pseudo = rows(QUICK)
    pretrained.cache_clear()  # as many seeds do
    assert pretrained(task, QUICK.pretraining, 0) is not encoders
    for other in (QUICK, replace(QUICK, dropout=0.3, steps=7)):
        assert all(one is two for one, two in zip(rows(other), (real, pseudo), strict=True))
    for changed, seed in ((QUICK, 1), (replace(QUICK, pseudo_items=1), 0), (replace(QUICK, min_similarity=0.5), 0)):
        same, anew = rows(changed, seed)
        assert (same is real) == (seed == 0)  # another seed has other encoders
        assert len(anew) != len(pseudo) or not torch.equal(anew.id, pseudo.id)


def test_cyclic_batches_hold_their_share_of_real_rows(task: SequenceTask) -> None:
    trainer = make_trainer(task, QUICK)
    real, pseudo = (len(rows) for rows, _ in trainer.ways[0].pools)
    seen: list[int] = []
    for _ in range(4):
        for batch in (trainer.ways[0].batch() for _ in range(trainer.batches)):
            share = int(batch.real.sum())
            assert 0 < share <= QUICK.batch
            assert 0 < len(batch) - share <= QUICK.batch
            seen.append(share)
    assert sum(seen) >= real  # every real row was in a batch
    assert pseudo > 0
    assert trainer.batches == math.ceil(real / len(task.protocols) / QUICK.batch)


def test_a_stream_holds_every_row_once_in_each_pass() -> None:
    stream = training._Stream(23, 7, torch.Generator().manual_seed(0))
    passes = [torch.cat([next(stream) for _ in range(4)]).tolist() for _ in range(2)]
    assert passes[0] != passes[1]
    assert all(sorted(one) == list(range(23)) for one in passes)


def test_a_trainer_is_gone_with_its_last_reference(task: SequenceTask) -> None:
    """A cycle would keep what it trains beside the next trial's."""
    trainer = make_trainer(task, QUICK)
    trainer.epoch()
    gone = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()


def test_without_cyclic_batches_chance_decides(task: SequenceTask) -> None:
    trainer = make_trainer(task, replace(QUICK, cyclic=False))
    shares = {int(batch.real.sum()) for batch in (trainer.ways[0].batch() for _ in range(3 * trainer.batches))}
    assert len(shares) > 1


def test_held_out_targets_do_not_reach_training(task: SequenceTask, scored: HeldOut) -> None:
    """Other validation targets may select another epoch, but the epochs' losses and scores stay as they are."""
    rng = np.random.default_rng(0)
    low, high = task.target
    moved = torch.from_numpy(rng.integers(low, high, len(task.validation)))
    candidates = torch.cat([moved[:, None].int(), task.validation.candidates[:, 1:]], dim=1)
    other = replace(task, validation=replace(task.validation, target=moved, candidates=candidates))
    config = replace(QUICK, epochs=3, patience=3)
    one, two = train_seed("lgcd", config, task, 0), train_seed("lgcd", config, other, 0)
    assert len(one) == len(two) == 4
    for before, after in zip(one[:-1], two[:-1], strict=True):
        assert before.metrics["train_loss"] == after.metrics["train_loss"]
    assert [epoch.metrics["val_ndcg10"] for epoch in one] != [epoch.metrics["val_ndcg10"] for epoch in two]
    assert torch.equal(*(last_epoch_scores(config, given, scored) for given in (task, other)))


def last_epoch_scores(config: Config, task: SequenceTask, held_out: HeldOut) -> torch.Tensor:
    """Scores after two epochs, whichever is the best."""
    places = training.train(config, task, 0)
    with seeded(0, torch.device("cpu")):
        setup, _, epoch = (next(places) for _ in range(3))
    assert isinstance(setup, Setup)
    assert isinstance(epoch, Epoch)
    setup.network.eval()
    with torch.no_grad():
        return epoch.predict(held_out, task, 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"guidance": "none"}, "guidance is 'none'; choose from id, text, cfg, linear, cross_attention"),
        ({"start_ratio": 0.0}, "start_ratio is 0.0; give a number in (0, 1]"),
        ({"steps": 1}, "steps is 1; give a number of at least 2"),
        ({"active_experts": 9}, "active_experts is 9; give at most experts, which is 8"),
        ({"heads": 5}, "heads is 5; give a divisor of 64"),
        (
            {"dropout": 1.0, "lr": 0.0},
            "dropout is 1.0; give a number of at least 0, below 1; lr is 0.0; give a number above 0",
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as refused:
        Config(**wrong)  # type: ignore[arg-type]
    assert str(refused.value) == said
