"""PLCR: automated prompting for non-overlapping cross-domain recommendation (Guo et al., 2023, arXiv 2304.04218).

A SASRec is trained on both domains' sequences, without a link between a user's two halves, and frozen. Then items are
described anew: an item's embedding among context vectors, some of which all items share and some those of its domain,
goes through an encoder without positions and is pooled into the vector that the frozen state is matched with.
In the paper's order: pretraining (section 3.2), prompts (3.3), prompt encoder (3.4), training (3.5).
What is ours: softmaxes over drawn items; Adam; both domains in each step; the separation loss, of which the authors' code
holds two forms and runs neither, is a mean over rows; blocks are pre-norm, as in SASRec here. Pretraining depends on no
field that a trial varies; it is done once (`prepare`).
Shapes: B rows, M tokens of an item, U distinct items, D vector width, K drawn items, N labels, R rows that are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus
from torch.optim import Optimizer

from features.checks import at_least, choice, dropout_share, refuse, step_size
from trainables import pretraining
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.models import sasrec
from trainables.sequences.blocks import AttentionBlock, Dropout
from trainables.sequences.labels import Labels, halved_labels, paired, training_labels
from trainables.sequences.losses import distinct, draw_shared, next_item_loss, step
from trainables.sequences.ranking import Scorer, unpacked
from trainables.sequences.views import Range, filtered, inside, within
from trainables.tasks.sequential import Sequences, SequenceTask

WIDTH = sasrec.WIDTH  # D; 50 in the authors' code
POOLING = 16  # hidden width of the pooling
ROWS = 1024  # items that are described at once without gradients
PRETRAINING_VERSION = 2  # of what pretraining makes; part of its key
READER = sasrec.Config(dropout=0.3)  # of the pretraining (ours: lr and epochs; the code has 1e-4 and 400)
READER_EPOCHS = 15
READS = ("own", "merged")

NAME = "PLCR"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
VERSION = 2  # 1: each direction had a training
BOTH_DIRECTIONS = True
ABLATIONS = {
    "wo_shared": Variant(config={"shared_contexts": 0}),
    "wo_own": Variant(config={"own_contexts": 0}),
    "wo_separation": Variant(config={"separation": 0.0}),
    "wo_prompt": Variant(config={"prompts": False}),
    "wo_joint": Variant(config={"joint": False}),
    "merged_state": Variant(config={"read": "merged"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are those of the authors' code where it gives a value; (ours) marks where it is silent."""

    joint: bool = True  # False: a SASRec for each domain, in the place of one for both
    prompts: bool = True  # False: items are ranked by their own embeddings, by the pretrained SASRec alone
    shared_contexts: int = 5  # m, context vectors of all items; 1 for Food-Kitchen in a comment of the code
    own_contexts: int = 3  # n, of each domain
    prompt_blocks: int = 2
    separation: float = 0.001  # beta, weight of the loss that keeps both domains' prompts apart
    read: str = "own"  # own | merged: a history's own-domain items (else its other ones), or all of them (ours)
    dropout: float = 0.2  # within the pooling
    negatives: int = 1024  # items of the softmax beside the label, drawn for each batch and domain (ours)
    lr: float = 1e-3  # Adam's
    batch: int = 1024  # halves, half of them of each domain (ours; 128)
    epochs: int = 30  # of one random label a half (ours)
    patience: int = 4  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "read", READS),
            "joint is False with read 'merged'; give read 'own'" if self.read == "merged" and not self.joint else "",
            *(at_least(self, name, 0) for name in ("shared_contexts", "own_contexts", "prompt_blocks", "separation")),
            *(at_least(self, name, 1) for name in ("negatives", "epochs", "patience")),
            at_least(self, "batch", 2),
            dropout_share(self),
            step_size(self),
        )


class PromptEncoder(nn.Module):
    """Blocks without mask or positions over an item's tokens, and a pooling that knows the item (eqs. 8-11)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.contexts = nn.Parameter(torch.randn(config.own_contexts, WIDTH) * sasrec.DEVIATION)
        self.blocks = nn.ModuleList(AttentionBlock(WIDTH, 1, WIDTH, 0.0) for _ in range(config.prompt_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.inner, self.outer = nn.Linear(2 * WIDTH, POOLING), nn.Linear(POOLING, 1)
        self.dropout = Dropout(config.dropout)

    def forward(self, item_UD: Tensor, shared_MD: Tensor) -> Tensor:
        """Items' embeddings -> what states are matched with, [U, D]."""
        context = torch.cat([shared_MD, self.contexts]).expand(len(item_UD), -1, -1)
        x = math.sqrt(WIDTH) * torch.cat([context, item_UD[:, None]], dim=1)
        mask = torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        hidden = self.inner(torch.cat([x, item_UD[:, None].expand_as(x)], dim=2)).relu()
        weight_UM = self.outer(self.dropout(hidden)).squeeze(2).softmax(dim=1)
        return torch.einsum("um,umd->ud", weight_UM, x)


class PLCR(nn.Module):
    """The frozen SASRec (without `joint` one for each domain), shared contexts, and a prompt encoder for each domain."""

    def __init__(self, config: Config, items: int, source: Range, target: Range) -> None:
        super().__init__()
        self.config, self.source, self.target = config, source, target
        readers = 1 if config.joint else 2  # of both domains; of source and target
        self.readers = nn.ModuleList(sasrec.SASRec(READER, items) for _ in range(readers)).requires_grad_(False)
        self.shared = nn.Parameter(torch.randn(config.shared_contexts, WIDTH) * sasrec.DEVIATION)
        self.prompts = nn.ModuleList(PromptEncoder(config) for _ in range(2))  # source, target

    def number(self, domain: Range) -> int:
        """0 for the source, 1 for the target."""
        return (self.source, self.target).index(domain)

    def reader(self, domain: int) -> sasrec.SASRec:
        """The SASRec that knows a domain: 0 is the source, 1 the target."""
        found = self.readers[0 if self.config.joint else domain]
        assert isinstance(found, sasrec.SASRec)
        return found

    def described(self, item_U: Tensor, domain: int) -> Tensor:
        """What states are matched with to score items of a domain, [U, D]."""
        vector_UD = self.reader(domain).item(item_U)
        out: Tensor = self.prompts[domain](vector_UD, self.shared) if self.config.prompts else vector_UD
        return out

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """Frozen state of the domain's part of each history, of all of it where it has none: [R, D]."""
        has_R = within(history, domain).lengths > 0
        if self.config.read == "own":
            history = filtered(history, inside(history.item, domain) | ~has_R[history.row])
        number = self.number(domain)
        if self.config.joint:
            return self.reader(number).users(history, domain)
        state_RD = self.shared.new_empty(len(has_R), WIDTH)
        for reader, chosen_R in ((number, has_R), (1 - number, ~has_R)):
            rows = chosen_R.nonzero().squeeze(1)
            if len(rows):
                state_RD[rows] = self.reader(reader).users(history.rows(rows), domain)
        return state_RD

    def items(self, domain: Range) -> Tensor:
        """Descriptions of all items of a domain, [J, D]."""
        items = torch.arange(*domain, device=self.shared.device)
        return torch.cat([self.described(part, self.number(domain)) for part in torch.split(items, ROWS)])


# --- pretraining --------------------------------------------------------------------------------------------------


def _document(task: SequenceTask, seed: int, domain: Range | None) -> dict[str, Any]:
    made_of = {} if domain is None else {"domain": list(domain)}
    return {"version": PRETRAINING_VERSION, "train": task.train_key, "epochs": READER_EPOCHS, "seed": seed, **made_of}


def _domains(config: Config, task: SequenceTask) -> list[Range | None]:
    """Domain of each reader; None is one reader of both."""
    return [None] if config.joint else [task.source, task.target]


def pretrained(task: SequenceTask, seed: int, domain: Range | None = None) -> Mapping[str, Tensor]:
    """Return the weights of the SASRec over both domains' halves, or those of one; trained where they are missing.

    Domains are taken by their item numbers, so that both directions make and share the same weights.
    """
    if domain is None:
        task, reader = task.one_way(), READER
        labels = halved_labels(task)
    else:
        other = task.source if domain == task.target else task.target
        task, reader = replace(task, source=other, target=domain), replace(READER, sequences="target")
        labels = training_labels(task, "target")

    def epoch(network: nn.Module, optimiser: Optimizer, rng: np.random.Generator) -> None:
        assert isinstance(network, sasrec.SASRec)
        loss = sasrec.Loss(reader, task, labels, rng)
        for batch in labels.batches(READER.batch, READER.max_length, rng):
            step(optimiser, loss(network, batch))

    def make(kept: Path) -> dict[str, Any]:
        build = partial(sasrec.SASRec, READER, task.items)
        return pretraining.pretrain(
            build, epoch, epochs=READER_EPOCHS, lr=READER.lr, seed=seed, task=task, kept=kept
        )  # fmt: skip

    return pretraining.kept_once(task, "plcr", _document(task, seed, domain), make)


def prepare(config: Config, task: SequenceTask, seeds: Sequence[int]) -> None:
    """Pretrain what the trials share, where it is missing."""
    for seed in seeds:
        for domain in _domains(config, task):
            pretrained(task, seed, domain)


def shared(config: Config, task: SequenceTask, seeds: Sequence[int]) -> list[Path]:
    """Folders of the pretrained readers, in that of all tasks."""
    return [
        pretraining.folder_of("plcr", _document(task, seed, domain))
        for seed in seeds
        for domain in _domains(config, task)
    ]  # fmt: skip


# --- training -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def frozen_states(reader: sasrec.SASRec, labels: Labels) -> Tensor:
    """Return the state before each label, [N, D], read once: training touches no sequence."""
    out = torch.zeros(len(labels), WIDTH, device=labels.item.device)
    reader.eval()
    for batch in labels.batches(512, READER.max_length, np.random.default_rng(0)):
        out[batch.number] = reader.encode(reader.item(batch.item), batch.length)[batch.row, batch.column]
    return out


def separation_loss(state_BD: Tensor, prompt_BD: Tensor, other_BD: Tensor) -> Tensor:
    """Return the mean of -log sigma(p . h) - log(1 - sigma(p . p')), p' the other domain's prompts."""
    matched, apart = (prompt_BD * state_BD).sum(dim=1), (prompt_BD * other_BD).sum(dim=1)
    return (softplus(apart) - logsigmoid(matched)).mean()


class Loss:
    """Softmax of both domains' rows among drawn items, and what keeps their prompts apart (eqs. 12-14)."""

    def __init__(self, config: Config, task: SequenceTask, labels: Labels, states_ND: Tensor, rng: np.random.Generator):
        self.config, self.task, self.labels, self.states_ND, self.rng = config, task, labels, states_ND, rng

    def __call__(self, network: PLCR, numbers: tuple[Tensor, Tensor]) -> Tensor:
        parts, prompts = [], []
        for domain, (number_B, span) in enumerate(zip(numbers, (self.task.source, self.task.target), strict=True)):
            label_B, state_BD = self.labels.item[number_B], self.states_ND[number_B]
            drawn_K = draw_shared([span], self.config.negatives, self.rng)[0].to(label_B.device)
            wanted, (label_at, drawn_at) = distinct(self.task.items, label_B, drawn_K)
            described_UD = network.described(wanted, domain)
            label_BD, drawn_KD = described_UD[label_at], described_UD[drawn_at]
            loss = next_item_loss(state_BD, label_B, label_BD, drawn_K, drawn_KD, span[1] - span[0])
            parts.append(loss / len(label_B))
            prompts.append((state_BD, label_BD))
        total = parts[0] + parts[1]
        if self.config.separation:
            rows = min(len(state) for state, _ in prompts)
            for own, other in (prompts, prompts[::-1]):
                total = total + self.config.separation * separation_loss(own[0][:rows], own[1][:rows], other[1][:rows])
        return total


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train the prompts over the frozen SASRec, an epoch of one random label of each half at a time.

    Both domains' prompts take part alike, so it is the same for both directions.
    """
    way = task.one_way()
    network, rng = PLCR(config, way.items, way.source, way.target), np.random.default_rng(seed)
    for reader, domain in zip(network.readers, _domains(config, way), strict=True):
        reader.load_state_dict(pretrained(way, seed, domain))
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=config.lr, fused=True)
    yield Setup(network, optimiser=optimiser, rng=rng)
    labels = halved_labels(way)
    in_target = inside(labels.item, way.target)
    states_ND = torch.zeros(len(labels), WIDTH, device=labels.item.device)
    for number, of_domain_N in enumerate((~in_target, in_target)):
        states_ND[of_domain_N] = frozen_states(network.reader(number), labels[of_domain_N])
    loss, scorer = Loss(config, way, labels, states_ND, rng), Scorer.of_task(network, task, "merged")

    def pack() -> dict[str, Any]:
        return {**scorer.pack(), "domains": [list(way.source), list(way.target)]}

    while True:
        chosen, losses = labels.one_each(rng), [0.0]
        if config.prompts:
            target_B = in_target[chosen]
            halves = paired(chosen[~target_B], chosen[target_B], config.batch, rng)
            losses = [step(optimiser, loss(network, numbers)) for numbers in halves]
        metrics = {"train_loss": sum(losses) / len(losses)}
        yield Epoch(predict=scorer, turned=scorer.turned, metrics=metrics, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    source, target = map(tuple, state["domains"])
    items = len(state["network"]["readers.0.item.weight"])
    return unpacked(PLCR(config, items, source, target), state).scores
