"""DiffuRec: diffusion of the next item's embedding (Li, Sun & Li, ACM TOIS 42(3), 2023, arXiv 2304.00686).

The label's embedding is noised, spread with small random weights over the items of the history, and reconstructed by a
Transformer that sees all of the history at once; at scoring time it is generated from noise alone. The noised label is an
input, so a pass reads one history and predicts the one item after it. In the paper's order: diffusion (eqs. 5-9), the
approximator (10-12), loss (13) and reverse process (14). The text and the authors' code differ in places; where they do,
this follows the code: truncated linear variances, no positions, a random weight at every position and coordinate.
Shapes: B histories, L positions, D vector width, T steps, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from features.checks import at_least, choice, dropout_share, number, refuse, step_size
from trainables.diffusion import MAX_VARIANCE, Diffusion, SameForAll, normal_like, random_steps, timestep_embedding
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequences.blocks import AttentionBlock, Dropout
from trainables.sequences.labels import SEQUENCES_READ, domains_read, training_labels
from trainables.sequences.losses import distinct, draw_shared, softmax_loss, step
from trainables.sequences.ranking import Scorer, by_length, unpacked
from trainables.sequences.views import Range
from trainables.tasks.sequential import Sequences, SequenceTask

WIDTH = 64  # D; 128 in the paper, 64 for all systems of a comparison
HEADS = 4
MAX_LENGTH = 50  # newest items of a history that are read
DEVIATION = 0.02  # of the item table's start (ours; 1, at which these epochs learn popularity and no more)

NAME = "DiffuRec"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
BOTH_DIRECTIONS = True
ABLATIONS = {
    "wo_diffusion": Variant(config={"delta": 0.0}),
    "fixed_lambda": Variant(config={"random_lambda": False}),
    "positions": Variant(config={"positions": True}),
    "one_step": Variant(config={"sampler_steps": 1}),
    "target_only": Variant(config={"sequences": "target"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are the paper's where it gives a value; (ours) marks where it is silent."""

    sequences: str = "merged"  # merged | target: both domains' items are read, or the target domain's alone (ours)
    steps: int = 32  # T
    delta: float = 1e-3  # mean and deviation of lambda, the weight of the noised label at each position
    random_lambda: bool = True  # False: lambda is delta everywhere (ours)
    blocks: int = 4
    dropout: float = 0.1  # of attention, maps and blocks
    dropout_embed: float = 0.3
    positions: bool = False  # position embeddings; the code has them commented out
    sampler_steps: int = 0  # of the reverse process, evenly spaced and without noise; 0: all T, with noise
    negatives: int = 1024  # items of the softmax beside the label, drawn for each batch and domain (ours)
    lr: float = 1e-3  # Adam's
    batch: int = 128  # histories
    epochs: int = 60  # of one random label a sequence (ours)
    patience: int = 5  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "sequences", SEQUENCES_READ),
            *(at_least(self, name, 1) for name in ("steps", "blocks", "negatives", "batch", "epochs", "patience")),
            *(at_least(self, name, 0) for name in ("delta", "sampler_steps")),
            dropout_share(self),
            number(self, "dropout_embed", least=0, below=1),
            step_size(self),
        )


def truncated_linear(steps: int) -> Tensor:
    """Return the variances of the code's schedule, float64 [T]: from 1e-4 a + 0.01 to 0.02 a + 0.01, a = 1000 / T.

    They are cut at MAX_VARIANCE (ours): the code falls back to a smaller end below 21 steps, which leaves half of the
    signal at step T while scoring starts from noise alone.
    """
    scale = 1000 / steps
    return torch.linspace(1e-4 * scale + 0.01, 0.02 * scale + 0.01, steps, dtype=torch.float64).clamp(max=MAX_VARIANCE)


class DiffuRec(nn.Module):
    """Item table, embedding of the step, and blocks of attention without a causal mask: the approximator of x_0."""

    def __init__(self, config: Config, items: int, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.item = nn.Embedding(items, WIDTH)
        nn.init.normal_(self.item.weight, std=DEVIATION)
        self.position = nn.Embedding(MAX_LENGTH, WIDTH) if config.positions else None
        self.time = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.blocks = nn.ModuleList(
            AttentionBlock(WIDTH, HEADS, 4 * WIDTH, config.dropout, activation="gelu_tanh", joined=True)
            for _ in range(config.blocks)
        )
        self.norm, self.out_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.dropout_embed, self.dropout = Dropout(config.dropout_embed), Dropout(config.dropout)
        self.diffusion = Diffusion(truncated_linear(config.steps))

    def weights(self, like_BLD: Tensor, noise: torch.Generator | SameForAll) -> Tensor:
        """Lambda of every position and coordinate, N(delta, delta) each: [B, L, D], or of one row for all."""
        delta = self.config.delta
        if not self.config.random_lambda or delta == 0:
            return torch.full_like(like_BLD[:1, :1], delta)
        if isinstance(noise, SameForAll):  # as many draws whatever the length of the other rows
            longest = like_BLD.new_zeros(1, 1, 1).expand(len(like_BLD), MAX_LENGTH, WIDTH)
            return delta + delta * normal_like(longest, noise)[:, : like_BLD.shape[1]]
        return delta + delta * normal_like(like_BLD, noise)

    def denoise(
        self, vector_BLD: Tensor, length_B: Tensor, xt_BD: Tensor, t_B: Tensor, noise: torch.Generator | SameForAll
    ) -> Tensor:
        """Prediction of x_0 from a history and the noised label, [B, D] (eqs. 10-12)."""
        place_L = torch.arange(vector_BLD.shape[1], device=length_B.device)
        x = self.dropout_embed(vector_BLD)
        if self.position is not None:
            x = x + self.position((place_L + MAX_LENGTH - length_B[:, None]).clamp(max=MAX_LENGTH - 1))
        x = self.norm(x)
        step_BD = self.time(timestep_embedding(t_B * (1000 / self.config.steps), WIDTH))
        x = x + self.weights(x, noise) * (xt_BD + step_BD)[:, None]
        mask = (place_L < length_B[:, None])[:, None, None]
        *blocks, last = self.blocks
        for block in blocks:
            x = self.dropout(block(x, mask))
        assert isinstance(last, AttentionBlock)
        last_BD: Tensor = self.out_norm(self.dropout(self.dropout(last.newest(x, length_B))))
        return last_BD

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """What is generated for each history, [R, D] (eq. 14); all rows have the same noise, drawn from the seed."""

        def generated(item_BL: Tensor, length_B: Tensor) -> Tensor:
            noise, vector_BLD = SameForAll(torch.Generator().manual_seed(self.seed)), self.item(item_BL)

            def denoise(xt_BD: Tensor, t_B: Tensor, condition: Tensor | None) -> Tensor:
                return self.denoise(vector_BLD, length_B, xt_BD, t_B, noise)

            start, few = normal_like(vector_BLD[:, 0], noise), self.config.sampler_steps
            if few:
                return self.diffusion.strided(denoise, None, start, self.config.steps, few)
            return self.diffusion.generate(denoise, None, start, noise)

        return by_length(history, MAX_LENGTH, generated)

    def items(self, domain: Range) -> Tensor:
        """The table serves input and output, [J, D]."""
        return self.item.weight[domain[0] : domain[1]]


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed, an epoch of one random label a sequence at a time; no squared error, a softmax alone (eq. 13)."""
    network, rng = DiffuRec(config, task.items, seed), np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    yield Setup(network, optimiser=optimiser, rng=rng, generator=generator)
    labels = training_labels(task, config.sequences)
    domains = domains_read(task, config.sequences)
    scorer = Scorer.of_task(network, task, config.sequences)
    while True:
        losses = []
        for batch in labels[labels.one_each(rng)].batches(config.batch, MAX_LENGTH, rng):
            drawn = draw_shared(domains, config.negatives, rng).to(batch.label.device)
            wanted, (item_at, label_at, drawn_at) = distinct(task.items, batch.item, batch.label, drawn)
            vector_UD = network.item(wanted)
            label_BD = vector_UD[label_at]
            t_B = random_steps(len(label_BD), config.steps, generator, label_BD.device)
            noised_BD = network.diffusion.noised(label_BD, t_B, normal_like(label_BD, generator))
            x0_BD = network.denoise(vector_UD[item_at], batch.length, noised_BD, t_B, generator)
            loss = softmax_loss(x0_BD, batch.label, label_BD, domains, drawn, vector_UD[drawn_at])
            losses.append(step(optimiser, loss))
        metrics = {"train_loss": sum(losses) / len(losses)}
        yield Epoch(predict=scorer, turned=scorer.turned, metrics=metrics, pack=scorer.pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    return unpacked(DiffuRec(config, len(state["network"]["item.weight"]), seed), state).scores
