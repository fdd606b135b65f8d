"""LGCD (arXiv 2604.05365): what the contract of `trainables.interface` asks of a model, and where its parts are.

encoders    ID and text encoders of sequences, pretrained by next-item prediction (eqs. 1-3)
conditions  training rows: what is known of a user, and the item that came next (eqs. 6-8)
model       denoiser, guesser, experts, losses and training (eqs. 9-27)
"""

from trainables.models.lgcd.model import (
    ABLATIONS,
    FIGURES,
    NAME,
    NEEDS,
    SELECTION,
    TASK_TYPE,
    Config,
    prepare,
    shared,
    train,
    unpack,
)

__all__ = [
    "ABLATIONS",
    "FIGURES",
    "NAME",
    "NEEDS",
    "SELECTION",
    "TASK_TYPE",
    "Config",
    "prepare",
    "shared",
    "train",
    "unpack",
]
