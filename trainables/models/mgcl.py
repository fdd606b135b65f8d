"""MGCL: multi-view graph contrastive learning (Xu, Pan & Ming, RecSys 2023, doi 10.1145/3604915.3608785).

An item has a static vector from a graph of all users and items of both domains, and a dynamic one from the user's own
sequence; a contrast ties them. Self-attention over the target's items and cross-attention to the source's give two
preferences, tied by another contrast. The paper's text was not at hand: equations are those of a public copy of its code.
What is ours: in the sequence graph no item hears the one after it, which is the label of its own position (`graph: both`
trains with that edge, as the code does, and scores without it); the graph is walked with its gradient (`refresh: step`),
not once an epoch without; all source items before a label are read; under strict cold start a learned vector is the query.
Shapes: B users, L positions, M source positions, N labels, I items of both domains, D vector width, R rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import logsigmoid, softplus

from features.checks import at_least, choice, dropout_share, refuse, step_size
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.sequences.blocks import AttentionBlock, Dropout, biases_at_zero, causal, start_as_mean
from trainables.sequences.labels import TargetLabels
from trainables.sequences.losses import TargetLoss, step
from trainables.sequences.ranking import Scorer, unpacked
from trainables.sequences.views import Bag, Range, newest_of_each
from trainables.tasks.sequential import Sequences, SequenceTask

WIDTH = 64  # D; 50 in the code, 64 for all systems of a comparison
MAX_LENGTH = 50  # newest items of each domain that are read; 100 in the code
DEVIATION = 0.02  # of the tables' start (ours)
USERS, LOSSES, GRAPHS, REFRESHES = ("overlapping", "all"), ("bce", "softmax"), ("past", "both"), ("step", "epoch")

NAME = "MGCL"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
ABLATIONS = {
    "wo_global": Variant(config={"global_view": False}),
    "wo_sequence": Variant(config={"sequence_view": False}),
    "wo_item_contrast": Variant(config={"beta": 0.0, "gamma": 0.0}),
    "wo_user_contrast": Variant(config={"alpha": 0.0}),
    "wo_inter": Variant(config={"inter": False}),
    "graph_both": Variant(config={"graph": "both"}),
    "paper_loss": Variant(config={"loss": "bce", "alpha": 0.5, "beta": 0.5, "gamma": 0.5}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. Defaults are those of the code where it gives a value; (ours) marks where it is silent."""

    users: str = "overlapping"  # overlapping | all: training users of both domains, or those of the target alone too
    loss: str = "softmax"  # softmax | bce: many drawn items a label (ours), or one, the paper's, which is weaker
    global_view: bool = True  # static vectors of the graph of users and items
    sequence_view: bool = True  # dynamic vectors of the user's own sequence
    inter: bool = True  # cross-attention to the source's items
    graph: str = "past"  # past | both: edges of the sequence graph; `both` shows each position its label (the code)
    refresh: str = "step"  # step | epoch: when the graph is walked; by epoch without a gradient (the code)
    layers: int = 3  # of the graph of users and items
    blocks: int = 2
    alpha: float = 0.01  # weight of the contrast of both preferences (ours; 0.5, which outweighs the ranking)
    beta: float = 0.01  # of the contrast of static and dynamic vectors on the target's side (ours; 0.5)
    gamma: float = 0.01  # and on the source's (ours; 0.5)
    dropout: float = 0.5
    negatives: int = 512  # items of the softmax beside the label, drawn for each batch (ours)
    lr: float = 3e-3  # Adam's (ours; 1e-3)
    weight_decay: float = 0.0  # Adam's (ours; the code has a norm of the table)
    batch: int = 256  # users
    epochs: int = 60  # (ours)
    patience: int = 6  # epochs without a better validation NDCG@10 before training ends (ours)

    def __post_init__(self) -> None:
        refuse(
            *(
                choice(self, name, choices)
                for name, choices in (("users", USERS), ("loss", LOSSES), ("graph", GRAPHS), ("refresh", REFRESHES))
            ),
            "" if self.global_view or self.sequence_view else "global_view and sequence_view are both false; keep one",
            *(at_least(self, name, 0) for name in ("layers", "alpha", "beta", "gamma", "weight_decay")),
            *(at_least(self, name, 1) for name in ("blocks", "negatives", "batch", "epochs", "patience")),
            dropout_share(self),
            step_size(self),
        )


def normalised_graph(task: SequenceTask) -> Tensor:
    """Return D^(-1/2) A D^(-1/2) of the graph of training users and items, sparse [S + I, S + I], users first.

    By rows (CSR): a product with it takes a quarter of the time.
    """
    users, user, item = len(task.train), task.train.row, task.train.item + len(task.train)
    size = users + task.items
    edge = torch.cat([torch.stack([user, item]), torch.stack([item, user])], dim=1)
    degree = torch.bincount(edge[0], minlength=size).clamp(min=1).float()
    value = (degree[edge[0]] * degree[edge[1]]).rsqrt()
    graph = torch.sparse_coo_tensor(edge, value, (size, size), check_invariants=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        return graph.coalesce().to_sparse_csr()


class Walked(Function):
    """A x of a symmetric sparse A, whose gradient is A times that of the product: no transpose is made."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, x: Tensor) -> Tensor:
        """Return A x."""
        ctx.graph = graph
        return graph @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        """Return A' g, which is A g."""
        return None, ctx.graph @ gradients[0]


class SequenceGraph(nn.Module):
    """One gated step on the path of a sequence: each item hears the one before it and, where asked, the one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.from_neighbours, self.from_item = nn.Linear(2 * WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)

    def forward(self, vector_BLD: Tensor, real_BL: Tensor, both: bool) -> Tensor:
        """[B, L, D] -> [B, L, D]: o = (1 - z) e + z n."""
        shown_BLD, nothing = vector_BLD * real_BL[..., None], vector_BLD.new_zeros(len(vector_BLD), 1, WIDTH)
        before = self.before(torch.cat([nothing, shown_BLD[:, :-1]], dim=1))
        after = self.after(torch.cat([shown_BLD[:, 1:], nothing], dim=1) if both else nothing).expand_as(before)
        heard = self.from_neighbours(torch.cat([before, after], dim=2)).chunk(3, dim=2)
        own = self.from_item(vector_BLD).chunk(3, dim=2)
        reset, update = (heard[0] + own[0]).sigmoid(), (heard[1] + own[1]).sigmoid()
        new = (heard[2] + reset * own[2]).tanh()
        out: Tensor = (1 - update) * vector_BLD + update * new
        return out


class MGCL(nn.Module):
    """Item, user and position tables, both graphs, self-attention and cross-attention."""

    static_item: Tensor  # [I, D] c of the last walk without gradient

    def __init__(
        self, config: Config, items: int, users: int, source: Range, target: Range, graph: Tensor | None
    ) -> None:
        super().__init__()
        self.config, self.source, self.target, self.graph = config, source, target, graph
        self.item, self.user, self.position = (nn.Embedding(size, WIDTH) for size in (items, users, MAX_LENGTH))
        for table in (self.item, self.user, self.position):
            nn.init.normal_(table.weight, std=DEVIATION)
        self.register_buffer("static_item", torch.zeros(items, WIDTH))
        self.paths = nn.ModuleList(SequenceGraph() for _ in range(2))  # source, target
        self.mix = nn.ModuleList(nn.Linear(2 * WIDTH, 2) for _ in range(2))
        self.item_norm = nn.LayerNorm(WIDTH)
        self.within = nn.ModuleList(AttentionBlock(WIDTH, 1, WIDTH, config.dropout) for _ in range(config.blocks))
        self.cross = nn.ModuleList(AttentionBlock(WIDTH, 1, WIDTH, config.dropout) for _ in range(config.blocks))
        self.cold = nn.Parameter(torch.randn(WIDTH) * DEVIATION)  # query where there is no target item
        self.within_norm, self.cross_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)  # behind the last blocks
        self.across = nn.Linear(WIDTH, WIDTH)  # W_2
        self.join, self.join_norm, self.out_norm = (
            nn.Linear(2 * WIDTH, WIDTH),
            nn.LayerNorm(2 * WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.static_map, self.dynamic_map = (
            nn.Linear(WIDTH, WIDTH),
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)),
        )
        self.dropout = Dropout(config.dropout)
        biases_at_zero(self)
        start_as_mean(self.across, self.join)

    def walked(self) -> Tensor:
        """C of all items: the mean over the layers of what the graph carries, [I, D] (LightGCN)."""
        assert self.graph is not None
        vector = torch.cat([self.user.weight, self.item.weight])
        total = vector
        for _ in range(self.config.layers):
            vector = Walked.apply(self.graph, vector)  # type: ignore[no-untyped-call]
            total = total + vector
        return total[len(self.user.weight) :] / (self.config.layers + 1)

    def static(self) -> Tensor:
        """C as the step at hand sees it, [I, D]."""
        if self.training and self.config.refresh == "step" and self.graph is not None:
            return self.walked()
        return self.static_item

    @torch.no_grad()
    def refresh(self) -> None:
        """Walk the graph for what is read without a gradient."""
        if self.config.global_view:
            self.static_item.copy_(self.walked())

    def views(self, bag: Bag, domain: int, static_ID: Tensor, both: bool) -> tuple[Tensor, Tensor, Tensor]:
        """c, o and x of a bag's items, [B, L, D] each."""
        static = static_ID[bag.item]
        dynamic = self.paths[domain](self.item(bag.item), bag.real, both)
        if not self.config.global_view or not self.config.sequence_view:
            mixed = dynamic if self.config.sequence_view else static
        else:
            weight = self.mix[domain](torch.cat([static, dynamic], dim=2)).softmax(dim=2)
            mixed = weight[..., :1] * static + weight[..., 1:] * dynamic
        place = torch.arange(bag.item.shape[1], device=bag.item.device) + MAX_LENGTH - bag.length[:, None]
        x = math.sqrt(WIDTH) * self.item_norm(mixed) + self.position(place.clamp(0, MAX_LENGTH - 1))
        return static, dynamic, self.dropout(x)

    def preference(self, target_x: Tensor) -> Tensor:
        """H^t before each target item of a row and after its last one, [B, L + 1, D]: at first the learned query."""
        cold = self.cold.expand(len(target_x), 1, WIDTH)
        state, mask = target_x, causal(target_x.shape[1], target_x.device)
        for block in self.within:
            state = block(state, mask)
        return torch.cat([cold, self.within_norm(state)], dim=1)

    def crossed(self, source_x: Tensor, reads_BLM: Tensor) -> Tensor:
        """W_2 H^s, [B, L, D]: each query starts as the last source item that it may read; 0 where there is none."""
        place = torch.arange(1, reads_BLM.shape[2] + 1, device=reads_BLM.device)
        last_BL = (reads_BLM * place).argmax(dim=2)
        x = source_x.gather(1, last_BL[..., None].expand(-1, -1, WIDTH))
        for block in self.cross:
            x = block(x, reads_BLM[:, None], source_x)
        out: Tensor = self.across(self.cross_norm(x)) * reads_BLM.any(dim=2)[..., None]
        return out if self.config.inter else torch.zeros_like(out)

    def joined(self, within: Tensor, across: Tensor) -> Tensor:
        """u, [..., D]."""
        out: Tensor = self.out_norm(self.join(self.join_norm(torch.cat([within, across], dim=-1))))
        return out

    def users(self, history: Sequences, domain: Range) -> Tensor:
        """U after the last item of each history, [R, D]."""
        static = self.static()
        source, target = (newest_of_each(history, part, MAX_LENGTH) for part in (self.source, self.target))
        source_x, target_x = self.views(source, 0, static, False)[2], self.views(target, 1, static, False)[2]
        within = self.preference(target_x)[torch.arange(len(history), device=history.device), target.length]
        return self.joined(within, self.crossed(source_x, source.real[:, None])[:, 0])

    def items(self, domain: Range) -> Tensor:
        """The table serves input and output, [J, D]."""
        return self.item.weight[domain[0] : domain[1]]


def tied(one_ND: Tensor, other_ND: Tensor, shuffled_ND: Tensor) -> Tensor:
    """Return the mean of -log sigma(a . b) - log(1 - sigma(a . b~)), b~ another position's vector, shuffled."""
    matched, apart = (one_ND * other_ND).sum(dim=1), (one_ND * shuffled_ND).sum(dim=1)
    return (softplus(apart) - logsigmoid(matched)).mean()


class Loss:
    """Loss of the target items of some users at all their positions, and the contrasts of views and preferences."""

    def __init__(self, config: Config, task: SequenceTask, rng: np.random.Generator) -> None:
        self.config, self.task, self.rng = config, task, rng
        self.labels = TargetLabels(task, MAX_LENGTH, overlapping=config.users == "overlapping")
        self.rated = TargetLoss(task, config.loss, config.negatives, rng)

    def batches(self) -> Iterator[Tensor]:
        """Yield training users, those of about the same number of target items together."""
        yield from self.labels.batches(self.config.batch, self.rng)

    def __call__(self, network: MGCL, row_B: Tensor) -> Tensor:
        config, read = self.config, self.labels.read(row_B)
        static, both = network.static(), config.graph == "both"
        source, shown, row, column = read.source, read.shown, read.row, read.column
        source_c, source_o, source_x = network.views(source, 0, static, both)
        target_c, target_o, target_x = network.views(shown, 1, static, both)
        within, across = network.preference(target_x), network.crossed(source_x, read.reads)
        within_ND, across_ND = within[row, column], across[row, column]
        loss = self.rated(network.joined(within_ND, across_ND), row_B[row], read.label, network.item)
        if config.alpha:
            loss = loss + config.alpha * self._tied(within_ND, across_ND)
        for weight, domain, bag, c, o in (
            (config.beta, 1, shown, target_c, target_o), (config.gamma, 0, source, source_c, source_o),
        ):  # fmt: skip
            if weight and config.global_view and config.sequence_view and int(bag.real.sum()) > 1:
                one = network.dropout(network.static_map(c[bag.real]))
                loss = loss + weight * self._tied(one, network.dropout(network.dynamic_map[domain](o[bag.real])))
        return loss

    def _tied(self, one_ND: Tensor, other_ND: Tensor) -> Tensor:
        rows, columns = (torch.from_numpy(self.rng.permutation(size)).to(one_ND.device) for size in other_ND.shape)
        return tied(one_ND, other_ND, other_ND[rows][:, columns])


def train(config: Config, task: SequenceTask, seed: int) -> Iterator[Setup | Epoch]:
    """Train one seed, at all target positions of a user at once."""
    graph = normalised_graph(task) if config.global_view else None
    network = MGCL(config, task.items, len(task.train), task.source, task.target, graph)
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.Adam(
        network.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    yield Setup(network, optimiser=optimiser, rng=rng)
    loss, scorer = Loss(config, task, rng), Scorer.of_task(network, task, "merged")

    def pack() -> dict[str, Any]:
        return {**scorer.pack(), "source": list(task.source)}

    network.refresh()
    while True:
        losses = [step(optimiser, loss(network, row_B)) for row_B in loss.batches()]
        network.refresh()
        yield Epoch(predict=scorer, metrics={"train_loss": sum(losses) / len(losses)}, pack=pack)


def unpack(config: Config, state: Mapping[str, Any], seed: int) -> Callable[[Sequences], Tensor]:
    """Return a trained model: users' histories -> scores of all target-domain items, [U, J]."""
    source, target, weights = tuple(state["source"]), tuple(state["target"]), state["network"]
    network = MGCL(config, len(weights["item.weight"]), len(weights["user.weight"]), source, target, None)
    return unpacked(network, state).scores
