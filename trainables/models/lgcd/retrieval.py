"""Real items for the texts that a language model has generated for single-domain users (LGCD eqs. 5-6).

Shapes: S sequences (training users), K texts or items of a user, B users at a time, F text width, D vector width, J items
of a domain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainables.models.lgcd.encoders import DomainEncoders, Encoders
from trainables.tasks.sequential import SOURCE_ONLY, TARGET_ONLY, SequenceTask

_ROWS = 512  # users at a time


@dataclass(frozen=True)
class Suggested:
    """Items of the domain that a single-domain user lacks, most wanted first."""

    item: Tensor  # int64 [S, K] item number, -1: none
    similarity: Tensor  # float32 [S, K] cosine of the item with what asked for it


def by_text(task: SequenceTask, count: int) -> Suggested:
    """Return the first `count` items of each user, which extraction has retrieved text by text (ours)."""
    return Suggested(task.pseudo[:, :count], task.similarity[:, :count])


def by_user(task: SequenceTask, encoders: DomainEncoders, count: int) -> Suggested:
    """Return the `count` items nearest to all of a user's first `count` texts, read as one sequence (eqs. 5-6).

    h^B is what the pretrained Encoder_text of the lacking domain reads of the texts, in their order; e_j is the text
    embedding of item j there; nearest by cosine.
    """
    texts_SK = task.generated[:, : min(count, encoders.max_length)]
    item = torch.full(texts_SK.shape, -1, device=task.device)
    suggested = Suggested(item, torch.zeros(item.shape, device=task.device))
    for group, lacking in ((SOURCE_ONLY, task.target), (TARGET_ONLY, task.source)):
        users = ((task.group == group) & (texts_SK >= 0).any(dim=1)).nonzero().squeeze(1)
        embedded_JD = encoders.of_domain(lacking).text_embeddings(lacking)
        kept = min(texts_SK.shape[1], len(embedded_JD))
        for start in range(0, len(users), _ROWS):
            part = users[start : start + _ROWS]
            wanted_BD = _read_texts(task, encoders.of_domain(lacking), texts_SK[part])
            cosine, number = (normalize(wanted_BD, dim=1) @ normalize(embedded_JD, dim=1).T).topk(kept, dim=1)
            suggested.item[part, :kept] = number + lacking[0]
            suggested.similarity[part, :kept] = cosine
    return suggested


@torch.no_grad()
def _read_texts(task: SequenceTask, encoders: Encoders, texts_BK: Tensor) -> Tensor:
    """The text representation of each user's texts, which are not all missing: [B, D] (eq. 5)."""
    assert task.generated_texts is not None
    missing_BK = texts_BK < 0
    texts_BK = texts_BK.gather(1, missing_BK.int().argsort(dim=1, stable=True))  # to the end, where no past sees them
    vectors_BKF = task.generated_texts[texts_BK.clamp(min=0).flatten()].view(*texts_BK.shape, -1)
    state_BKD: Tensor = encoders.text_encoder(encoders.text_map(vectors_BKF))
    return state_BKD[torch.arange(len(texts_BK), device=texts_BK.device), (~missing_BK).sum(dim=1) - 1]
