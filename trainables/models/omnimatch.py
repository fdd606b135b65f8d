"""OmniMatch: reviews of like-minded users in the place of a cold-start user's own (Dai, El-Roby, Adeeb, Thaker, EDBT 2025).

No mapping: who has no reviews in the target domain gets a document of reviews by those who rated the same source items
alike. Encoders of texts are trained so that one half of a user's features does not tell the domain, and users and items of
the same rating lie close. h: what an encoder makes of a document, d(x) = ReLU(dropout(x)); s, t: source, target document.

    h = max over time of ReLU(conv_3,4,5(e) + b), one encoder for each of the two documents of users, one for items
    c^s = d(h^s) W_c, c^t = d(h^t) W_c;   p^s = d(h^s) W_ps, p^t = d(h^t) W_pt;   v = d(h^i) W_v
    r = o + d([c^t; p^t; v]) w + b;   y^s, y^t = unit(d([c; p; v]) W_y) of each domain
    loss = (r - r')^2 + alpha L_con + beta (CE(c^s, 0) + CE(c^t, 1)) + beta (CE(p^s, 0) + CE(p^t, 1))

L_con is supervised contrast by rating: anchors y^s, candidates both views of all rows of a step but the anchor. c is
classified behind a reversal of the gradient, p is not. Domain losses read users of one domain alone. Target-domain ratings
and source-domain ratings teach, both through the user's target-side document: an overlapping user's own, else the auxiliary
one. Known from the abstract and the authors' code (ac5e9d6), whose faults are not repeated: no hidden review is read, the
reversal grows with each step, padding is no word, both classifiers see both domains, items' documents are of all visible
users. (ours): offset and gain; windows that end with the review; a review is left out of every document that predicts its
own rating; steps visit users with all their ratings; Adam; source-only users teach like validation users, because nothing
says which of them are test users; at most 1,024 ratings of a step are contrasted. As the rating is a sum over users' and
items' numbers, the model knows no match of the two.

DOI 10.48786/edbt.2025.07. Shapes: B users of a step, P pairs (ratings), R reviews, L words of a review, D documents, K
reviews of a document, W words of all texts of the task, E width of a word, C = 3 n outputs of an encoder, n filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, normalize

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
from trainables.mapped_users import OffsetAndGain, glorot, rows_of, take_step, user_batches
from trainables.tasks.rating import HeldOut, Task, Words
from trainables.words import Documents, documents, largest_convolution, largest_of_documents, padded_words

NAME = "OmniMatch"
TASK_TYPE = "ratings"
NEEDS = ("reviews",)
SELECTION = Selection("val_rmse", "minimize")

OPTIMISERS = ("adam", "adadelta")
COLD_ITEM_TEXTS = ("none", "metadata")
WINDOWS = (3, 4, 5)
SOURCE, TARGET, ITEM = range(3)  # sides: whose documents
ITEM_WIDTH, VIEW_WIDTH = 128, 128  # of v; of y
RHO = 0.95  # of Adadelta
CONTRASTED = 1024  # ratings of a step that are contrasted at most
CHUNK = 512  # documents that are read at once while predicting

ABLATIONS = {
    "plain": Variant(config={"rating_offset": "none", "calibrate": False}),  # as published
    "wo_contrast": Variant(config={"contrast_weight": 0.0}),
    "wo_adversarial": Variant(config={"domain_weight": 0.0}),
    "wo_specific": Variant(config={"specific": False}),
    "wo_auxiliary": Variant(config={"auxiliary": False}),  # cold-start users' target document is empty
    "mixed_auxiliary": Variant(config={"auxiliary_share": 0.5}),
    "item_metadata": Variant(config={"cold_item_text": "metadata"}),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters; the authors' code where not marked."""

    filters: int = 200  # n, of each window
    common: int = 64  # width of c, and of p
    contrast_weight: float = 0.1  # alpha
    domain_weight: float = 0.25  # beta
    temperature: float = 0.07  # what the contrast's products are divided by
    specific: bool = True  # p beside c
    auxiliary: bool = True  # cold-start users have a document of others' reviews
    auxiliary_share: float = 0.0  # overlapping users of a step who are read by their auxiliary document (ours)
    words: int = 200  # of a document
    words_per_review: int = 16  # first words of a review (ours; the code: a short summary, which stands first here)
    cold_item_text: str = "none"  # of a target item without visible review: none | metadata (title, description)
    exclude_own: bool = True  # a review is left out of the documents that predict its rating (ours)
    dropout: float = 0.4
    optimiser: str = "adam"  # adam (ours) | adadelta (the code's, with lr 0.02)
    lr: float = 1e-3
    batch: int = 16  # users of a step, with all their ratings (ours; the code: 64 ratings)
    epochs: int = 15
    patience: int = 15  # epochs without a better validation RMSE before training ends
    rating_offset: str = "source_offset"  # none (the paper's) | item_mean | source_offset
    calibrate: bool = True  # what is added to the offset is scaled by a gain fitted on the validation users (ours)

    def __post_init__(self) -> None:
        refuse(
            choice(self, "cold_item_text", COLD_ITEM_TEXTS),
            choice(self, "optimiser", OPTIMISERS),
            choice(self, "rating_offset", OFFSETS),
            dropout_share(self),
            number(self, "contrast_weight", least=0),
            number(self, "domain_weight", least=0),
            number(self, "temperature", above=0),
            number(self, "auxiliary_share", least=0, most=1),
            number(self, "lr", above=0),
            *(flag(self, name) for name in ("specific", "auxiliary", "exclude_own", "calibrate")),
            *(whole(self, name, least=1) for name in ("filters", "common", "words", "words_per_review")),
            *(whole(self, name, least=1) for name in ("batch", "epochs", "patience")),
        )


def train(config: Config, task: Task, seed: int) -> Iterator[Setup | Epoch]:
    """Train the encoders on target-domain and source-domain ratings, contrast and domains."""
    if task.word_vectors is None:
        raise InputError("this task holds no reviews, which OmniMatch reads; set features.reviews in the plan")
    if config.domain_weight and not len(task.side_users):
        raise InputError(
            "this task has no side users, whose reviews OmniMatch's domain losses read; set domain_weight: 0"
        )
    generator = torch.Generator().manual_seed(seed)
    model = OmniMatch(config, task, generator)
    optimiser: torch.optim.Optimizer
    if config.optimiser == "adam":
        optimiser = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    else:
        optimiser = torch.optim.Adadelta(model.parameters(), lr=config.lr, rho=RHO)
    yield Setup(model, optimiser=optimiser, generator=generator)
    users = len(task.source_ratings.starts) - 1
    while True:
        total = 0.0
        for user_B in user_batches(users, config.batch, generator, task.device):
            total += len(user_B) * take_step(optimiser, model.loss(user_B, generator))
        yield model.epoch(task, total / users)


# --- what is read -------------------------------------------------------------------------------------------------


def auxiliary_rows(task: Task, generator: torch.Generator) -> Tensor:
    """Draw for each source rating (j, r) a target-domain review of another user who rated j with the same r, int64 [N].

    -1 where there is none. Helpers are training overlapping users alone, so that no review of a held-out user is drawn.
    """
    source, train = task.source_ratings, task.train
    user_N, item_N = source.user.cpu(), source.item.cpu()
    levels, level_N = source.rating.cpu().unique(return_inverse=True)  # type: ignore[no-untyped-call]
    code_N = item_N * len(levels) + level_N
    pool = (user_N < len(task.source)).nonzero().flatten()
    pool = pool[code_N[pool].argsort(stable=True)]
    low_N, high_N = (torch.searchsorted(code_N[pool], code_N, right=right) for right in (False, True))
    place_N = torch.full_like(user_N, len(user_N))  # of the rating itself in the pool
    place_N[pool] = torch.arange(len(pool))
    count_N = high_N - low_N - (place_N < len(user_N)).long()
    helper_N = low_N + (torch.rand(len(user_N), generator=generator, dtype=torch.float64) * count_N).long()
    helper_N += helper_N >= place_N  # any but the rating itself
    drawn_N = torch.rand(len(user_N), generator=generator, dtype=torch.float64)
    ready = (count_N > 0).nonzero().flatten()
    helper = user_N[pool[helper_N[ready]]]
    starts = train.starts.cpu()
    row_N = torch.full_like(user_N, -1)
    row_N[ready] = starts[helper] + (drawn_N[ready] * (starts[helper + 1] - starts[helper])).long()
    return row_N.to(source.user.device)


class Texts:
    """All visible reviews, numbered through: the source domain's, the target domain's, then items' own texts.

    Words are numbered anew: by the words that occur. Documents of source users by their source reviews; of target users by
    their target reviews, and behind those the auxiliary one of each source user; of source items, then of target items.
    """

    def __init__(self, config: Config, task: Task, generator: torch.Generator) -> None:
        source, target, self.config = task.source_ratings, task.train, config
        assert source.words is not None
        assert target.words is not None
        assert task.item_words is not None
        assert task.word_vectors is not None
        parts = (source.words, target.words, task.item_words)
        number = torch.cat([words.number for words in parts]).long()
        used_W = torch.bincount(number, minlength=len(task.word_vectors)) > 0
        self.vectors_WE = task.word_vectors[used_W]
        lengths = torch.cat([words.starts.diff() for words in parts])
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self.words = Words((used_W.cumsum(0) - 1)[number], starts)
        self.length_N = lengths.clamp(max=config.words_per_review)

        users, known = len(source.starts) - 1, len(task.target)
        row_S = torch.arange(len(source), device=starts.device)
        row_T = len(source) + torch.arange(len(target), device=starts.device)
        row_I = len(source) + len(target) + torch.arange(len(task.items), device=starts.device)
        beside_S = auxiliary_rows(task, generator) if config.auxiliary else torch.full_like(row_S, -1)
        drawn_S = torch.where(beside_S >= 0, beside_S + len(source), -1)
        self.source_users = self._documents(row_S, source.user, users)
        self.target_users = self._documents(
            torch.cat([row_T, drawn_S]), torch.cat([target.user, known + source.user]), known + users
        )
        spoken_T = target.item[self.length_N[row_T] > 0]
        silent_I = torch.bincount(spoken_T, minlength=len(task.items)) == 0
        own_text_I = torch.where(silent_I & (config.cold_item_text == "metadata"), row_I, -1)
        self.items = self._documents(
            torch.cat([row_S, row_T, own_text_I]),
            torch.cat([source.item, task.source_items + target.item, task.source_items + row_I - row_I[0]]),
            task.source_items + len(task.items),
        )

    def _documents(self, row_K: Tensor, document_K: Tensor, size: int) -> Documents:
        """Return documents of those of the rows that have words (-1 is no row)."""
        kept = (row_K >= 0) & (self.length_N[row_K] > 0)
        row_K = row_K[kept]
        chosen = documents(document_K[kept], size, self.length_N[row_K], self.config.words)
        return Documents(row_K[chosen.rows], chosen.starts)


# --- the networks -------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Convolutions over the words of reviews, and the largest value of each filter."""

    def __init__(self, filters: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        weights = [torch.empty(filters, width, window) for window in WINDOWS]
        for weight in weights:
            nn.init.xavier_uniform_(weight, generator=generator)
        self.weights = nn.ParameterList(weights)
        self.bias = nn.Parameter(torch.zeros(len(WINDOWS) * filters))

    def forward(self, vectors_WE: Tensor, number_RL: Tensor) -> Tensor:
        """Return the largest of each filter over each review, [R, C]."""
        distinct, inverse_RL = number_RL.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        padded = int(len(distinct) > 0 and distinct[0] < 0)
        vectors_WE, inverse_RL = vectors_WE[distinct[padded:]], inverse_RL - padded
        parts = [largest_convolution(vectors_WE, weight, inverse_RL) for weight in self.weights]
        return (torch.cat(parts, dim=1) + self.bias).relu()


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is multiplied by minus a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Return x."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradient, reversed."""
        return -ctx.factor * gradients[0], None


def reversal_factor(share: float) -> float:
    """Return how strongly the domain classifier's gradient is reversed after that share of the training."""
    return 2 / (1 + math.exp(-10 * share)) - 1


def contrast(source_PV: Tensor, target_PV: Tensor, rating_P: Tensor, temperature: float) -> Tensor:
    """Return L_con of unit vectors of both views; candidates of a row are both views of all rows but its own anchor."""
    logit_PX = source_PV @ torch.cat([source_PV, target_PV]).T / temperature
    positive_PX = (rating_P[:, None] == rating_P).repeat(1, 2)
    itself = torch.eye(len(rating_P), dtype=torch.bool, device=rating_P.device)
    positive_PX[:, : len(rating_P)] &= ~itself
    total_P = logit_PX[:, : len(rating_P)].masked_fill(itself, -torch.inf)
    total_P = torch.cat([total_P, logit_PX[:, len(rating_P) :]], dim=1).logsumexp(dim=1)
    mean_P = (logit_PX * positive_PX).sum(dim=1) / positive_PX.sum(dim=1)
    return (total_P - mean_P).mean()


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Ratings of a step in both domains."""

    place: Tensor  # [P] the user's place in the step
    item: Tensor  # [P] source items first
    own: Tensor | None  # [P] the review of the rating, which no document may show; None: documents show all
    wanted: Tensor  # [P] rating less offset
    rating: Tensor  # [P]


class OmniMatch(OffsetAndGain):
    """Features of users' and items' documents, and the rating that they add up to."""

    progress: Tensor

    def __init__(self, config: Config, task: Task, generator: torch.Generator) -> None:
        device = task.device
        target = target_offsets(task, config.rating_offset)
        slope = task.slope if config.rating_offset == "source_offset" else 0.0
        super().__init__(config, held_out_offset(torch.from_numpy(target.item).float().to(device), slope), device)
        self.config, self.task, self.texts = config, task, Texts(config, task, generator)
        source = source_interactions(task)
        offsets = fitted_offsets(source, config.rating_offset)
        left_S = offsets.left(source)
        if config.rating_offset == "item_mean":
            left_S += offsets.user[source.user]  # the user's bias is part of what is predicted, as in the target domain
        wanted_T = wanted_products(task, target, config.rating_offset)
        self.wanted_T, self.wanted_S = (torch.from_numpy(left).float().to(device) for left in (wanted_T, left_S))

        self.vectors = nn.Parameter(self.texts.vectors_WE.detach().clone())
        width, outputs = self.vectors.shape[1], len(WINDOWS) * config.filters
        self.whose = (self.texts.source_users, self.texts.target_users, self.texts.items)
        self.encoders = nn.ModuleList(Encoder(config.filters, width, generator) for _ in self.whose)
        user_width = config.common * (1 + config.specific)

        def layer(inputs: int, outputs: int) -> nn.Linear:
            return glorot(inputs, outputs, generator).float()

        self.common, self.item = layer(outputs, config.common), layer(outputs, ITEM_WIDTH)
        self.head, self.view = layer(user_width + ITEM_WIDTH, 1), layer(user_width + ITEM_WIDTH, VIEW_WIDTH)
        self.specific = nn.ModuleList(layer(outputs, config.common) for _ in range(2 * config.specific))
        self.domains = nn.ModuleList(layer(config.common, 2) for _ in range(1 + config.specific))  # of c, of p
        users = len(task.source_ratings.starts) - 1
        self.steps = config.epochs * math.ceil(users / config.batch)
        self.register_buffer("progress", torch.zeros((), device=device))  # steps taken

    def dropped(self, x: Tensor) -> Tensor:
        """Return d(x)."""
        return dropout(x, self.config.dropout, self.training).relu()

    def user(self, h_PC: Tensor, side: int) -> list[Tensor]:
        """Return c, and p where it is asked for, of documents of a side, [P, common] each."""
        layers: Sequence[Any] = [self.common, *([self.specific[side]] if self.config.specific else [])]
        return [layer(self.dropped(h_PC)) for layer in layers]

    def loss(self, user_B: Tensor, generator: torch.Generator) -> Tensor:
        """Squares of the ratings in both domains of these source users, contrast and domain losses."""
        config, pairs = self.config, self.pairs(user_B)
        item_D, item_P = pairs.item.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        v_P = self.item(self.dropped(self.read(ITEM, item_D, item_P, pairs.own)))
        loss: Tensor
        target_P, loss = self.users(pairs, TARGET, self.target_documents(user_B, generator), generator)
        target_P = torch.cat([target_P, v_P], dim=1)
        loss = loss + (pairs.wanted - self.head(self.dropped(target_P)).squeeze(1)).square().mean()
        if config.contrast_weight or config.domain_weight:  # else nothing reads source documents
            source_P, domain_loss = self.users(pairs, SOURCE, user_B, generator)
            chosen = torch.randperm(len(v_P), generator=generator)[:CONTRASTED].to(user_B.device)
            source_P = torch.cat([source_P, v_P], dim=1)
            y_s, y_t = (normalize(self.view(self.dropped(view_P[chosen])), dim=1) for view_P in (source_P, target_P))
            contrasted = contrast(y_s, y_t, pairs.rating[chosen], config.temperature)
            loss = loss + domain_loss + config.contrast_weight * contrasted
        self.progress += 1
        return loss

    def pairs(self, user_B: Tensor) -> Pairs:
        """Return the target-domain ratings of those of the users who have some, and the source-domain ratings of all."""
        task, overlapping, source = self.task, self.task.overlapping, self.task.source_ratings
        inside_O = (user_B < len(task.source)).nonzero().flatten()
        row_T, place_T = rows_of(overlapping.starts, user_B[inside_O])
        row_S, place_S = rows_of(source.starts, user_B)
        return Pairs(
            place=torch.cat([inside_O[place_T], place_S]),
            item=torch.cat([task.source_items + overlapping.item[row_T], source.item[row_S]]),
            own=torch.cat([len(source) + row_T, row_S]) if self.config.exclude_own else None,
            wanted=torch.cat([self.wanted_T[row_T], self.wanted_S[row_S]]),
            rating=torch.cat([overlapping.rating[row_T], source.rating[row_S]]),
        )

    def target_documents(self, user_B: Tensor, generator: torch.Generator) -> Tensor:
        """Return which target-side document each source user is read by: an auxiliary one but for overlapping users."""
        auxiliary_B = torch.rand(len(user_B), generator=generator).to(user_B.device) < self.config.auxiliary_share
        auxiliary_B |= user_B >= len(self.task.source)
        return torch.where(auxiliary_B, len(self.task.target) + user_B, user_B)

    def users(self, pairs: Pairs, side: int, document_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return c and p of each pair's user by these documents of a side, and beta times the side's domain losses.

        Those are of users of that domain alone, half as many as a step has users.
        """
        weight, batch, task = self.config.domain_weight, self.config.batch, self.task
        if not weight:
            h_PC = self.read(side, document_B, pairs.place, pairs.own)
            return torch.cat(self.user(h_PC, side), dim=1), h_PC.new_zeros(())
        end = (len(task.source_ratings.starts) - 1, len(task.target))[side]
        other_X = torch.randint(len(task.source), end, (max(1, batch // 2),), generator=generator).to(document_B.device)
        asked = torch.cat([pairs.place, len(document_B) + torch.arange(len(other_X), device=document_B.device)])
        own = None if pairs.own is None else torch.cat([pairs.own, torch.full_like(other_X, -1)])
        read_XC = self.read(side, torch.cat([document_B, other_X]), asked, own)
        h_PC, h_XC = read_XC[: len(pairs.place)], read_XC[len(pairs.place) :]
        return torch.cat(self.user(h_PC, side), dim=1), weight * self.domain_loss(h_XC, side)

    def domain_loss(self, h_XC: Tensor, side: int) -> Tensor:
        """Classify the domain of documents, by c behind a reversed gradient, and by p."""
        common_X, *specific_X = self.user(h_XC, side)
        reversed_X = Reversal.apply(common_X, reversal_factor(float(self.progress) / self.steps))  # type: ignore[no-untyped-call]
        label_X = torch.full((len(h_XC),), side, device=h_XC.device)
        losses = [
            cross_entropy(layer(x_X), label_X)
            for layer, x_X in zip(self.domains, (reversed_X, *specific_X), strict=True)
        ]
        return torch.stack(losses).sum()

    def term(self, held_out: HeldOut) -> Tensor:
        """Return what is added to the offset of each rating, [N]."""
        task, ratings = self.task, held_out.ratings
        item_D, item_N = ratings.item.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        v_D = self.item(self.dropped(self.read_whole(ITEM, task.source_items + item_D)))
        user_U = torch.cat(self.user(self.read_whole(TARGET, len(task.target) + held_out.source_row), TARGET), dim=1)
        term_N: Tensor = self.head(self.dropped(torch.cat([user_U[ratings.user], v_D[item_N]], dim=1))).squeeze(1)
        return term_N

    def read(self, side: int, document_D: Tensor, document_P: Tensor, own_P: Tensor | None) -> Tensor:
        """Return h of the document of each pair, one of `document_D`, without the review `own_P` (-1: none), [P, C]."""
        row_K, document_K = self.whose[side].of(document_D)
        row_R, place_K = row_K.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        number_RL = padded_words(self.texts.words, row_R, self.config.words_per_review)
        feature_RC = self.encoders[side](self.vectors, number_RL)
        if own_P is not None and len(row_R):
            place_P = torch.searchsorted(row_R, own_P).clamp(max=len(row_R) - 1)
            own_P = torch.where(row_R[place_P] == own_P, place_P, -1)
        return largest_of_documents(feature_RC, place_K, document_K, len(document_D), document_P, own_P)

    def read_whole(self, side: int, document_D: Tensor) -> Tensor:
        """Return h of these documents, read some at a time, [D, C]."""
        parts = document_D.split(CHUNK)  # type: ignore[no-untyped-call]
        return torch.cat([self.read(side, part, torch.arange(len(part), device=part.device), None) for part in parts])
