"""DA-DAN: dual adversarial domain adaptation for non-overlapping recommendation (Guo et al., ACM TOIS 2023).

One domain has sequences with labels, the other sequences alone, and no user is known in both. The sequences of either are
encoded apart and pulled into one code, by two discriminators behind a reversed gradient, a reconstruction and a loss of
difference; items are scored from the code. The labelled domain is the one whose items are recommended, the target.
The formulas are those of the authors' repository (LiuHao-sdnu/DA-DAN); the weights of the losses are not in it, so they
are searched (0.1 each is ours). Other than there: norms are trained, the reconstruction is linear, all users' halves
train, all but the first item of a half are labels, a softmax is over drawn items, and feed-forward maps have biases (ours).
Shapes: B halves, L positions, D vector width, C width of the code, J target-domain items, K drawn items, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import cross_entropy

from features.checks import at_least, choice, dropout_share, refuse, step_size
from trainables.diffusion import timestep_embedding
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequences.blocks import AttentionBlock, Dropout, causal
from trainables.sequences.labels import Batch, Halves, training_labels
from trainables.sequences.losses import distinct, draw_shared, next_item_loss, picked, step
from trainables.sequences.ranking import Scorer, unpacked
from trainables.sequences.views import Bag, Range, batches, newest, newest_of_each
from trainables.tasks.sequential import Sequences, SequenceTask

WIDTH = 64  # D; 100 in the authors' code, 64 for all systems of a comparison
MAX_LENGTH = 50  # newest items that are read
HIDDEN = 100  # of the discriminators
DEVIATION = WIDTH**-0.5  # of the table's start; what is read is sqrt(D) times it (ours: so that Adam's steps move it)
ROUTES = ("target", "mean", "source")

NAME = "DA-DAN"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
ABLATIONS = {
    "wo_adversarial": Variant(config={"adversarial": 0.0}),
    "wo_difference": Variant(config={"difference": 0.0}),
    "wo_reconstruction": Variant(config={"reconstruction": 0.0}),
    "wo_bridge": Variant(config={"bridge": False}),
    "source_only": Variant(config={"adversarial": 0.0, "difference": 0.0, "reconstruction": 0.0}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are those of the authors' code where it gives a value; (ours) marks where it is silent."""

    common: int = 64  # C; 4,500 in the code (ours)
    adversarial: float = 0.1  # gamma (ours)
    difference: float = 2e-5  # lambda (ours): 0.1 at the code's C, for the loss is over C^2; 0.1 ends all codes here
    reconstruction: float = 0.1  # eta (ours)
    reversal: float = (
        0.1  # kappa, what the reversed gradient is multiplied by (ours; 1, with which codes may grow away)
    )
    bridge: bool = True  # the state of the source sequence beside it is added to every item of a target sequence
    route: str = "target"  # target | mean | source: whose code scores; an empty half leaves it to the other (ours)
    dropout: float = 0.1
    negatives: int = 1024  # items of the softmax beside the label, drawn for each batch (ours)
    lr: float = 3e-3  # Adam's (ours; 1e-3)
    batch: int = 256  # halves, half of them of each domain
    epochs: int = 50
    patience: int = 8  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "route", ROUTES),
            *(at_least(self, name, 0) for name in ("adversarial", "difference", "reconstruction", "reversal")),
            *(at_least(self, name, 1) for name in ("common", "negatives", "epochs", "patience")),
            at_least(self, "batch", 2),
            dropout_share(self),
            step_size(self),
        )


class Reversed(Function):
    """The same values; the gradient is multiplied by -factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Return x."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the reversed gradient."""
        return -ctx.factor * gradients[0], None


class Discriminator(nn.Sequential):
    """Which domain a code came from: logits of source (0) and target (1)."""

    def __init__(self, common: int) -> None:
        super().__init__(nn.Linear(common, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))

    def loss(self, code_BC: Tensor, domain: int, factor: float) -> Tensor:
        """Cross-entropy of codes that came from a domain, behind the reversal."""
        label = torch.full((len(code_BC),), domain, device=code_BC.device)
        upright: Tensor = Reversed.apply(code_BC, factor)  # type: ignore[no-untyped-call]
        return cross_entropy(self(upright), label)


class DADAN(nn.Module):
    """An encoder for each domain, the common code and its parts, generators, discriminators and the scores."""

    def __init__(self, config: Config, items: int, source: Range, target: Range) -> None:
        super().__init__()
        self.config, self.source, self.target = config, source, target
        self.item = nn.Embedding(items, WIDTH)
        nn.init.normal_(self.item.weight, std=DEVIATION)
        self.encoders = nn.ModuleList(
            AttentionBlock(WIDTH, 1, 4 * WIDTH, config.dropout, norm="post") for _ in range(2)
        )  # source, target
        self.dropout = Dropout(config.dropout)
        self.code, self.decode = nn.Linear(WIDTH, config.common), nn.Linear(config.common, WIDTH)
        self.shared = nn.Linear(config.common, config.common)
        self.to_target, self.to_source = (nn.Linear(config.common, config.common) for _ in range(2))
        self.is_target, self.is_source = Discriminator(config.common), Discriminator(config.common)  # D_B, D_A
        self.score = nn.Linear(config.common, target[1] - target[0])

    def _read(self, item_BL: Tensor, vector_UD: Tensor, beside_BD: Tensor | None) -> Tensor:
        """What the encoders read of halves, [B, L, D]. `beside`: the source states (the bridge)."""
        vector_BLD = math.sqrt(WIDTH) * picked(vector_UD, item_BL)
        if beside_BD is not None:
            vector_BLD = vector_BLD + beside_BD[:, None]
        read: Tensor = self.dropout(
            vector_BLD + timestep_embedding(torch.arange(item_BL.shape[1], device=item_BL.device), WIDTH)
        )
        return read

    def state(self, bag: Bag, vector_UD: Tensor, domain: int, beside_BD: Tensor | None = None) -> Tensor:
        """State of the last item of each half, [B, D]; 0 for an empty one."""
        encoder = self.encoders[domain]
        assert isinstance(encoder, AttentionBlock)
        return encoder.newest(self._read(bag.item, vector_UD, beside_BD), bag.length) * (bag.length > 0)[:, None]

    def states(self, item_BL: Tensor, vector_UD: Tensor, beside_BD: Tensor | None = None) -> Tensor:
        """State after each item of target halves, [B, L, D]; padding is at the end, in nobody's past."""
        read = self._read(item_BL, vector_UD, beside_BD)
        states: Tensor = self.encoders[1](read, causal(item_BL.shape[1], item_BL.device))
        return states

    def common(self, state_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Z and c of states, [B, C] each."""
        code = self.code(state_BD).relu()
        return code, self.shared(code).relu()

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """C of the route beside a 1 for the items' biases, [R, C + 1]."""
        source, target = (newest_of_each(history, part, MAX_LENGTH) for part in (self.source, self.target))
        weights = self.item.weight
        source_RD = self.state(source, weights, 0)
        target_RD = self.state(target, weights, 1, source_RD if self.config.bridge else None)
        codes = torch.stack([self.common(state)[1] for state in (source_RD, target_RD)])
        wanted = {"source": (1.0, 0.0), "target": (0.0, 1.0), "mean": (0.5, 0.5)}[self.config.route]
        has_2R = torch.stack([source.length > 0, target.length > 0])
        weight_2R = torch.tensor(wanted, device=codes.device)[:, None] * has_2R
        weight_2R = torch.where(weight_2R.sum(dim=0) > 0, weight_2R, has_2R.float())
        code_RC = torch.einsum("pr,prc->rc", weight_2R / weight_2R.sum(dim=0), codes)
        return self.with_one(code_RC)

    @staticmethod
    def with_one(code_RC: Tensor) -> Tensor:
        """Codes beside a 1 for the items' biases, [R, C + 1]."""
        return torch.cat([code_RC, code_RC.new_ones(len(code_RC), 1)], dim=1)

    def items(self, domain: Range) -> Tensor:
        """Weights and bias of the scores of target-domain items, [J, C + 1]."""
        assert domain == self.target
        return torch.cat([self.score.weight, self.score.bias[:, None]], dim=1)


def difference_loss(shared_BC: Tensor, code_BC: Tensor) -> Tensor:
    """Return |C^' Z^|^2_F / C^2, both divided by their rows' norms, which are constants."""
    parts = [part / (part.detach().norm(dim=1, keepdim=True) + 1e-6) for part in (shared_BC, code_BC)]
    total: Tensor = (parts[0].T @ parts[1]).square().sum() / shared_BC.shape[1] ** 2
    return total


class Loss:
    """Loss of a batch of source halves beside target halves, at all of their labels."""

    def __init__(self, config: Config, task: SequenceTask, rng: np.random.Generator) -> None:
        self.config, self.task, self.rng = config, task, rng
        self.halves, self.labels = Halves.of_task(task), training_labels(task, "target")
        self.source_rows = (self.halves.source.lengths > 0).nonzero().squeeze(1)

    def epoch(self) -> Iterator[tuple[Tensor, Batch]]:
        """Yield source halves beside target halves with their labels, of about the same length each.

        They are shuffled apart: no link is kept. The side with fewer of them starts again.
        """
        half = max(1, self.config.batch // 2)
        one = list(batches(self.halves.source.lengths[self.source_rows], half, self.rng))
        other = list(self.labels.batches(half, MAX_LENGTH, self.rng))
        for at in range(max(len(one), len(other))):
            yield self.source_rows[one[at % len(one)]], other[at % len(other)]

    def __call__(self, network: DADAN, row_A: Tensor, batch: Batch) -> Tensor:
        config, size = self.config, min(len(row_A), len(batch.length))
        row_A, kept = row_A[:size], batch.row < size
        row_N, column_N, label_N = batch.row[kept], batch.column[kept], batch.label[kept]
        source = newest(self.halves.source, row_A, self.halves.source.lengths[row_A], MAX_LENGTH)
        wanted, (source_at, target_at) = distinct(self.task.items, source.item, batch.item[:size])
        vector_UD = picked(network.item.weight, wanted)
        source_BD = network.state(Bag(source_at, source.real), vector_UD, 0)
        states = network.states(target_at, vector_UD, source_BD if config.bridge else None)
        target_BD = states[torch.arange(size, device=states.device), batch.length[:size] - 1]
        (source_z, source_c), (target_z, target_c) = network.common(source_BD), network.common(target_BD)
        low, high = self.task.target
        drawn_K = draw_shared([(low, high)], config.negatives, self.rng)[0].to(label_N.device)
        number, count = torch.cat([label_N, drawn_K]) - low, len(label_N)
        scored = torch.cat(
            [network.score.weight.index_select(0, number), network.score.bias.index_select(0, number)[:, None]], dim=1
        )
        user = network.with_one(network.common(states[row_N, column_N])[1])
        loss = next_item_loss(user, label_N, scored[:count], drawn_K, scored[count:], high - low) / count
        if config.adversarial:
            codes = (
                network.is_target.loss(target_z, 1, config.reversal)
                + network.is_target.loss(network.to_target(source_c).relu(), 0, config.reversal)
                + network.is_source.loss(network.to_source(target_c).relu(), 1, config.reversal)
                + network.is_source.loss(source_z, 0, config.reversal)
            )
            loss = loss + config.adversarial * codes
        if config.difference:
            apart = difference_loss(source_c, source_z) + difference_loss(target_c, target_z)
            loss = loss + config.difference * apart
        if config.reconstruction:
            pairs = ((source_BD, source_z), (target_BD, target_z))
            rebuilt = [(state - network.decode(code)).square().mean() for state, code in pairs]
            loss = loss + config.reconstruction * (rebuilt[0] + rebuilt[1])
        return loss


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed, an epoch of all labels of the target halves at a time (ours; one a half in the code)."""
    network, rng = DADAN(config, task.items, task.source, task.target), np.random.default_rng(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    yield Setup(network, optimiser=optimiser, rng=rng)
    loss, scorer = Loss(config, task, rng), Scorer.of_task(network, task, "merged")

    def pack() -> dict[str, Any]:
        return {**scorer.pack(), "source": list(task.source)}

    while True:
        losses = [step(optimiser, loss(network, *halves)) for halves in loss.epoch()]
        yield Epoch(predict=scorer, metrics={"train_loss": sum(losses) / len(losses)}, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    source, target = tuple(state["source"]), tuple(state["target"])
    return unpacked(DADAN(config, len(state["network"]["item.weight"]), source, target), state).scores
