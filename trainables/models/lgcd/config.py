"""Hyperparameters of LGCD (arXiv 2604.05365), and the values that a field takes."""

from __future__ import annotations

from dataclasses import dataclass

from features.checks import at_least, choice, dropout_share, number, refuse, step_size, variance_range
from trainables.models.lgcd.encoders import ID_STARTS, ITEM_FUSIONS, SEQUENCES, PretrainSpec

WIDTH = 64  # D (settings: hidden dimension)
GUIDANCE = ("id", "text", "cfg", "linear", "cross_attention")
PREDICTS = ("x0", "noise")
TRAIN_REVERSE = ("one_step", "guess", "chain")
EXPERTS = ("linear", "mlp", "none")
_CHOICES = {  # field -> its values
    "condition_from": ("merged", "source"),
    "rows": ("every", "last"),
    "retrieval": ("per_text", "per_user"),
    "directions": ("one", "both"),
    "schedule": ("linear_sqrt", "linear", "linear_root"),
    "guidance": GUIDANCE,
    "predicts": PREDICTS,
    "guesser_start": ("noised_zero", "gaussian"),
    "train_reverse": TRAIN_REVERSE,
    "expert": EXPERTS,
    "expert_start": ("identity", "random"),
    "loss_norm": ("mean", "sum"),
    "align_on": ("single", "overlapping", "both"),
    "keep": ("best", "last"),
    "encoder_sequences": SEQUENCES,
    "id_start": ID_STARTS,
    "item_fusion": ITEM_FUSIONS,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters. The defaults are the paper's where it gives a value; (ours) marks where it is silent, or where its
    preset (`trainables.models.lgcd.presets`) says something else.
    """

    pseudo_items: int = 10  # n_K, generated items that are inserted per single-domain user (Figure 3)
    min_similarity: float = 0.0  # least cosine of text and item for one to be inserted: n_K per user (ours)
    retrieval: str = (
        "per_text"  # nearest item of each text (ours) | per_user: n_K nearest of all texts as one (eqs. 5-6)
    )
    rows: str = "every"  # real rows at every target-domain item of a user (ours) | at the last one
    condition_from: str = "merged"  # what the protocol shows (ours) | source: source-domain items alone (eq. 8)
    condition_tokens: int = 2  # ID and text part apart (ours) | 1: h_cond as eq. 13 has it
    directions: str = "one"  # the cell's alone (ours) | both: f_theta and experts learn the opposite one too (eq. 18)
    steps: int = 100  # T, diffusion steps (Figure 3)
    schedule: str = (
        "linear_sqrt"  # (ours) | linear | linear_root, eq. 9 word for word (`trainables.diffusion.variances`)
    )
    variance_start: float = 1e-4  # beta_1 (settings)
    variance_end: float = 0.1  # beta_T (settings)
    start_ratio: float = 0.5  # lambda: the reverse process starts at lambda T (food's optimum in Figure 3)
    sampler_steps: int = 0  # S, steps of the deterministic strided sampler; 0: every step, eqs. 19-20 (ours)
    guidance: str = "cross_attention"  # id | text | cfg | linear | cross_attention (Figure 4)
    guidance_weight: float = 0.5  # w of classifier-free guidance; read by `cfg` only (ours)
    predicts: str = "x0"  # x0 | noise (Figure 5)
    train_reverse: str = "guess"  # h_rev in training: one_step | guess (ours) | chain (eq. 19, see `losses.generated`)
    heads: int = 4  # of the cross-attention (settings)
    experts: int = 8  # E (settings)
    active_experts: int = 0  # experts with the largest gates that are used; 0: all (ours)
    expert: str = "linear"  # Expert(.) of eq. 24: linear | mlp | none: h_rev itself, or h_cond without diffusion
    expert_start: str = "identity"  # each starts as the identity on h_cond (ours) | random
    dropout: float = 0.1  # of denoiser and fusion (searched)
    lr: float = 1e-3  # Adam's (settings)
    batch: int = 128  # pseudo-overlapping rows of a batch, and as many real ones beside them (settings)
    epochs: int = 15  # of as many real rows as there are under one protocol (ours)
    patience: int = 2  # epochs without a better validation NDCG@10 before training ends (ours)
    keep: str = "best"  # the epoch with the best validation NDCG@10 (ours) | last: `epochs` epochs, none is chosen
    negatives: int = 1024  # items of the softmax beside the target (ours); 0: all (eq. 25)
    loss_norm: str = "mean"  # of eqs. 17, 21, 22 over the D numbers of a vector (ours) | sum, as the norms say
    diffusion: bool = True  # Table 3, as all below
    overlap_diffusion: bool = True  # diffusion and guesser learn from real overlapping users
    overlap_rows: bool = True  # False: real overlapping users are in no loss, L_rec included
    pseudo_diffusion: bool = True  # diffusion learns from pseudo-overlapping users
    alignment: bool = True  # eq. 21
    align_on: str = "single"  # whose rows eq. 21 is about: single-domain users (eq. 27) | overlapping (eq. 26) | both
    guesser: bool = True  # False: the reverse process starts at T
    guesser_start: str = "noised_zero"  # from where without guesser: 0, noised (ours) | gaussian: N(0, I)
    moe: bool = True  # False: one expert
    cyclic: bool = True  # False: a batch holds as many real rows as chance gives it
    encoder_sequences: str = "merged"  # merged | separate | per_domain (see trainables.models.lgcd.encoders)
    encoder_epochs: int = 10  # of pretraining (ours)
    encoder_beta2: float = 0.98  # of pretraining's Adam, as SASRec has it (ours); 0.999 is Adam's own
    id_start: str = (
        "titles"  # ID embeddings before pretraining: from titles (ours) | random; `guidance: id` reads no title
    )
    item_fusion: str = "own"  # map of items' embeddings: own (ours) | shared with sequences (eq. 3)

    def __post_init__(self) -> None:
        refuse(
            *(choice(self, name, values) for name, values in _CHOICES.items()),
            *(at_least(self, name, 1) for name in ("heads", "experts", "batch", "epochs", "patience")),
            *(at_least(self, name, 0) for name in ("pseudo_items", "sampler_steps", "active_experts", "negatives")),
            *(at_least(self, "steps", 2), at_least(self, "encoder_epochs", 1)),
            number(self, "encoder_beta2", least=0, below=1),
            "" if self.condition_tokens in (1, 2) else f"condition_tokens is {self.condition_tokens}; give 1 or 2",
            "" if -1 <= self.min_similarity <= 1 else f"min_similarity is {self.min_similarity}; give a cosine",
            "" if 0 < self.start_ratio <= 1 else f"start_ratio is {self.start_ratio}; give a number in (0, 1]",
            dropout_share(self),
            at_least(self, "guidance_weight", 0),
            step_size(self),
            ""
            if self.active_experts <= self.experts
            else f"active_experts is {self.active_experts}; give at most experts, which is {self.experts}",
            variance_range(self),
            "" if WIDTH % self.heads == 0 else f"heads is {self.heads}; give a divisor of {WIDTH}",
            "condition_from is merged, but encoder_sequences: per_domain reads one domain; give condition_from: source"
            if self.encoder_sequences == "per_domain" and self.condition_from == "merged"
            else "",
            "expert_start is identity, which an mlp cannot be; give expert_start: random"
            if self.expert == "mlp" and self.expert_start == "identity"
            else "",
            "overlap_rows is false and pseudo_items is 0, which leaves nothing to train on; change one of them"
            if not self.overlap_rows and not self.pseudo_items
            else "",
        )

    @property
    def pretraining(self) -> PretrainSpec:
        """What makes the encoders; nothing else in the config does. An ID condition must not have started from titles."""
        return PretrainSpec(
            width=WIDTH, epochs=self.encoder_epochs, beta2=self.encoder_beta2, sequences=self.encoder_sequences,
            id_start="random" if self.guidance == "id" else self.id_start, item_fusion=self.item_fusion,
        )  # fmt: skip
