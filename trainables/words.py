"""Documents of reviews, and convolutions over their words, for models that read `features.reviews`.

A user's document is that user's reviews in one domain, in order; an item's is the reviews on it that training may see.
Work is done per review and reduced per document, so that a review of two documents is read once, and leaving one out of a
document is a subtraction. Windows stop at the borders of reviews (ours).

A convolution over word vectors e is exact by a table: sum_k W_k^T e_(t+k) = sum_k T_k[w_(t+k)] with T_k = E W_k over the
distinct words of a batch, which are far fewer than its words. Where only the largest value over a review counts, its place
is found without gradients, and gradients are those of that place alone.

Shapes: N reviews of a domain, R reviews read, T their words, L words of a review with padding, W words of the vocabulary of
vectors of width E, C filters; D documents, K reviews of one, P pairs that ask for a document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from trainables.mapped_users import ragged, rows_of
from trainables.tasks.rating import Ratings, Words

_CHUNK = 4096  # reviews whose convolutions are held at once while their largest are looked for


@dataclass(frozen=True)
class Documents:
    """Which reviews are whose document: rows end to end."""

    rows: Tensor  # int64 [K] reviews
    starts: Tensor  # int64 [documents + 1]

    def of(self, document_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reviews of these documents, and the place in `document_B` that each belongs to, both [K]."""
        place_K, document_K = rows_of(self.starts, document_B)
        return self.rows[place_K], document_K


def documents(code_N: Tensor, size: int, length_N: Tensor, words: int) -> Documents:
    """Return the first reviews of each user or item, up to that many words together, but at least one.

    `code_N` says whose document each review belongs to, `length_N` how many words it has.
    """
    order_N = code_N.argsort(stable=True)
    code_N, length_N = code_N[order_N], length_N[order_N]
    total_N = length_N.cumsum(0)
    first_N = torch.ones_like(code_N, dtype=torch.bool)
    first_N[1:] = code_N[1:] != code_N[:-1]
    before_N = (total_N - length_N)[first_N][first_N.cumsum(0) - 1]  # words of earlier documents
    kept_N = (total_N - before_N <= words) | first_N
    counts = torch.bincount(code_N[kept_N], minlength=size)
    return Documents(order_N[kept_N], torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def review_lengths(ratings: Ratings, words_per_review: int) -> Tensor:
    """Return how many words of each review are read, [N]."""
    assert ratings.words is not None
    return ratings.words.starts.diff().clamp(max=words_per_review)


def words_of(words: Words, row_R: Tensor, words_per_review: int) -> tuple[Tensor, Tensor]:
    """Return the first words of these reviews, and the place in `row_R` that each belongs to, both int64 [T]."""
    first_R = words.starts[row_R]
    place_T, review_T = ragged(first_R, (words.starts[row_R + 1] - first_R).clamp(max=words_per_review))
    return words.number[place_T].long(), review_T


def word_convolution(vectors_WE: Tensor, weight: Tensor, number_T: Tensor, review_T: Tensor) -> Tensor:
    """Convolve word vectors within reviews, [T, C]; `weight` [C, E, window] as of conv1d, the window about each word."""
    distinct, inverse_T = number_T.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return _windows(vectors_WE[distinct], weight, inverse_T, review_T)


def local_convolution(feature_TC: Tensor, weight: Tensor, review_T: Tensor) -> Tensor:
    """Convolve features of words within reviews, [T, C]."""
    return _windows(feature_TC, weight, torch.arange(len(review_T), device=review_T.device), review_T)


def _windows(table_WE: Tensor, weight: Tensor, row_T: Tensor, review_T: Tensor) -> Tensor:
    """Add up, for each word, what the words about it give: products of the table's rows with each place of the window."""
    filters, width, window = weight.shape
    product = (table_WE @ weight.permute(1, 2, 0).reshape(width, window * filters)).view(-1, window, filters)
    total_TC = torch.zeros(len(row_T), filters, dtype=product.dtype, device=product.device)
    for place in range(window):
        shift = place - (window - 1) // 2
        ahead, behind = max(shift, 0), max(-shift, 0)
        count = len(row_T) - ahead - behind  # words that have another one so many places away
        if count <= 0:
            continue
        same = review_T[ahead + behind :] == review_T[:count]
        seen = product[:, place].index_select(0, row_T[ahead : ahead + count]) * same[:, None]
        total_TC = total_TC + pad(seen, (0, 0, behind, ahead))
    return total_TC


# --- the largest of a review, and of a document -------------------------------------------------------------------


def padded_words(words: Words, row_R: Tensor, words_per_review: int) -> Tensor:
    """Return the first words of these reviews, int64 [R, L]; -1 behind the last of each."""
    first_R = words.starts[row_R]
    count_R = (words.starts[row_R + 1] - first_R).clamp(max=words_per_review)
    place_L = torch.arange(int(count_R.max()) if len(row_R) else 1, device=row_R.device)
    inside_RL = place_L < count_R[:, None]
    number_RL = words.number[(first_R[:, None] + place_L).clamp(max=len(words.number) - 1)].long()
    return number_RL.masked_fill(~inside_RL, -1)


def largest_convolution(vectors_WE: Tensor, weight: Tensor, number_RL: Tensor) -> Tensor:
    """Return the largest value over a review of a convolution within it, [R, C]; each review has a word.

    `weight` [C, E, window] as of conv1d, the window about each word; a number is a row of the vectors, -1 is none.
    """
    window = weight.shape[2]
    empty = len(vectors_WE)
    table_kWC = pad(vectors_WE, (0, 0, 0, 1)) @ weight.permute(2, 1, 0)  # the last row is that of no word: zeros
    seen_RL = pad(number_RL, ((window - 1) // 2, window // 2), value=-1)
    seen_RLk = seen_RL.masked_fill(seen_RL < 0, empty).unfold(1, window, 1)
    with torch.no_grad():
        shift_k = (empty + 1) * torch.arange(window, device=seen_RL.device)
        parts = [
            _best_places(table_kWC.flatten(0, 1), part_RLk + shift_k, inside_RL)
            for part_RLk, inside_RL in zip(seen_RLk.split(_CHUNK), (number_RL >= 0).split(_CHUNK), strict=True)  # type: ignore[no-untyped-call]
        ]
        best_RC = torch.cat(parts) if parts else number_RL.new_zeros(0, len(weight))
    total_RC = torch.zeros(best_RC.shape, dtype=table_kWC.dtype, device=best_RC.device)
    for place in range(window):
        total_RC = total_RC + table_kWC[place].gather(0, seen_RLk[:, :, place].gather(1, best_RC))
    return total_RC


def _best_places(table_XC: Tensor, row_RLk: Tensor, inside_RL: Tensor) -> Tensor:
    """Return at which word of each review the sum of the table's rows is the largest, [R, C]."""
    sum_TC = embedding_bag(row_RLk.flatten(0, 1), table_XC, mode="sum")
    sum_RLC = sum_TC.view(*inside_RL.shape, table_XC.shape[1]).masked_fill_(~inside_RL[..., None], -torch.inf)
    return sum_RLC.max(dim=1).indices


def largest_of_documents(
    feature_RC: Tensor, place_K: Tensor, document_K: Tensor, size: int, document_P: Tensor, own_P: Tensor | None
) -> Tensor:
    """Return, for each pair, the largest of a document's reviews, one of them left out, [P, C]; 0 where none is left.

    `feature_RC` >= 0; `place_K` says which of its rows are reviews of which document (sorted), `own_P` the row that is left
    out (-1: none), which a document has once at most.
    """
    extended = pad(feature_RC, (0, 0, 0, 1))  # the last row is that of no review: zeros
    with torch.no_grad():
        count_D = torch.bincount(document_K, minlength=size)
        column_K = torch.arange(len(place_K), device=place_K.device) - (count_D.cumsum(0) - count_D)[document_K]
        width = int(count_D.max()) + 1 if size else 1
        place_DK = torch.full((size, width), len(feature_RC), device=place_K.device)
        place_DK[document_K, column_K] = place_K
        value_DKC = extended[place_DK]
        first_DC = value_DKC.max(dim=1).indices
        row_PC = place_DK.gather(1, first_DC)[document_P]
        if own_P is not None:
            second_DC = value_DKC.scatter_(1, first_DC[:, None], -1.0).max(dim=1).indices
            row_PC = torch.where(row_PC == own_P[:, None], place_DK.gather(1, second_DC)[document_P], row_PC)
    return extended.gather(0, row_PC)
