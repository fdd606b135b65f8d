"""CATN: recommendation to cold-start users via an aspect transfer network (Zhao, Li and others, SIGIR 2020).

Several aspects are pulled from the documents of a user and of an item; a matrix of correlations between aspects of the two
domains weighs their matches; reviews by like-minded others enlarge a user's document. In the paper's order, per direction
(source text of the user, target item; and the other way round, which teaches too):

    f_t = ReLU(conv_3(e)_t + b),   g_tm = (f_t W_m + b_m) * sigmoid(f_t G_m + d_m),   a_m = sum_t softmax_t(g_tm . v_m) g_tm
    auxiliary document: the same behind a second conv_3 on f, a'_m
    gamma_m = sigmoid([a'_m - a_m; a'_m * a_m] W_f + b_f),    u_m = tanh([gamma_m * a'_m; a_m] W_o + b_o)
    S_mn = u_m A i_n,    R_mn = LeakyReLU_0.2(v_m A v'_n),    r = o + mean over m, n of R_mn S_mn + b_i

Queries v (source text) and v' (target text) and A are the directions' own in common; the rest is one set per direction, as
in the authors' code, or `shared`. Known from the abstract and that code (9ff8c62), whose faults are not repeated: padding
has no weight, the vocabulary is fixed beforehand, items without ratings have the offset, users have no bias of their own, a
review is left out of the document that predicts its own rating, auxiliary documents are not empty. (ours): offset and gain,
windows that end with the review, frozen word vectors, batches of users with all their ratings, logits cut at 30.

arXiv 2005.10549. Shapes: B users of a batch, P pairs (ratings), R reviews, T words, W vocabulary, E width of a word, n
filters, M aspects, k their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, leaky_relu

from features.checks import choice, dropout_share, flag, number, refuse, whole
from features.errors import InputError
from trainables.base_factors import (
    OFFSETS,
    fitted_offsets,
    held_out_offset,
    source_interactions,
    target_offsets,
    wanted_products,
)
from trainables.interface import Epoch, Selection, Setup, Variant
from trainables.mapped_users import OffsetAndGain, rows_of, take_step, user_batches
from trainables.tasks.rating import SHRINKAGE, HeldOut, Ratings, Task
from trainables.words import documents, local_convolution, review_lengths, word_convolution, words_of

NAME = "CATN"
TASK_TYPE = "ratings"
NEEDS = ("reviews",)
SELECTION = Selection("val_rmse", "minimize")

PARAMETERS = ("per_direction", "shared")
LARGEST_LOGIT = 30.0  # what a word's logit is cut at, so that sums of exponentials are numbers
CHUNK = 2048  # reviews that are read at once while predicting

ABLATIONS = {
    "plain": Variant(config={"rating_offset": "none", "calibrate": False}),  # as published
    "wo_auxiliary": Variant(config={"auxiliary": False}),
    "wo_correlation": Variant(config={"correlation": False}),  # R = 1
    "one_aspect": Variant(config={"aspects": 1}),
    "own_review": Variant(config={"exclude_own": False}),  # an item's document has the review that is predicted
    "shared": Variant(config={"parameters": "shared"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters; the authors' code where not marked."""

    aspects: int = 5  # M
    aspect_width: int = 32  # k
    filters: int = 50  # n
    words: int = 500  # of a document
    words_per_review: int = 64  # first words of a review (ours)
    auxiliary: bool = True  # reviews by like-minded others enlarge a user's document
    correlation: bool = True  # R weighs the matches of aspects
    exclude_own: bool = True  # a review is left out of the document that predicts its rating (ours)
    parameters: str = "per_direction"  # per_direction | shared
    dropout: float = 0.2  # of the aspects of each document
    l2: float = 1e-5  # half of it times the squared weights is added to the loss
    lr: float = 1e-3  # Adam's
    batch: int = 16  # users of a step, with all their ratings (ours; the code: 256 ratings)
    epochs: int = 30
    patience: int = 4  # epochs without a better validation RMSE before training ends
    rating_offset: str = (
        "source_offset"  # none (the paper's: b_i starts at the item's shrunken mean) | item_mean | source_offset
    )
    calibrate: bool = True  # text term and b_i are scaled by a gain in [0, 1] fitted on the validation users (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "parameters", PARAMETERS),
            choice(self, "rating_offset", OFFSETS),
            dropout_share(self),
            number(self, "l2", least=0),
            number(self, "lr", above=0),
            *(flag(self, name) for name in ("auxiliary", "correlation", "exclude_own", "calibrate")),
            *(
                whole(self, name, least=1)
                for name in ("aspects", "aspect_width", "filters", "words", "words_per_review")
            ),
            *(whole(self, name, least=1) for name in ("batch", "epochs", "patience")),
        )


def train(config: Config, task: Task, seed: int) -> Iterator[Setup | Epoch]:
    """Match users' texts with items' texts in both directions, on the ratings of the overlapping users."""
    if task.word_vectors is None:
        raise InputError("this task holds no reviews, which CATN reads; set features.reviews in the plan")
    generator = torch.Generator().manual_seed(seed)
    model = CATN(config, task, generator)
    adam = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    yield Setup(model, adam=adam, generator=generator)
    users = len(task.source)
    while True:
        total = 0.0
        for batch in user_batches(users, config.batch, generator, task.device):
            total += len(batch) * take_step(adam, model.loss(batch))
        yield model.epoch(task, total / users)


# --- what is read -------------------------------------------------------------------------------------------------


class Texts:
    """Reviews of one domain: whose document they are, and which review of another user stands beside each."""

    def __init__(
        self, config: Config, ratings: Ratings, users: int, items: int, single_N: Tensor, seed: torch.Generator
    ) -> None:
        self.ratings, self.words_per_review = ratings, config.words_per_review
        length_N = review_lengths(ratings, config.words_per_review)
        self.by_user = documents(ratings.user, users, length_N, config.words)
        self.by_item = documents(ratings.item, items, length_N, config.words)
        self.beside_N = like_minded(ratings, single_N, seed)
        self.in_document_N = torch.zeros(len(ratings), dtype=torch.bool, device=ratings.user.device)
        self.in_document_N[self.by_item.rows] = True


def like_minded(ratings: Ratings, single_N: Tensor, generator: torch.Generator) -> Tensor:
    """Draw for each review (i, r) one of item i by another user with the same r, else r + 1, else r - 1; -1: none, [N].

    Reviews of users of one domain alone come first.
    """
    level_N = ratings.rating.round().long().cpu()
    user_N, item_N, single_N = ratings.user.cpu(), ratings.item.cpu(), single_N.cpu()
    levels = int(level_N.max()) + 3 if len(level_N) else 3
    beside_N = torch.full_like(user_N, -1)
    for change in (0, 1, -1):
        for alone in (True, False):
            pool = single_N.nonzero().flatten() if alone else torch.arange(len(user_N))
            code = item_N[pool] * levels + level_N[pool] + 1
            order = code.argsort(stable=True)
            code, pool = code[order], pool[order]
            wanted_N = item_N * levels + level_N + change + 1
            low_N, high_N = torch.searchsorted(code, wanted_N), torch.searchsorted(code, wanted_N, right=True)
            count_N = high_N - low_N
            step_N = (torch.rand(len(user_N), generator=generator) * count_N).long()
            for extra in (0, 1):  # one step on where the first draw is the user's own review
                place_N = low_N + (step_N + extra) % count_N.clamp(min=1)
                ready_N = (beside_N < 0) & (count_N > 0)
                drawn_N = pool[place_N[ready_N]]
                other_N = user_N[drawn_N] != user_N[ready_N]
                beside_N[ready_N.nonzero().flatten()[other_N]] = drawn_N[other_N]
    return beside_N.to(ratings.user.device)


# --- the networks -------------------------------------------------------------------------------------------------


class Direction(nn.Module):
    """Convolutions, gates and projections of one direction, and the fusion with the auxiliary document."""

    def __init__(self, config: Config, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        filters, outputs = config.filters, config.aspects * config.aspect_width
        self.conv = uniform((filters, width, 3), generator)
        self.conv_bias = nn.Parameter(torch.zeros(filters))
        self.second = uniform((filters, filters, 3), generator)
        self.second_bias = nn.Parameter(torch.zeros(filters))
        self.project, self.gate = (linear(filters, outputs, generator) for _ in range(2))
        self.fuse_gate, self.fuse = (linear(2 * config.aspect_width, config.aspect_width, generator) for _ in range(2))

    def features(self, vectors_WE: Tensor, number_T: Tensor, review_T: Tensor) -> Tensor:
        """Return f, [T, n]."""
        return (word_convolution(vectors_WE, self.conv, number_T, review_T) + self.conv_bias).relu()

    def beside(self, feature_Tn: Tensor, review_T: Tensor) -> Tensor:
        """Return the second convolution's features, of an auxiliary document, [T, n]."""
        return (local_convolution(feature_Tn, self.second, review_T) + self.second_bias).relu()

    def weighed(self, feature_Tn: Tensor, review_T: Tensor, reviews: int, query_Mk: Tensor) -> tuple[Tensor, Tensor]:
        """Return each review's sum of exp(logit) g, [R, M, k], and of exp(logit), [R, M]."""
        shape = (-1, self.config.aspects, self.config.aspect_width)
        g_TMk = (self.project(feature_Tn) * self.gate(feature_Tn).sigmoid()).view(shape)
        weight_TM = (g_TMk * query_Mk).sum(dim=-1).clamp(max=LARGEST_LOGIT).exp()
        sum_RMk = g_TMk.new_zeros(reviews, *g_TMk.shape[1:]).index_add(0, review_T, weight_TM[..., None] * g_TMk)
        return sum_RMk, weight_TM.new_zeros(reviews, weight_TM.shape[1]).index_add(0, review_T, weight_TM)

    def fused(self, own_BMk: Tensor, other_BMk: Tensor) -> Tensor:
        """Return u, [B, M, k]."""
        gate_BMk = self.fuse_gate(torch.cat([other_BMk - own_BMk, other_BMk * own_BMk], dim=-1)).sigmoid()
        fused_BMk: Tensor = self.fuse(torch.cat([gate_BMk * other_BMk, own_BMk], dim=-1)).tanh()
        return fused_BMk


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    weight = torch.empty(shape)
    nn.init.xavier_uniform_(weight, generator=generator)
    return nn.Parameter(weight)


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class CATN(OffsetAndGain):
    """Aspects of users' and items' documents, and their match."""

    def __init__(self, config: Config, task: Task, generator: torch.Generator) -> None:
        device, users = task.device, len(task.source)
        assert task.word_vectors is not None
        target = target_offsets(task, config.rating_offset)
        slope = task.slope if config.rating_offset == "source_offset" else 0.0
        super().__init__(config, held_out_offset(torch.from_numpy(target.item).float().to(device), slope), device)
        self.config, self.task = config, task
        self.vectors_WE = task.word_vectors
        source = source_interactions(task)
        offsets = fitted_offsets(source, config.rating_offset)
        left_N = offsets.left(source)
        if config.rating_offset == "item_mean":
            left_N += offsets.user[source.user]  # the user's bias is part of what is predicted, as in the target domain
        wanted_N = wanted_products(task, target, config.rating_offset)
        self.wanted = [torch.from_numpy(left).float().to(device) for left in (wanted_N, left_N)]
        self.texts = [  # of the source domain, of the target domain
            Texts(config, ratings, len(ratings.starts) - 1, items, ratings.user >= users, generator)
            for ratings, items in ((task.source_ratings, task.source_items), (task.train, len(task.items)))
        ]
        width = self.vectors_WE.shape[1]
        made = [Direction(config, width, generator) for _ in range(1 if config.parameters == "shared" else 2)]
        self.directions = nn.ModuleList(made)
        self.query = uniform((2, config.aspects, config.aspect_width), generator)  # v of source text, v' of target text
        self.correlate = uniform((config.aspect_width, config.aspect_width), generator)  # A
        self.item_bias = nn.ParameterList(self._first_bias(number) for number in (1, 0))

    def _first_bias(self, domain: int) -> Tensor:
        """Zeros, or, where no offset holds it, the shrunken mean of the item's ratings."""
        ratings, items = self.texts[domain].ratings, (self.task.source_items, len(self.task.items))[domain]
        if self.config.rating_offset != "none":
            return torch.zeros(items)
        mean = ratings.rating.mean()
        count = torch.bincount(ratings.item.cpu(), minlength=items)
        total = torch.bincount(ratings.item.cpu(), (ratings.rating - mean).double().cpu(), minlength=items)
        return (mean.cpu() + total / (count + SHRINKAGE)).float() * (count > 0)

    def loss(self, user_B: Tensor) -> Tensor:
        """Squares of both directions' ratings of these overlapping users, each a mean, and the penalty."""
        total = torch.zeros((), device=user_B.device)
        for direction, ratings in enumerate((self.task.overlapping, self.task.source_ratings)):
            row_P, place_P = rows_of(ratings.starts, user_B)
            term_P = self.match(
                direction, user_B, place_P, ratings.item[row_P], row_P if self.config.exclude_own else None
            )
            total = total + (self.wanted[direction][row_P] - term_P).square().mean()
        return total + 0.5 * self.config.l2 * self.squared_weights()

    def squared_weights(self) -> Tensor:
        """Sum of squares of convolutions, gates, projections, fusion and A."""
        weights = [weight for weight in self.directions.parameters() if weight.dim() > 1]
        return torch.stack([weight.square().sum() for weight in (*weights, self.correlate)]).sum()

    def match(self, direction: int, user_B: Tensor, place_P: Tensor, item_P: Tensor, own_P: Tensor | None) -> Tensor:
        """Return the text term plus b_i of each pair, [P]; `own_P`: the review of it that no document may show.

        direction 0: users' source-domain texts and target-domain items; 1: the other way round.
        """
        user_text, item_text = self.texts[direction], self.texts[1 - direction]
        item_I, item_of_P = item_P.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        user_BMk = self.users(direction, user_text, user_B)
        item_PMk = self.items(direction, item_text, item_I, item_of_P, own_P)
        user_PMk, item_PMk = user_BMk[place_P], self.dropped(item_PMk)
        source_PMk, target_PMk = (user_PMk, item_PMk) if direction == 0 else (item_PMk, user_PMk)
        match_PMM = source_PMk @ self.correlate @ target_PMk.transpose(1, 2)
        if self.config.correlation:
            match_PMM = match_PMM * leaky_relu(self.query[0] @ self.correlate @ self.query[1].T, 0.2)
        term_P: Tensor = match_PMM.mean(dim=(1, 2)) + self.item_bias[direction][item_P]
        return term_P

    def users(self, direction: int, text: Texts, user_B: Tensor) -> Tensor:
        """Return u of these users, [B, M, k]."""
        network = self._network(direction)
        row_K, user_K = text.by_user.of(user_B)
        own_BMk = self.dropped(document(*self.read(network, text, row_K, direction), user_K, len(user_B)))
        beside_K = text.beside_N[row_K]
        if not self.config.auxiliary:
            return network.fused(own_BMk, torch.zeros_like(own_BMk))
        kept_K = beside_K >= 0
        read = self.read(network, text, beside_K[kept_K], direction, beside=True)
        return network.fused(own_BMk, self.dropped(document(*read, user_K[kept_K], len(user_B))))

    def items(self, direction: int, text: Texts, item_I: Tensor, item_of_P: Tensor, own_P: Tensor | None) -> Tensor:
        """Return the aspects of each pair's item, less the pair's own review, [P, M, k]; zeros for an item without text."""
        network = self._network(direction)
        row_K, item_K = text.by_item.of(item_I)
        sum_KMk, weight_KM = self.read(network, text, row_K, 1 - direction)
        sum_IMk = sum_KMk.new_zeros(len(item_I), *sum_KMk.shape[1:]).index_add(0, item_K, sum_KMk)
        weight_IM = weight_KM.new_zeros(len(item_I), weight_KM.shape[1]).index_add(0, item_K, weight_KM)
        sum_PMk, weight_PM = sum_IMk[item_of_P], weight_IM[item_of_P]
        if own_P is not None:
            read_N = torch.full((len(text.ratings),), -1, device=row_K.device)
            read_N[row_K] = torch.arange(len(row_K), device=row_K.device)
            place_P, inside_P = read_N[own_P].clamp(min=0), text.in_document_N[own_P]
            sum_PMk = sum_PMk - sum_KMk[place_P] * inside_P[:, None, None]
            left_PM = weight_PM - weight_KM[place_P] * inside_P[:, None]
            empty_PM = left_PM <= 1e-5 * weight_PM  # nothing is left but rounding
            return (sum_PMk / left_PM.masked_fill(empty_PM, 1.0)[..., None]).masked_fill(empty_PM[..., None], 0.0)
        return sum_PMk / weight_PM.clamp(min=1e-30)[..., None]

    def dropped(self, aspects: Tensor) -> Tensor:
        """Drop aspects in training."""
        return dropout(aspects, self.config.dropout, self.training)

    def read(
        self, network: Direction, text: Texts, row_R: Tensor, side: int, *, beside: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read reviews with the query of a side (0: source text); while predicting, some at a time."""
        read = []
        for part_R in row_R.split(len(row_R) if self.training else CHUNK) if len(row_R) else (row_R,):  # type: ignore[no-untyped-call]
            assert text.ratings.words is not None
            number_T, review_T = words_of(text.ratings.words, part_R, text.words_per_review)
            feature_Tn = network.features(self.vectors_WE, number_T, review_T)
            if beside:
                feature_Tn = network.beside(feature_Tn, review_T)
            read.append(network.weighed(feature_Tn, review_T, len(part_R), self.query[side]))
        sums, weights = zip(*read, strict=True)
        return torch.cat(sums), torch.cat(weights)

    def _network(self, direction: int) -> Direction:
        network = self.directions[direction % len(self.directions)]
        assert isinstance(network, Direction)
        return network

    def term(self, held_out: HeldOut) -> Tensor:
        """Return text term plus b_i of each rating, [N]; 0 for an item that no training rating has."""
        ratings = held_out.ratings
        return self.match(0, held_out.source_row, ratings.user, ratings.item, None)


def document(sum_KMk: Tensor, weight_KM: Tensor, document_K: Tensor, documents: int) -> Tensor:
    """Return the aspects of documents from those of their reviews, [B, M, k]; zeros for one without words."""
    sum_BMk = sum_KMk.new_zeros(documents, *sum_KMk.shape[1:]).index_add(0, document_K, sum_KMk)
    weight_BM = weight_KM.new_zeros(documents, weight_KM.shape[1]).index_add(0, document_K, weight_KM)
    return sum_BMk / weight_BM.clamp(min=1e-30)[..., None]
