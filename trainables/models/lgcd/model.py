"""LGCD: language-guided conditional diffusion for cross-domain sequential recommendation (arXiv 2604.05365).

In the paper's order: conditions and target features come from `trainables.models.lgcd.conditions` over pretrained
encoders (eqs. 1-8); here are the denoiser (12-16), the reverse process from a guess (18-20), the fusion by a mixture of
experts (23-24) and the losses (17, 21, 22, 25-27).
Shapes: B batch of rows, C condition tokens, D vector width, E experts, T steps, N items of the target domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from features.checks import at_least, choice, dropout_share, refuse, step_size, variance_range
from trainables.diffusion import (
    Diffusion,
    Noise,
    SameForAll,
    normal_like,
    random_steps,
    timestep_embedding,
    variances,
)
from trainables.interface import Epoch, Figure, Place, Selection, Setup, Variant
from trainables.models.lgcd.conditions import Rows, pseudo_rows, real_rows
from trainables.models.lgcd.encoders import (
    SEQUENCES,
    Encoders,
    PretrainSpec,
    encoders_folder,
    pretrained,
    represent,
    serving_encoders,
)
from trainables.sequence_tools import next_item_loss
from trainables.tasks.sequential import HeldOut, Sequences, SequenceTask

WIDTH = 64  # D (settings: hidden dimension)
# Share of rows without condition in training, for classifier-free guidance (Ho & Salimans 2022).
CONDITION_DROPPED = 0.1
GUIDANCE = ("id", "text", "cfg", "linear", "cross_attention")
PREDICTS = ("x0", "noise")
TRAIN_REVERSE = ("one_step", "guess", "chain")

NAME = "LGCD"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
NEEDS = ("titles", "pseudo_items")
ABLATIONS = {  # Table 3
    "wo_diffusion": Variant(config={"diffusion": False}),
    "wo_overlap_diffusion": Variant(config={"overlap_diffusion": False}),
    "wo_pseudo_diffusion": Variant(config={"pseudo_diffusion": False}),
    "wo_alignment": Variant(config={"alignment": False}),
    "wo_guesser": Variant(config={"guesser": False}),
    "wo_moe": Variant(config={"moe": False}),
    "wo_cyclic": Variant(config={"cyclic": False}),
}
FIGURES = {
    "pseudo_items": Figure(
        name="figure_3a_pseudo_items", title="NDCG@10 over pseudo-items per user n_K (LGCD Figure 3)",
        label="Pseudo-items per user n_K",
    ),
    "steps": Figure(
        name="figure_3b_steps", title="NDCG@10 over diffusion steps T (LGCD Figure 3)", label="Diffusion steps T"
    ),
    "start_ratio": Figure(
        name="figure_3c_start_ratio", title="NDCG@10 over the start ratio λ (LGCD Figure 3)", label="Start ratio λ"
    ),
    "guidance": Figure(
        name="figure_4_guidance", title="Ways to guide the diffusion (LGCD Figure 4)", label="Guidance", order=GUIDANCE
    ),
    "predicts": Figure(
        name="figure_5_predicts", title="Predicting the feature or the noise (LGCD Figure 5)", label="Prediction target",
        order=PREDICTS,
    ),
    "overlap_ratio": Figure(
        name="figure_6_overlap_ratio", title="NDCG@10 over the overlap ratio (LGCD Figure 6)", label="Overlap ratio"
    ),
    "sampler_steps": Figure(
        name="sampler_steps", title="Quality against cost of the strided sampler", label="Sampler steps S (0: all)",
        metrics=("val_ndcg10", "val_seconds"),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. The defaults are the paper's where it gives a value; (ours) marks where it is silent."""

    pseudo_items: int = 10  # n_K, generated items that are inserted per single-domain user, one a text (Figure 3)
    min_similarity: float = 0.0  # least cosine of text and item for one to be inserted: n_K per user (ours)
    steps: int = 100  # T, diffusion steps (Figure 3)
    variance_start: float = 1e-4  # beta_1 (settings)
    variance_end: float = 0.1  # beta_T (settings)
    start_ratio: float = 0.5  # lambda: the reverse process starts at lambda T (food's optimum in Figure 3)
    sampler_steps: int = 0  # S, steps of the deterministic strided sampler; 0: every step, eqs. 19-20 (ours)
    guidance: str = "cross_attention"  # id | text | cfg | linear | cross_attention (Figure 4)
    guidance_weight: float = 0.5  # w of classifier-free guidance; read by `cfg` only (ours)
    predicts: str = "x0"  # x0 | noise (Figure 5)
    train_reverse: str = "guess"  # h_rev in training: one_step | guess | chain (ours, see `Network.losses`)
    heads: int = 4  # of the cross-attention (settings)
    experts: int = 8  # E (settings)
    active_experts: int = 0  # experts with the largest gates that are used; 0: all (ours)
    dropout: float = 0.1  # of denoiser and fusion (searched)
    lr: float = 1e-3  # Adam's (settings)
    batch: int = 128  # pseudo-overlapping rows of a batch, and as many real ones beside them (settings)
    epochs: int = 15  # of as many real rows as there are under one protocol (ours)
    patience: int = 2  # epochs without a better validation NDCG@10 before training ends (ours)
    negatives: int = 1024  # items of the softmax beside the target (ours)
    diffusion: bool = True  # Table 3, as all below
    overlap_diffusion: bool = True  # diffusion and guesser learn from real overlapping users
    pseudo_diffusion: bool = True  # diffusion learns from pseudo-overlapping users
    alignment: bool = True  # eq. 21
    guesser: bool = True  # False: the reverse process starts from 0, noised to T
    moe: bool = True  # False: one linear map
    cyclic: bool = True  # False: a batch holds as many real rows as chance gives it
    encoder_sequences: str = "merged"  # what pretraining reads: merged | separate (see trainables.models.lgcd.encoders)
    encoder_epochs: int = 10  # of pretraining (ours)

    def __post_init__(self) -> None:
        refuse(
            *(choice(self, "guidance", GUIDANCE), choice(self, "predicts", PREDICTS)),
            *(choice(self, "train_reverse", TRAIN_REVERSE), choice(self, "encoder_sequences", SEQUENCES)),
            *(at_least(self, name, 1) for name in ("heads", "experts", "batch", "epochs", "patience", "negatives")),
            *(at_least(self, name, 0) for name in ("pseudo_items", "sampler_steps", "active_experts")),
            *(at_least(self, "steps", 2), at_least(self, "encoder_epochs", 1)),
            "" if -1 <= self.min_similarity <= 1 else f"min_similarity is {self.min_similarity}; give a cosine",
            "" if 0 < self.start_ratio <= 1 else f"start_ratio is {self.start_ratio}; give a number in (0, 1]",
            dropout_share(self),
            at_least(self, "guidance_weight", 0),
            step_size(self),
            ""
            if self.active_experts <= self.experts
            else f"active_experts is {self.active_experts}; give at most experts, which is {self.experts}",
            variance_range(self),
            "" if WIDTH % self.heads == 0 else f"heads is {self.heads}; give a divisor of {WIDTH}",
        )

    @property
    def pretraining(self) -> PretrainSpec:
        """What makes the encoders; nothing else in the config does."""
        return PretrainSpec(width=WIDTH, epochs=self.encoder_epochs, sequences=self.encoder_sequences)


# --- denoiser, guesser, fusion ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """What the reverse process knows of a user."""

    tokens: Tensor  # [B, C, D]: ID part and text part of h_cond, or the one of them that is used
    hidden: Tensor  # bool [B, C], tokens that a row does not have
    whole: Tensor  # h_cond, [B, D] (eq. 8); the sum of the tokens


class CrossAttention(nn.Module):
    """The noisy feature reads the condition's ID and text parts as two tokens (eq. 13).

    Two are (ours): over eq. 13's one token, h_cond, a softmax weighs nothing.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key_value = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x_BD: Tensor, condition: Condition) -> Tensor:
        """[B, D] -> [B, D]."""
        B, C, _ = condition.tokens.shape
        query_B1HK = self.query(x_BD).view(B, 1, self.heads, -1)
        key_BCHK, value_BCHK = self.key_value(condition.tokens).view(B, C, 2, self.heads, -1).unbind(dim=2)
        # Written out: the fused attention of torch takes 3 times as long for two tokens.
        logits_BCH = (query_B1HK * key_BCHK).sum(dim=-1) / math.sqrt(WIDTH // self.heads)
        weight_BCH = logits_BCH.masked_fill(condition.hidden[:, :, None], -torch.inf).softmax(dim=1)
        out: Tensor = self.out((weight_BCH[..., None] * value_BCHK).sum(dim=1).reshape(B, WIDTH))
        return out


class Denoiser(nn.Module):
    """f(x_t, t, c) of eqs. 12-16; the caller says what it predicts: x_0, or the noise."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        attends = config.guidance in ("cross_attention", "id", "text")
        self.attention = CrossAttention(config.heads) if attends else None
        self.linear = None if attends else nn.Linear(WIDTH, WIDTH)
        self.map = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x_BD: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """[B, D] -> [B, D]."""
        embedded = timestep_embedding(t_B, WIDTH)
        if self.attention is not None:
            read = self.attention(x_BD + embedded, condition)
        else:  # the noisy feature comes in at the residual alone, as above
            assert self.linear is not None
            read = embedded + self.linear(condition.whole)
        x = read + x_BD
        out: Tensor = x + self.map(x)
        return out


class Experts(nn.Module):
    """Gate on the condition, experts on condition and generated feature (eqs. 23-24).

    Experts start as the identity on the condition (ours), so that training starts from what the encoders recommend.
    """

    def __init__(self, experts: int, active: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts)
        start = torch.cat([torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)], dim=1)
        self.weight = nn.Parameter(start + 0.01 * torch.randn(experts, WIDTH, 2 * WIDTH))
        self.bias = nn.Parameter(torch.zeros(experts, WIDTH))
        self.active = active or experts

    def forward(self, condition_BD: Tensor, generated_BD: Tensor) -> Tensor:
        """h_final, [B, D]."""
        logits_BE = self.gate(condition_BD)
        if self.active < logits_BE.shape[1]:
            least = logits_BE.topk(self.active, dim=1).values[:, -1:]
            logits_BE = logits_BE.masked_fill(logits_BE < least, -torch.inf)
        both = torch.cat([condition_BD, generated_BD], dim=1)
        answer_BED = functional.linear(both, self.weight.flatten(0, 1), self.bias.flatten()).view(len(both), -1, WIDTH)
        final: Tensor = (logits_BE.softmax(dim=1)[:, :, None] * answer_BED).sum(dim=1)
        return final


class Network(nn.Module):
    """All that a trial trains, for one direction."""

    def __init__(self, config: Config, fusion: nn.Linear) -> None:
        super().__init__()
        self.config = config
        self.id_map = nn.Linear(WIDTH, WIDTH)  # the two halves of f_fusion (eq. 8) start as pretraining left them
        self.text_map = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.id_map.weight.copy_(fusion.weight[:, :WIDTH])
            self.id_map.bias.copy_(fusion.bias)
            self.text_map.weight.copy_(fusion.weight[:, WIDTH:])
        self.denoiser = Denoiser(config)
        self.guess = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))  # eq. 18
        self.fusion = Experts(config.experts if config.moe else 1, config.active_experts if config.moe else 0)
        self.dropout = nn.Dropout(config.dropout)
        self.diffusion = Diffusion(variances(config.steps, config.variance_start, config.variance_end, "linear_sqrt"))
        # Where the reverse process starts: lambda T, or T where there is no guess to start from.
        self.first = max(1, round(config.start_ratio * config.steps)) if config.guesser else config.steps

    def condition(self, id_BD: Tensor, text_BD: Tensor, real_B: Tensor) -> Condition:
        """h_cond and its parts from the representations of the visible history (eq. 8)."""
        id_part, text_part = self.dropout(self.id_map(id_BD)), self.dropout(self.text_map(text_BD))
        lacking = ~real_B
        if self.config.guidance == "id":
            return Condition(id_part[:, None], torch.zeros_like(lacking)[:, None], id_part)
        if self.config.guidance == "text":
            only = text_part + self.id_map.bias
            return Condition(only[:, None], torch.zeros_like(lacking)[:, None], only)
        tokens = torch.stack([id_part, text_part], dim=1)
        return Condition(tokens, torch.stack([torch.zeros_like(lacking), lacking], dim=1), id_part + text_part)

    def clean(self, x_BD: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """Prediction of x_0 (eq. 16), whatever the denoiser predicts; guided where the config says so."""
        predicted: Tensor = self.denoiser(x_BD, t_B, condition)
        if self.config.guidance == "cfg" and not self.training:
            nothing = Condition(condition.tokens, condition.hidden, torch.zeros_like(condition.whole))
            without = self.denoiser(x_BD, t_B, nothing)
            predicted = predicted + self.config.guidance_weight * (predicted - without)
        if self.config.predicts == "noise":
            predicted = self.diffusion.clean(x_BD, t_B, predicted)
        return predicted

    def start(self, condition: Condition) -> Tensor:
        """h_init (eq. 18), [B, D]; 0 without guesser, so that noise alone is left of it at T."""
        guessed: Tensor = self.guess(condition.whole) if self.config.guesser else torch.zeros_like(condition.whole)
        return guessed

    def reverse(self, start_BD: Tensor, condition: Condition, generator: Noise) -> Tensor:
        """h_rev: from a start noised to lambda T, or to T without guesser, down to 0 (eqs. 18-20)."""
        config, diffusion = self.config, self.diffusion
        t_B = torch.full((len(start_BD),), self.first, device=start_BD.device)
        x = diffusion.noised(start_BD, t_B, normal_like(start_BD, generator))

        def denoise(x_BD: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
            return self.clean(x_BD, t, condition)

        if config.sampler_steps:
            return diffusion.strided(denoise, None, x, self.first, config.sampler_steps)
        return diffusion.generate(denoise, None, x, generator, first=self.first)

    def final(self, condition: Condition, generated_BD: Tensor) -> Tensor:
        """h_final, [B, D] (eq. 24); without diffusion the experts read the condition alone."""
        final: Tensor = self.fusion(condition.whole, generated_BD if self.config.diffusion else 0 * condition.whole)
        return final

    def losses(self, rows: Rows, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """h_final of the rows [B, D], and the sum of all losses but L_rec (eqs. 17, 21, 22).

        Each is a mean over D and the rows that it is about; the equations' norms are sums over D (ours; LOG 2026-11-26).

        `train_reverse` says which h_rev the experts and L_align see: `one_step` the prediction that L_diff is about, which
        starts from the true feature; `guess` one prediction from the noised guess at lambda T, where inference starts;
        `chain` the whole reverse process, of which only the last step has a gradient.
        """
        config, diffusion, real = self.config, self.diffusion, rows.real
        condition = self.condition(rows.id, rows.text, rows.real)
        if not config.diffusion:
            return self.final(condition, condition.whole), condition.whole.new_zeros(())
        guess = self.start(condition)
        start = torch.where(rows.has_feature[:, None], rows.feature, guess.detach())
        t_B = random_steps(len(rows), config.steps, generator, start.device)
        noise = normal_like(start, generator)
        given = condition
        if config.guidance == "cfg":
            kept = torch.rand(len(rows), 1, generator=generator).to(start.device) >= CONDITION_DROPPED
            given = Condition(condition.tokens, condition.hidden, condition.whole * kept)
        noisy = diffusion.noised(start, t_B, noise)
        predicted = self.denoiser(noisy, t_B, given)
        learns = rows.has_feature & ((real & config.overlap_diffusion) | (~real & config.pseudo_diffusion))
        loss = _mean_square(predicted - (noise if config.predicts == "noise" else rows.feature), learns)
        if config.guesser:
            loss = loss + _mean_square(guess - rows.feature, rows.has_feature & real & config.overlap_diffusion)
        generated = self._generated(predicted, noisy, t_B, guess, condition, generator)
        if config.alignment:
            loss = loss + _mean_square(generated - condition.whole, ~real)
        return self.final(condition, generated), loss

    def _generated(
        self, predicted: Tensor, noisy: Tensor, t_B: Tensor, guess: Tensor, condition: Condition,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """h_rev as training sees it."""
        config, diffusion = self.config, self.diffusion
        if config.train_reverse == "one_step":
            return diffusion.clean(noisy, t_B, predicted) if config.predicts == "noise" else predicted
        if config.train_reverse == "chain":
            with torch.no_grad():
                start, first = self.reverse(guess, condition, generator), 1
        else:
            start, first = guess, self.first
        t_B = torch.full_like(t_B, first)
        return self.clean(diffusion.noised(start, t_B, normal_like(start, generator)), t_B, condition)

    @torch.no_grad()
    def recommend(self, id_BD: Tensor, text_BD: Tensor, generator: Noise) -> Tensor:
        """h_final of users, [B, D]."""
        condition = self.condition(id_BD, text_BD, torch.ones(len(id_BD), dtype=torch.bool, device=id_BD.device))
        if not self.config.diffusion:
            return self.final(condition, condition.whole)
        return self.final(condition, self.reverse(self.start(condition), condition, generator))


def _mean_square(difference_BD: Tensor, chosen_B: Tensor) -> Tensor:
    """Mean over D and the chosen rows; 0 where none is chosen."""
    return (difference_BD.square().mean(dim=1) * chosen_B).sum() / chosen_B.sum().clamp(min=1)


# --- training -----------------------------------------------------------------------------------------------------


def prepare(config: Config, task: SequenceTask, seeds: Sequence[int]) -> None:
    """Pretrain what the trials share, where it is missing; a kill costs the epochs in progress, one a seed."""
    for seed in seeds:
        pretrained(task, config.pretraining, seed)


def shared(config: Config, task: SequenceTask, seeds: Sequence[int]) -> list[Path]:
    """Folders of the pretrained encoders, in that of all tasks."""
    return [encoders_folder(task, config.pretraining, seed) for seed in seeds]


def train(config: Config, task: SequenceTask, seed: int) -> Generator[Place]:
    """Train the network over frozen encoders."""
    trainer = _Trainer(config, task, seed, pretrained(task, config.pretraining, seed))
    streams = {f"stream_{number}": stream.progress for number, (_, stream) in enumerate(trainer.streams)}
    yield Setup(
        trainer.network, optimiser=trainer.optimiser, generator=trainer.generator, rng=trainer.rng, **streams
    )  # fmt: skip
    while True:
        loss = trainer.epoch()
        yield Epoch(predict=trainer.predict, metrics={"train_loss": loss}, pack=trainer.pack)


class _Trainer:
    """One training of one seed."""

    def __init__(self, config: Config, task: SequenceTask, seed: int, encoders: Encoders) -> None:
        self.config, self.task, self.encoders, self.device = config, task, encoders, task.device
        self.generator, self.rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        self.network = Network(config, encoders.fusion)
        with torch.no_grad():
            self.items = encoders.fuse_items(*encoders.look_up(torch.arange(task.items, device=self.device)))
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=config.lr, fused=True)
        real, pseudo = training_rows(config, task, encoders, seed)
        size, kinds = config.batch, [rows for rows in (real, pseudo) if len(rows)]
        self.batches = math.ceil(len(real) / len(task.protocols) / size)
        pools = [(rows, size) for rows in kinds] if config.cyclic else [(Rows.joined(kinds), size * len(kinds))]
        self.streams = [(rows, _Stream(len(rows), size, self.generator)) for rows, size in pools]

    def epoch(self) -> float:
        """As many real rows as there are under one protocol; mean loss."""
        losses = [self._step(rows) for rows in self._batches()]
        return sum(losses) / len(losses)

    def predict(self, held_out: HeldOut, task: SequenceTask, seed: int) -> Tensor:
        """Scores of all target-domain items, [R, J] (eq. 25)."""
        by_id, by_text = represent(self.encoders, held_out.history, last=True)
        final_RD = self.network.recommend(by_id, by_text, torch.Generator().manual_seed(seed))
        return final_RD @ self.items[task.target[0] : task.target[1]].T

    def pack(self) -> dict[str, Any]:
        """What `unpack` needs; the vectors of titles only as the encoders read them, [I, D]."""
        encoders = self.encoders
        weights = {name: value for name, value in encoders.state_dict().items() if not name.startswith("text_map.")}
        return {
            "network": self.network.state_dict(), "encoders": weights, "titles": encoders.text_map(encoders.text),
            "target": list(self.task.target),
        }  # fmt: skip

    def _step(self, rows: Rows) -> float:
        final, loss = self.network.losses(rows, self.generator)
        low, high = self.task.target
        drawn = torch.from_numpy(self.rng.integers(low, high, self.config.negatives)).to(self.device)
        recommended = next_item_loss(final, rows.item, self.items[rows.item], drawn, self.items[drawn], high - low)
        loss = loss + recommended / len(rows)  # eqs. 26 and 27
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}; lower lr")
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        return value

    def _batches(self) -> Iterator[Rows]:
        """Cyclic batches: `batch` real rows and as many pseudo-overlapping ones, whose passes go on over epochs.

        Without `cyclic` a batch has as many rows, drawn from all alike.
        """
        for _ in range(self.batches):
            yield Rows.joined([rows[next(stream).to(self.device)] for rows, stream in self.streams])


class _Stream:
    """Batches of row numbers for ever, pass after pass in a new order."""

    def __init__(self, rows: int, size: int, generator: torch.Generator) -> None:
        self.rows, self.size, self.generator = rows, size, generator
        self.progress: dict[str, list[Tensor]] = {"waiting": []}
        """Batches of this pass that are still to come."""

    def __next__(self) -> Tensor:
        if not self.progress["waiting"]:
            order = torch.randperm(self.rows, generator=self.generator)
            self.progress["waiting"] = list(torch.split(order, self.size))
        return self.progress["waiting"].pop(0)


def training_rows(config: Config, task: SequenceTask, encoders: Encoders, seed: int) -> tuple[Rows, Rows]:
    """Real and pseudo-overlapping rows (the latter empty where the config or the task has no pseudo-items)."""
    real = _real_rows(task, encoders)
    count = min(config.pseudo_items, task.pseudo.shape[1])
    if not count:
        return real, real[torch.zeros(0, dtype=torch.int64, device=task.device)]
    by_text = config.guidance == "text"  # the condition has no other part then
    return real, _pseudo_rows(task, encoders, count, config.min_similarity, seed, by_text)


# Reading all sequences takes as long as several epochs, and most trials of a process read the same ones. Two of each are
# kept (250 MB on Food-Kitchen): the two directions of a pair take turns.
_real_rows = lru_cache(maxsize=2)(real_rows)


@lru_cache(maxsize=2)
def _pseudo_rows(
    task: SequenceTask, encoders: Encoders, count: int, min_similarity: float, seed: int, by_text: bool
) -> Rows:
    return pseudo_rows(task, encoders, count, min_similarity, np.random.default_rng(seed), by_text=by_text)


# --- recommending -------------------------------------------------------------------------------------------------


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Scores of all target-domain items, [U, J], by users' histories; a user's depend on no other user's row."""
    encoders = serving_encoders(config.pretraining, state["titles"], state["encoders"])
    network = Network(config, encoders.fusion).eval()
    network.load_state_dict(state["network"])
    with torch.no_grad():
        wanted = torch.arange(*state["target"])
        items_JD = encoders.fuse_items(*encoders.look_up(wanted))

    @torch.no_grad()
    def score(histories: Sequences) -> Tensor:
        by_id, by_text = represent(encoders, histories, last=True)
        final = network.recommend(by_id, by_text, SameForAll(torch.Generator().manual_seed(seed)))
        scores: Tensor = final @ items_JD.T
        return scores

    return score
