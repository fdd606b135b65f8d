"""LGCD (arXiv 2604.05365): what the contract of `trainables.interface` asks of a model, and where its parts are.

config        hyperparameters, with the paper's place of each
presets       the paper's own settings, ablations (Table 3) and figures
encoders      ID and text encoders of sequences, and their fusion (eqs. 1-2)
pretraining   next-item prediction over each domain's or all sequences (eq. 3), done once and kept
retrieval     real items for generated texts (eqs. 5-6)
conditions    training rows: what is known of a user, and the item that came next (eqs. 6-8)
network       condition, denoiser, reverse process from a guess, experts (eqs. 8, 12-16, 18-20, 23-24)
losses        diffusion, guesser, alignment and recommendation (eqs. 17, 21, 22, 25)
training      cyclic batches of one or both directions (eqs. 26-27), predictions, what is kept for serving
"""

from trainables.interface import Selection
from trainables.models.lgcd.config import Config
from trainables.models.lgcd.presets import ABLATIONS, FIGURES, PRESETS
from trainables.models.lgcd.training import prepare, shared, train, unpack

NAME = "LGCD"
TASK_TYPE = "sequences"
SELECTION = Selection("val_ndcg10", "maximize")
NEEDS = ("titles", "pseudo_items")

__all__ = [
    "ABLATIONS",
    "FIGURES",
    "NAME",
    "NEEDS",
    "PRESETS",
    "SELECTION",
    "TASK_TYPE",
    "Config",
    "prepare",
    "shared",
    "train",
    "unpack",
]
