"""CTT: contrastive text-enhanced Transformer (Zhou, Cai & Pan, KDD 2025, doi 10.1145/3711896.3736893).

A reconstruction from the paper's abstract and two summaries by others; no code is public. Known: item texts bridge the
domains. Within the target, a behaviour intent comes from the ID sequence and a semantic one from the text sequence;
between the domains, an attention whose queries are target texts, whose keys are source texts and whose values are source
IDs, by weights that both domains share; the map of target texts among themselves and that to source texts are aligned
before they meet the values; both views are joined; a contrast draws together an overlapping user's semantic and
behavioural vectors of different domains. Not known, hence ours: the alignment (here the product of both maps), the
pairing of the contrast, layers, weights and defaults.
Shapes: B users, L target positions, M source positions, N labels, F text width, D vector width, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from features.checks import at_least, choice, dropout_share, number, refuse, step_size
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequences.blocks import AttentionBlock, Dropout, biases_at_zero, causal, start_as_mean
from trainables.sequences.labels import TargetLabels
from trainables.sequences.losses import TargetLoss, contrast_with, step
from trainables.sequences.ranking import Scorer, unpacked
from trainables.sequences.views import Bag, Range, newest_of_each
from trainables.tasks.sequential import Sequences, SequenceTask

WIDTH = 64  # D
MAX_LENGTH = 50  # newest items of each domain that are read
DEVIATION = 0.02  # of the tables' start
TEXT_WEIGHT = 0.03  # of an item's text beside its ID: of one size at the start; at 1 IDs are not learned
ROWS = 4096  # items whose texts are mapped at once without gradients
LOSSES, ALIGNS = ("softmax", "bce"), ("product", "none")

NAME = "CTT"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
NEEDS = ("titles",)
NOTE = "reconstruction"
ABLATIONS = {
    "wo_text": Variant(config={"text": False}),
    "wo_inter": Variant(config={"inter": False}),
    "wo_contrast": Variant(config={"contrast": 0.0}),
    "wo_align": Variant(config={"align": "none"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters of the reconstruction; all are ours."""

    loss: str = "softmax"  # softmax | bce
    text: bool = True  # False: no text is read: no semantic intent, maps of IDs, and items are ranked by IDs alone
    inter: bool = True  # the view between the domains
    align: str = "product"  # product | none: target texts read source items through target texts like them, or directly
    item_text: bool = True  # items are ranked by ID and text, else by ID alone
    contrast: float = 0.1  # weight of the contrast
    tau: float = 0.1  # its temperature
    blocks: int = 2
    dropout: float = 0.5
    negatives: int = 512  # items of the softmax beside the label, drawn for each batch
    lr: float = 1e-3  # Adam's
    batch: int = 128  # users
    epochs: int = 60
    patience: int = 5  # epochs without a better validation NDCG@10 before training ends

    def __post_init__(self) -> None:
        refuse(
            choice(self, "loss", LOSSES),
            choice(self, "align", ALIGNS),
            at_least(self, "contrast", 0),
            number(self, "tau", above=0),
            *(at_least(self, name, 1) for name in ("blocks", "negatives", "batch", "epochs", "patience")),
            dropout_share(self),
            step_size(self),
        )


class CTT(nn.Module):
    """ID table, map of texts, behaviour blocks, and maps of attention that both domains share."""

    texts: Tensor  # float32 [I, F]

    def __init__(self, config: Config, texts: Tensor, source: Range, target: Range) -> None:
        super().__init__()
        self.config, self.source, self.target = config, source, target
        self.register_buffer("texts", texts, persistent=False)  # of the task: no checkpoint holds it
        self.item, self.position = nn.Embedding(len(texts), WIDTH), nn.Embedding(MAX_LENGTH, WIDTH)
        for table in (self.item, self.position):
            nn.init.normal_(table.weight, std=DEVIATION)
        self.text_map = nn.Linear(texts.shape[1], WIDTH)
        self.behaviour = nn.ModuleList(AttentionBlock(WIDTH, 1, WIDTH, config.dropout) for _ in range(config.blocks))
        self.query, self.key = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.text_value, self.id_value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.within = nn.Linear(2 * WIDTH, WIDTH)  # W_a
        self.between = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.join, self.norm = nn.Linear(2 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.cold = nn.Parameter(torch.randn(WIDTH) * DEVIATION)  # query where there is no target text
        self.dropout = Dropout(config.dropout)
        biases_at_zero(self)
        start_as_mean(self.text_value, self.id_value, self.within, self.join)

    def compared(self, item: Tensor) -> Tensor:
        """What maps of attention compare: texts of items, or IDs where no text is read, [..., D]."""
        vector: Tensor = self.text_map(self.texts[item]) if self.config.text else self.item(item)
        return vector

    def intents(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """Behaviour and semantic intent after each item of a bag, and the map of its texts: [B, L, D], same, [B, L, L]."""
        x, L = math.sqrt(WIDTH) * self.item(bag.item), bag.item.shape[1]
        place = torch.arange(L, device=bag.item.device) + MAX_LENGTH - bag.length[:, None]
        x, mask = self.dropout(x + self.position(place.clamp(0, MAX_LENGTH - 1))), causal(L, bag.item.device)
        for block in self.behaviour:
            x = block(x, mask)
        text = self.compared(bag.item)
        weights = self.attention(self.query(text), self.key(text), mask[:, 0])
        return x, weights @ self.text_value(text) * float(self.config.text), weights

    @staticmethod
    def attention(query: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
        """Softmax over allowed keys, [B, L, M]; 0 for a query that nothing is allowed."""
        logits = (query @ key.transpose(1, 2) / math.sqrt(WIDTH)).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return logits.softmax(dim=2) * allowed.any(dim=2, keepdim=True)

    def crossed(self, target: Bag, weights_BLL: Tensor, source: Bag, reads_BLM: Tensor) -> Tensor:
        """View between the domains before each label: [B, L + 1, D], at first that of the learned query.

        `reads` [B, L + 1, M]: source items before each label.
        """
        if not self.config.inter:
            return self.cold.new_zeros(*reads_BLM.shape[:2], WIDTH)
        text = self.compared(target.item)
        queries = torch.cat([self.cold.expand(len(text), 1, WIDTH), self.query(text)], dim=1)
        keys = self.key(self.compared(source.item))
        if self.config.align == "product":
            # A label's row of the target's map picks among the rows of its own reads: later source items stay unread.
            logits = (queries @ keys.transpose(1, 2) / math.sqrt(WIDTH)).clamp(-60, 60).exp()
            shared = logits[:, 1:, None] * reads_BLM[:, None, 1:]  # [B, i, label, M]: text i, what this label may read
            rows = shared / shared.sum(dim=3, keepdim=True).clamp(min=1e-30)
            aligned = torch.einsum("bli,bilm->blm", weights_BLL, rows)
            first = self.attention(queries[:, :1], keys, reads_BLM[:, :1])
            maps = torch.cat([first, aligned], dim=1)
        else:
            maps = self.attention(queries, keys, reads_BLM)
        out: Tensor = self.between(maps @ self.id_value(self.item(source.item)))
        return out * reads_BLM.any(dim=2, keepdim=True)

    def joined(self, behaviour: Tensor, semantic: Tensor, between: Tensor) -> Tensor:
        """u, [..., D]."""
        inside = self.within(torch.cat([behaviour, semantic], dim=-1))
        out: Tensor = self.norm(self.join(torch.cat([inside, between], dim=-1)))
        return out

    def vectors(self, item: Tensor) -> Tensor:
        """What users are multiplied by to score these items, [..., D]."""
        vector: Tensor = self.item(item)
        with_text = self.config.item_text and self.config.text
        return vector + TEXT_WEIGHT * self.text_map(self.texts[item]) if with_text else vector

    def states(self, target: Bag, source: Bag, reads_BLM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U before each label and after the last item, [B, L + 1, D], and both intents of the target's items."""
        behaviour, semantic, weights = self.intents(target)
        between = self.crossed(target, weights, source, reads_BLM)
        nothing = behaviour.new_zeros(len(behaviour), 1, WIDTH)
        own, meaning = (torch.cat([nothing, part], dim=1) for part in (behaviour, semantic))
        return self.joined(own, meaning, between), behaviour, semantic

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """U after the last item of each history, [R, D]."""
        source, target = (newest_of_each(history, part, MAX_LENGTH) for part in (self.source, self.target))
        reads = source.real[:, None].expand(-1, target.item.shape[1] + 1, -1)
        states, _, _ = self.states(target, source, reads)
        return states[torch.arange(len(history), device=history.device), target.length]

    def items(self, domain: Range) -> Tensor:
        """Vectors of a domain's items, [J, D]."""
        numbers = torch.arange(*domain, device=self.cold.device)
        return torch.cat([self.vectors(part) for part in torch.split(numbers, ROWS)])


def contrast_of_users(one_BD: Tensor, other_BD: Tensor, temperature: float) -> Tensor:
    """Return the mean of -log softmax of each user's partner among the other kind's vectors, both ways (InfoNCE)."""
    user_B = torch.arange(len(one_BD), device=one_BD.device)
    ways = ((one_BD, other_BD), (other_BD, one_BD))
    return torch.stack([contrast_with(*way, temperature, user_B) for way in ways]).mean()


class Loss:
    """Loss of the target items of some overlapping users at all their positions, and the contrast of both domains."""

    def __init__(self, config: Config, task: SequenceTask, rng: np.random.Generator) -> None:
        self.config, self.task, self.rng = config, task, rng
        self.labels = TargetLabels(task, MAX_LENGTH)
        self.rated = TargetLoss(task, config.loss, config.negatives, rng)

    def batches(self) -> Iterator[Tensor]:
        """Yield training users, those of about the same number of target items together."""
        yield from self.labels.batches(self.config.batch, self.rng)

    def __call__(self, network: CTT, row_B: Tensor) -> Tensor:
        config, read = self.config, self.labels.read(row_B)
        users, behaviour, semantic = network.states(read.shown, read.source, read.reads)
        loss = self.rated(users[read.row, read.column], row_B[read.row], read.label, network.vectors)
        both = ((read.source.length > 0) & (read.shown.length > 0)).nonzero().squeeze(1)
        if config.contrast and len(both) > 1:
            source_behaviour, source_semantic, _ = network.intents(read.source)
            ends = []
            for bag, parts in ((read.shown, (behaviour, semantic)), (read.source, (source_behaviour, source_semantic))):
                last = bag.length[both] - 1
                ends.append([normalize(part[both, last], dim=1) for part in parts])
            (own_behaviour, own_semantic), (other_behaviour, other_semantic) = ends
            pairs = (own_semantic, other_behaviour), (other_semantic, own_behaviour)
            loss = loss + config.contrast * sum(contrast_of_users(*pair, config.tau) for pair in pairs) / 2
        return loss


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed, at all target positions of a user at once; overlapping users alone."""
    network, rng = CTT(config, task.titles(), task.source, task.target), np.random.default_rng(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    yield Setup(network, optimiser=optimiser, rng=rng)
    loss, scorer = Loss(config, task, rng), Scorer.of_task(network, task, "merged")

    def pack() -> dict[str, Any]:
        return {**scorer.pack(), "source": list(task.source), "texts": network.texts}

    while True:
        losses = [step(optimiser, loss(network, row_B)) for row_B in loss.batches()]
        yield Epoch(predict=scorer, metrics={"train_loss": sum(losses) / len(losses)}, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    source, target = tuple(state["source"]), tuple(state["target"])
    return unpacked(CTT(config, state["texts"], source, target), state).scores
