"""Documents of reviews, and convolutions over their words, for models that read `features.reviews`.

A user's document is that user's reviews in one domain, in order; an item's is the reviews on it that training may see.
Work is done per review and reduced per document, so that a review of two documents is read once, and leaving one out of a
document is a subtraction. Windows stop at the borders of reviews (ours).

A convolution over word vectors e is exact by a table: sum_k W_k^T e_(t+k) = sum_k T_k[w_(t+k)] with T_k = E W_k over the
distinct words of a batch, which are far fewer than its words.

Shapes: N reviews of a domain, R reviews read, T their words, W words of the vocabulary of vectors of width E, C filters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainables.mapped_users import ragged, rows_of
from trainables.tasks.rating import Ratings, Words


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
